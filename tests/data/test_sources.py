import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynrec_jax.data.clean import Filters
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.data.sources import SOURCES, lines
from dynrec_jax.data.sources.source import Columns
from dynrec_jax.errors import ConfigError, DataError

from .reference import histories

FIXTURES = Path(__file__).parent / "fixtures"
MOVIES = {"7": [("1", 900000001, None), ("2", 900000002, None)], "8": [("2", 900000003, None)]}


@pytest.fixture
def prepared(tmp_path):
    def make(source: str, **options) -> Dataset:
        return prepare(PrepareOptions(source=source, out=tmp_path / "out", shards=2, **options))

    return make


def described(dataset: Dataset) -> dict[str, dict[str, str | None]]:
    return {row.pop("item_id"): row for row in dataset.items_table().drop_columns("index").to_pylist()}


def test_every_kind_is_there():
    assert SOURCES.keys() == {"amazon", "atomic", "mind", "movielens", "sequences", "synthetic", "table"}


def test_sequences(prepared):
    dataset = prepared(f"sequences:{FIXTURES}/sequences/small.txt")
    assert histories(dataset.path) == {
        "ana": [(item, None, None) for item in ("007", "12", "5", "12")],
        "bo": [("5", None, None), ("007", None, None)],
        "cleo": [("9", None, None), ("5", None, None)],
    }
    assert dataset.item_ids().to_pylist() == ["007", "12", "5", "9"]
    assert (dataset.has_times, dataset.info["ties"], dataset.source) == (False, "none", "sequences:small.txt")


@pytest.mark.parametrize("path", ["atomic", "atomic/tiny.inter"])
def test_atomic(prepared, path):
    dataset = prepared(f"atomic:{FIXTURES}/{path}")
    assert histories(dataset.path) == {
        "u1": [("10", 1000000050, None), ("9", 1000000100, None)],
        "u2": [("10", 1000000300, None)],
    }
    assert described(dataset) == {
        "10": {"title": "Nine Lamps", "class": "comedy"},
        "9": {"title": 'Quiet "Harbour"', "class": "drama slow"},
    }
    assert dataset.info["source_time_unit"] == "seconds"


@pytest.mark.parametrize(
    ("folder", "items"),
    [
        ("ml-100k", {"1": ("Café Étoile (1991)", "Comedy, Drama"), "2": ("Long Road", None)}),
        ("ml-1m", {"1": ("Café Étoile (1991)", "Comedy, Drama"), "2": ("Long: Road", "Western")}),
        ("ml-csv", {"1": ("Étoile, The (1991)", "Comedy, Drama"), "2": ("Long Road", None)}),
    ],
)
def test_movielens(prepared, folder, items):
    dataset = prepared(f"movielens:{FIXTURES}/{folder}")
    assert histories(dataset.path) == MOVIES
    assert described(dataset) == {item: {"title": t, "genres": g} for item, (t, g) in items.items()}
    assert dataset.source == f"movielens:{folder}"


def test_movies_in_utf_8_are_read_as_such(prepared, tmp_path):
    (tmp_path / "ratings.dat").write_text("7::1::4::900000002\n")
    (tmp_path / "movies.dat").write_text("1::Étoile::Drama\n", encoding="utf-8")
    assert described(prepared(f"movielens:{tmp_path}"))["1"] == {"title": "Étoile", "genres": "Drama"}


def test_movielens_ratings_are_read(prepared):
    dataset = prepared(f"movielens:{FIXTURES}/ml-csv", filters=Filters(min_rating=4))
    assert histories(dataset.path) == {"7": [("2", 900000002, None)], "8": [("2", 900000003, None)]}


TABLE = {
    "001": [("y,z", 1000000005, 1), ("x", 1000000010, 2)],
    "2": [("x", 1000000007, 2), ("NA", 1000000009, 0)],
}


def test_csv_ids_stay_the_text_they_are(prepared):
    dataset = prepared(f"table:{FIXTURES}/table/small.csv")
    assert histories(dataset.path) == TABLE
    assert dataset.event_types == ["buy", "view"]
    assert dataset.first_time == 1000000005
    assert dataset.info["last_time"] == 1000000010


def test_columns_are_named_by_flags_or_left_out(prepared, tmp_path):
    dataset = prepared(f"table:{FIXTURES}/table/renamed.csv", columns=Columns("who", "what", "when"))
    assert histories(dataset.path) == {"001": [("x", 1000000010, None)], "2": [("y", 1000000007, None)]}
    (tmp_path / "out").rename(tmp_path / "first")
    dataset = prepared(f"table:{FIXTURES}/table/small.csv", columns=Columns(time="", event=""))
    assert histories(dataset.path)["001"] == [("x", None, None), ("y,z", None, None)]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([1000000010, 1000000005, 1000000007, 1000000009]),
        pa.array([1000000010.9, 1000000005.0, 1000000007.2, 1000000009.5]),
        pa.array([1000000010, 1000000005, 1000000007, 1000000009], pa.timestamp("s")).cast(
            pa.timestamp("us", "UTC")
        ),
        pa.array(["1000000010", "1000000005", " 1000000007", "1.000000009e9"]),
    ],
    ids=["int", "float", "timestamp", "text"],
)
def test_parquet_types_of_time(prepared, tmp_path, times):
    users = pa.array(["001", "001", "2", "2"]).dictionary_encode()
    columns = {"item": ["x", "y,z", "x", "NA"], "time": times, "event": ["view", "buy", "view", None]}
    pq.write_table(pa.table({"user": users, **columns}), tmp_path / "log.parquet")
    assert histories(prepared(f"table:{tmp_path}/log.parquet").path) == TABLE


def test_parquet_whole_number_ids_are_their_digits(prepared, tmp_path):
    pq.write_table(pa.table({"user": [7, -8], "item": [10**18 + 1, 2]}), tmp_path / "log.parquet")
    dataset = prepared(f"table:{tmp_path}/log.parquet")
    assert histories(dataset.path) == {"7": [(str(10**18 + 1), None, None)], "-8": [("2", None, None)]}


@pytest.mark.parametrize(
    ("factor", "unit"),
    [(1, "seconds"), (10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")],
)
def test_units_are_told_apart_and_rounded_down(prepared, tmp_path, factor, unit):
    rows = [("a", "x", 1_700_000_000 * factor), ("a", "y", 1_700_000_001 * factor - (factor > 1))]
    text = "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    (tmp_path / "log.csv").write_text("user,item,time\n" + text)
    dataset = prepared(f"table:{tmp_path}/log.csv")
    times = [time for _, time, _ in histories(dataset.path)["a"]]
    assert times == [1_700_000_000, 1_700_000_001 - (factor > 1)]
    assert dataset.info["source_time_unit"] == unit


def test_times_before_1970_round_down_too(prepared, tmp_path):
    (tmp_path / "log.csv").write_text(f"user,item,time\na,x,-{10**12 + 1}\na,y,{10**12 + 1999}\n")
    times = [time for _, time, _ in histories(prepared(f"table:{tmp_path}/log.csv").path)["a"]]
    assert times == [-(10**9) - 1, 10**9 + 1]


def test_several_files_keep_their_order(prepared, tmp_path):
    for name, items in (("b.csv", "3 4"), ("a.csv", "1 2")):
        (tmp_path / name).write_text("user,item,time\n" + "".join(f"u,{item},5\n" for item in items.split()))
    dataset = prepared(f"table:{tmp_path}/*.csv")
    assert [item for item, _, _ in histories(dataset.path)["u"]] == ["1", "2", "3", "4"]


def test_blocks_do_not_change_what_is_read(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 7)
    dataset = prepared(f"sequences:{FIXTURES}/sequences/small.txt")
    assert [item for item, _, _ in histories(dataset.path)["ana"]] == ["007", "12", "5", "12"]
    assert [item for item, _, _ in histories(dataset.path)["cleo"]] == ["9", "5"]


@pytest.mark.parametrize("block", [7, 8, 9])
def test_blocks_do_not_change_the_line_that_is_named(prepared, tmp_path, monkeypatch, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    for content, part in (
        (b"a x\nb y\n\nc z\nd \xff\n", ":5: byte 0xff"),
        (b"a x\nb y\n\nc z\nd\n", ":5: first of"),
    ):
        (tmp_path / "log").write_bytes(content)
        assert part in refused(prepared, tmp_path, f"sequences:{tmp_path}/log")


def test_byte_order_mark_and_windows_line_ends(prepared, tmp_path):
    text = "\ufeffuser_id:token\titem_id:token\r\nana\tx\r\nana\ty\r\nbo\ty\r\n"
    (tmp_path / "log.inter").write_bytes(text.encode())
    assert histories(prepared(f"atomic:{tmp_path}/log.inter").path) == {
        "ana": [("x", None, None), ("y", None, None)],
        "bo": [("y", None, None)],
    }


def test_synthetic_is_read_like_a_log(prepared):
    dataset = prepared("synthetic:users=12,items=25,seed=3")
    assert dataset.users == 12
    assert dataset.items <= 25
    assert dataset.has_times
    assert dataset.info["item_columns"] == ["title", "topic"]
    assert dataset.source == "synthetic:users=12,items=25,seed=3"


# -------------------------------------------------------------- described items


def test_items_from_csv(prepared):
    dataset = prepared(f"table:{FIXTURES}/table/small.csv", items=FIXTURES / "items/small.csv")
    assert described(dataset) == {
        "NA": {"title": "Not a null", "brand": "Neu"},
        "x": {"title": "A lamp, small", "brand": "Lux"},
        "y,z": {"title": "Rope", "brand": None},
    }
    assert dataset.info["dropped"]["item_rows_repeated"] == 1
    assert dataset.info["dropped"]["items_without_row"] == 0
    assert dataset.info["dropped"]["items_without_text"] == 0


def test_items_from_json_lines(prepared):
    dataset = prepared(
        f"table:{FIXTURES}/table/small.csv",
        items=FIXTURES / "items/small.jsonl",
        text_columns=("tags", "title"),
    )
    assert described(dataset) == {
        "NA": {"tags": None, "title": None},
        "x": {"tags": ["light", "home"], "title": "A lamp"},
        "y,z": {"tags": None, "title": None},
    }
    assert dataset.info["item_columns"] == ["tags", "title"]
    assert dataset.info["dropped"]["items_without_row"] == 1


def test_items_from_movies_dat(prepared, tmp_path):
    (tmp_path / "log.txt").write_text("ana 2 1 3\n")
    dataset = prepared(f"sequences:{tmp_path}/log.txt", items=FIXTURES / "ml-1m/movies.dat")
    assert described(dataset) == {
        "1": {"title": "Café Étoile (1991)", "genres": "Comedy, Drama"},
        "2": {"title": "Long: Road", "genres": "Western"},
        "3": {"title": None, "genres": None},
    }


def test_items_from_parquet(prepared, tmp_path):
    table = pa.table({"item_id": ["x"], "tags": [["light", "home"]], "year": [1999], "score": [0.5]})
    pq.write_table(table, tmp_path / "items.parquet")
    dataset = prepared(f"table:{FIXTURES}/table/small.csv", items=tmp_path / "items.parquet")
    assert described(dataset)["x"] == {"tags": ["light", "home"], "year": "1999", "score": "0.5"}


# -------------------------------------------------------------------- bad input


def refused(prepared, tmp_path, source, kind=DataError, **options) -> str:
    with pytest.raises(kind) as caught:
        prepared(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(tmp_path.glob("*out*")), "something is left"
    assert not list(tmp_path.glob(".out*")), "something is left"
    return message


CSV = "user,item,time\n"


@pytest.mark.parametrize(
    ("kind", "content", "parts"),
    [
        ("table", CSV + "a,x,5\n\nb,y,noon\n", [":4: time 'noon' is not a number"]),
        ("table", CSV + 'a,"x\nx",5\nb,y,2020-01-01\n', [":4: time '2020-01-01' is not a number"]),
        ("table", CSV + "a,x,nan\n", [":2: time 'nan' is not a number"]),
        ("table", CSV + f"a,x,{10**20}\n", [":2: time '1"]),
        (
            "table",
            CSV + "a,x,1600000000\nb,x,1600000001\na,y,1600000000000\n",
            [":4: a time that looks like milli"],
        ),
        ("table", CSV + "a,x,5\nb,,6\n,y,7\n", [":3: first of 2 rows", "1 without user, 1 without item"]),
        ("table", CSV + "a,x,\n", [":2: first of 1 rows", "1 without time"]),
        ("table", CSV + "a,x,5\nb,y\n", [":3: 2 fields; expected 3"]),
        ("table", CSV, ["no rows"]),
        ("table", "", ["is empty"]),
        ("table", "user,thing\na,x\n", ["no column 'item'; found user, thing", "--item_column"]),
        ("table", "user,item,user\na,x,b\n", ["2 columns are named 'user'"]),
        ("table", "user,item,rating\na,x,good\n", [":2: rating 'good' is not a number"]),
        ("table", b"user,item\na,x\nb,caf\xe9\n", [":3: byte 0xe9 is not UTF-8"]),
        ("table", b"user,caf\xe9\na,x\n", [":1: byte 0xe9 is not UTF-8"]),
        ("table", b"PAR1 and then nothing", ["not readable as Parquet"]),
        ("sequences", "ana x y\nbo\n", [":2: first of 1 rows", "1 without item"]),
        ("sequences", b"ana x y\nbo \xff\n", [":2: byte 0xff is not UTF-8"]),
        ("sequences", "", ["is empty"]),
        ("sequences", "\n \n", ["no rows"]),
        ("atomic", "user_id:token\titem_id:token\na\tx\nb\n", [":3: 1 fields; expected 2"]),
        ("atomic", "user_id:token\tthing:token\na\tx\n", ["no column 'item_id'; found user_id, thing"]),
        ("atomic", "user_id:token\titem_id:token\ttimestamp:float\na\tx\tsoon\n", [":2: time 'soon'"]),
    ],
)
def test_bad_files_are_refused_with_the_line(prepared, tmp_path, kind, content, parts):
    path = tmp_path / "log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(prepared, tmp_path, f"{kind}:{path}")
    assert str(path) in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("table:{tmp}/none.csv", "none.csv: no such file"),
        ("table:{tmp}/*.none", "no file matches"),
        ("table:{tmp}", "is a folder; expected a CSV or Parquet file"),
        ("sequences:{tmp}", "is a folder"),
        ("atomic:{tmp}", "expected one .inter file, found none"),
        ("movielens:{tmp}", "none of u.data, ratings.dat, ratings.csv"),
        ("movielens:{tmp}/none", "no such folder"),
        ("nonsense:{tmp}", "unknown kind 'nonsense'"),
        ("sequences", "no path"),
        ("table:", "no path"),
        ("synthetic:userz=3", "userz"),
    ],
)
def test_places_and_kinds_that_are_not_there(prepared, tmp_path, source, part):
    assert part in refused(prepared, tmp_path, source.format(tmp=tmp_path))


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ({"user": [1.0], "item": ["x"]}, "column 'user' has type double; expected strings or whole numbers"),
        ({"user": ["a"], "item": [1.5]}, "column 'item' has type double"),
        ({"user": ["a"], "item": ["x"], "time": [True]}, "column 'time' has type bool"),
        ({"user": ["a", None], "item": ["x", "y"]}, ": row 2: first of 1 rows"),
        ({"user": ["a", "b"], "item": ["x", "y"], "time": ["5", "noon"]}, ": row 2: time 'noon'"),
    ],
)
def test_bad_parquet_is_refused(prepared, tmp_path, table, part):
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    assert part in refused(prepared, tmp_path, f"table:{tmp_path}/log.parquet")


def test_columns_cannot_be_named_where_they_are_known(prepared, tmp_path):
    for source in (
        f"sequences:{FIXTURES}/sequences/small.txt",
        f"movielens:{FIXTURES}/ml-1m",
        "synthetic:seed=1",
    ):
        assert "--user_column" in refused(
            prepared, tmp_path, source, ConfigError, columns=Columns(user="who")
        )


def test_a_column_that_was_named_must_be_there(prepared, tmp_path):
    message = refused(prepared, tmp_path, f"table:{FIXTURES}/table/small.csv", columns=Columns(time="when"))
    assert "no column 'when'; found user, item, time, event, rating" in message


@pytest.mark.parametrize(
    ("name", "content", "columns", "part"),
    [
        ("i.csv", "item_id,title\nx,y\n", ("brand",), "no column 'brand'; found title"),
        ("i.csv", "id,title\nx,y\n", (), "no column 'item_id'; found id, title"),
        ("i.csv", "item_id,index\nx,1\n", (), "named 'index'"),
        ("i.csv", "item_id,Title,title\nx,1,2\n", (), "'Title' and 'title' differ by case alone"),
        ("i.csv", "item_id,title\n", (), "no rows; expected at least one item"),
        ("i.csv", b"item_id,title\nx,caf\xe9\n", (), ":2: byte 0xe9 is not UTF-8"),
        (
            "i.csv",
            gzip.compress(b"item_id,title\nx,y\n", mtime=0),
            (),
            "is packed with gzip; expected plain CSV",
        ),
        ("i.jsonl", b'{"item_id": "x"}\n{"item_id": "caf\xe9"}\n', (), ":2: byte 0xe9 is not UTF-8"),
        ("i.jsonl", "", (), "is empty"),
        ("i.json", '[{"item_id": "x"}]', (), "is a JSON array; expected JSON lines"),
        ("i.csv", "item_id,title\nx,y\n,z\n", (), ":3: no item_id"),
        ("i.jsonl", '{"item_id": "x"}\n{"item_id": \n', (), ":2: not JSON"),
        ("i.jsonl", '{"item_id": "x"}\n[1]\n', (), ":2: list; expected a JSON object"),
        ("i.jsonl", '{"item_id": "x"}\n\n{"title": "y"}\n', (), ":3: no item_id"),
        ("i.jsonl", '{"item_id": 1.5}\n', (), ":1: item_id 1.5; expected a string or a whole number"),
        ("i.jsonl", '{"item_id": "x", "title": "t"}\n', ("brand",), "no column 'brand'; found title"),
    ],
)
def test_bad_items_are_refused(prepared, tmp_path, name, content, columns, part):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = f"table:{FIXTURES}/table/small.csv"
    assert part in refused(prepared, tmp_path, source, items=tmp_path / name, text_columns=columns)


def test_text_columns_need_something_that_describes_items(prepared, tmp_path):
    message = refused(prepared, tmp_path, f"table:{FIXTURES}/table/small.csv", text_columns=("title",))
    assert "--items" in message
