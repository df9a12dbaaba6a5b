"""The sources `amazon` and `mind`, from their files to the dataset folder."""

import gzip
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dynrec_jax.data.clean import Filters
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.data.sources.amazon_items import described as columns_of
from dynrec_jax.data.sources.amazon_items import python_literal, records
from dynrec_jax.data.sources.mind import parts
from dynrec_jax.data.sources.source import Columns
from dynrec_jax.errors import ConfigError, DataError

from .reference import histories

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def prepared(tmp_path):
    def make(source: str, **options) -> Dataset:
        return prepare(PrepareOptions(source=source, out=tmp_path / "out", shards=2, **options))

    return make


@pytest.fixture
def copied(tmp_path):
    """Copies a folder of fixtures to change it."""

    def copy(name: str) -> Path:
        return shutil.copytree(FIXTURES / name, tmp_path / name)

    return copy


def described(dataset: Dataset) -> dict[str, tuple]:
    table = dataset.items_table().drop_columns("index")
    return {row.pop("item_id"): tuple(row.values()) for row in table.to_pylist()}


def refused(prepared, source: str, kind=DataError, **options) -> str:
    with pytest.raises(kind) as caught:
        prepared(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------- amazon

COLUMNS = {"title": "text", "brand": "text", "description": "text", "categories": "set"}
LAMPS = {
    "0001": (
        'Ann\'s "Reading" Lamp',
        "Lux",
        "A lamp. Takes a 'small' bulb, 10 \\d",
        ["Home & Garden", "Lamps", "Desk Lamps"],
    ),
    "B00X": (None, None, None, ["Home & Garden"]),
}


@pytest.mark.parametrize("path", ["amazon-2014", "amazon-2014/reviews_Lamps_5.json"])
def test_reviews_of_2014_with_python_literals(prepared, path):
    dataset = prepared(f"amazon:{FIXTURES}/{path}")
    assert histories(dataset.path) == {
        "A1": [("B00X", 1299974400, None), ("0001", 1300060800, None)],
        "A2": [("0001", 1300147200, None)],
    }
    assert described(dataset) == LAMPS
    assert dataset.item_column_kinds == COLUMNS
    assert dataset.info["dropped"]["items_without_text"] == 1
    assert (dataset.source, dataset.info["source_time_unit"]) == ("amazon:reviews_Lamps_5.json", "seconds")


@pytest.mark.parametrize("path", ["amazon-2018", "amazon-2018/Office_5.json.gz"])
def test_packed_reviews_of_2018(prepared, path):
    dataset = prepared(f"amazon:{FIXTURES}/{path}")
    assert histories(dataset.path) == {
        "U1": [("B2", 1514764800, None), ("B1", 1514851200, None)],
        "U2": [("B1", 1514851200, None)],
    }
    # The first row of B2 has a piece of program for a title; its second row gives what that lacks.
    assert described(dataset) == {
        "B1": ("Oak Desk", "Holz", "A desk. Of oak.", ["Office Products", "Desks & Tables"]),
        "B2": ("Pen, 😀", "Stylo", "late", ["Office Products"]),
    }
    assert dataset.info["dropped"]["item_rows_repeated"] == 1


@pytest.mark.parametrize("path", ["amazon-2023", "amazon-2023/All_Toys.jsonl"])
def test_reviews_of_2023_by_families_of_variants(prepared, path):
    dataset = prepared(f"amazon:{FIXTURES}/{path}")
    assert histories(dataset.path) == {
        "AE1": [("B0Q", 1588687700, None), ("B0P", 1588687728, None)],
        "AE2": [("B0P", 1588687729, None)],
    }
    assert described(dataset) == {
        "B0P": ("Squeaky Bone", "Wuff & Co", "For dogs. Not for cats < 1 year", ["Toys", "Dogs"]),
        "B0Q": (None, None, None, None),
    }
    assert dataset.info["source_time_unit"] == "milliseconds"


def test_stars_are_ratings(prepared):
    dataset = prepared(f"amazon:{FIXTURES}/amazon-2014", filters=Filters(min_rating=4))
    assert histories(dataset.path).keys() == {"A1"}


def test_a_meta_file_may_be_named_for_any_source(prepared, copied, tmp_path):
    folder = copied("amazon-2014")
    other = folder.rename(tmp_path / "elsewhere") / "meta_Lamps.json"
    (tmp_path / "log.txt").write_text("ann B00X 0001\n")
    options = {"items": other, "text_columns": ("categories", "title")}
    dataset = prepared(f"sequences:{tmp_path}/log.txt", **options)
    assert described(dataset) == {item: (columns[3], columns[0]) for item, columns in LAMPS.items()}
    (tmp_path / "out").rename(tmp_path / "first")
    # Named with --items, it stands above those in the folder, of which there are two.
    (other.parent / "meta_2.json").write_text("{broken")
    assert described(prepared(f"amazon:{tmp_path}/elsewhere", items=other)) == LAMPS
    (tmp_path / "out").rename(tmp_path / "second")
    (tmp_path / "own.csv").write_text("item_id,title\n0001,Mine\n")
    dataset = prepared(f"amazon:{tmp_path}/elsewhere", items=tmp_path / "own.csv")
    assert described(dataset) == {"0001": ("Mine",), "B00X": (None,)}


def test_files_are_told_by_what_is_in_them(prepared, copied):
    folder = copied("amazon-2014")
    (folder / "meta_Lamps.json").rename(folder / "products.json")
    (folder / "notes.json").write_text('{"made": "by hand"}\n')
    (folder / "readme.txt").write_text("no JSON")
    assert described(prepared(f"amazon:{folder}")) == LAMPS


def test_without_a_meta_file_items_have_no_columns(prepared, copied):
    folder = copied("amazon-2014")
    (folder / "meta_Lamps.json").rename(folder / "meta_Lampshades.json")
    dataset = prepared(f"amazon:{folder}/reviews_Lamps_5.json")
    assert (dataset.users, dataset.info["item_columns"]) == (2, [])


GOOD = '{"reviewerID": "a", "asin": "x", "overall": 5, "unixReviewTime": 1300000000}\n'
PACKED = gzip.compress(GOOD.encode(), mtime=0)  # a test's name must not tell when it was collected


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (GOOD + "{'reviewerID': 'b', \n", ":2: not JSON"),
        (GOOD + "[1]\n", ":2: list; expected an object"),
        (GOOD + "__import__('os')\n", ":2: not JSON"),
        (GOOD + GOOD.replace('"x"', '["x"]'), ":2: asin ['x']; expected a string or a whole number"),
        (GOOD + GOOD.replace('"a"', "1.5"), ":2: reviewerID 1.5"),
        (GOOD + GOOD.replace('"reviewerID": "a", ', ""), ":2: first of 1 rows", ),
        (GOOD + "\n" + GOOD.replace("1300000000", '"soon"'), ":3: time 'soon' is not a number"),
        (GOOD + GOOD.replace("5", '"good"'), ":2: rating 'good' is not a number"),
        (GOOD.encode() + b'{"reviewerID": "\xe9"}\n', ":2: byte 0xe9 is not UTF-8"),
        ('{"asin": "x", "title": "A lamp"}\n', "fields asin, title; expected reviews, with reviewerID"),
        ("\n", "fields none; expected reviews"),
        ("", "is empty"),
        (PACKED[:-9], "cut short or damaged"),
        (PACKED[:10] + b"\xff" * 40, "cut short or damaged"),
        (b"\x1f\x8b" + b"x" * 40, "cut short or damaged"),
        (None, "no such file"),
    ],
)  # fmt: skip
def test_bad_reviews_are_refused_with_the_line(prepared, tmp_path, rows, part):
    path = tmp_path / "Lamps_5.json"
    if rows is not None:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    message = refused(prepared, f"amazon:{path}")
    assert str(path) in message
    assert part in message


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ('{"asin": "x"}\n{"asin": \n', ":2: not JSON"),
        ('{"asin": "x"}\n{"title": "t"}\n', ":2: no parent_asin or asin"),
        ('{"asin": 1.5}\n', ":1: asin 1.5; expected a string"),
        ("\n", "no rows; expected at least one item"),
        ("", "is empty"),
    ],
)
def test_bad_meta_files_are_refused_with_the_line(prepared, tmp_path, rows, part):
    (tmp_path / "Lamps_5.json").write_text(GOOD)
    (tmp_path / "meta_Lamps.json").write_text(rows)
    message = refused(prepared, f"amazon:{tmp_path}/Lamps_5.json")
    assert f"{tmp_path}/meta_Lamps.json" in message
    assert part in message


def test_a_packed_file_is_refused_that_breaks_off_after_many_lines(prepared, tmp_path):
    rows = "".join(GOOD.replace('"a"', f'"{i * i}"') for i in range(20_000))
    packed = gzip.compress(rows.encode())
    (tmp_path / "Lamps.json.gz").write_bytes(packed[: len(packed) // 2])
    assert "Lamps.json.gz: cut short" in refused(prepared, f"amazon:{tmp_path}/Lamps.json.gz")


def test_folders_that_leave_a_choice_are_refused(prepared, tmp_path):
    assert "expected one file of reviews, found none" in refused(prepared, f"amazon:{tmp_path}")
    (tmp_path / "a.json").write_text(GOOD)
    (tmp_path / "meta_a.json").write_text('{"asin": "x"}\n')
    (tmp_path / "meta_a.json.gz").write_bytes(gzip.compress(b'{"asin": "x"}\n'))
    for path in (tmp_path, tmp_path / "a.json"):
        message = refused(prepared, f"amazon:{path}")
        assert "meta_a.json, meta_a.json.gz" in message
        assert "--items" in message
    (tmp_path / "b.json").write_text(GOOD)
    assert "found a.json, b.json; name the file" in refused(prepared, f"amazon:{tmp_path}")


@pytest.mark.parametrize("text", ["len('a')", "f()", "[x for x in 'a']", "(" * 20_000, "a = 1"])
def test_nothing_of_a_literal_is_executed(text):
    assert python_literal(text) is None


@pytest.mark.parametrize("title", ["{'a', 'b'}", "b'a'", "{(1, 2): 3}", "2j"])
def test_what_json_has_not_is_refused_in_a_literal(title, tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(f"{{'asin': 'x', 'title': {title}}}\n")
    with pytest.raises(DataError, match=r"meta\.json:1: not JSON"):
        list(records(path))


def test_characters_of_literals_are_whole(tmp_path):
    text = "{'asin': 'x', 'title': u'\\ud83d\\ude00', 'brand': 'a\\U0000d83d'}\n"
    (tmp_path / "meta.json").write_text(text)
    ((_, row),) = records(tmp_path / "meta.json")
    assert (row["title"], row["brand"]) == ("😀", "a?")


def test_fields_that_stand_for_others():
    row = {"asin": "x", "brand": "&nbsp; ", "store": "Lux", "description": [], "features": ["red", "old"]}
    assert columns_of(Path("meta"), 1, row) == ("x", None, "Lux", "red old", None)


# ------------------------------------------------------------------------- mind


@pytest.mark.parametrize(("name", "kept"), [("latest", True), ("MINDsmall_test", False), ("test", False)])
def test_splits_that_tell_no_clicks(name, kept, tmp_path):
    for folder in ("MINDsmall_train", name):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "behaviors.tsv").write_text("")
    assert (tmp_path / name in parts(tmp_path)) is kept


def at(day: int, hour: int, minute: int = 0, second: int = 0) -> int:
    return int(datetime(2019, 11, day, hour, minute, second, tzinfo=UTC).timestamp())


CLICK, HISTORY = 1, 2
NEWS = {
    "U1": [
        ("N3", at(14, 23), HISTORY),
        ("N1", at(14, 23), HISTORY),
        ("N5", at(14, 23), CLICK),
        ("N4", at(15, 9, 55, 12), CLICK),
    ],
    "U2": [("N5", at(15, 12, 5), CLICK), ("N3", at(15, 12, 5), CLICK)],
    "U3": [("N1", at(16, 0), HISTORY)],
}
DESCRIBED = {
    "N1": ('Keeper "saves" & wins', "A late save", ["sports", "football"]),
    "N3": ("Bread at home", "Flour", ["food", "baking"]),
    "N4": (None, None, ["food"]),
    "N5": ("Storm ahead", "Wind", ["weather", "storm"]),
}


def test_news(prepared):
    dataset = prepared(f"mind:{FIXTURES}/mind")
    assert histories(dataset.path) == NEWS
    assert dataset.event_types == ["click", "history"]
    assert described(dataset) == DESCRIBED
    assert dataset.item_column_kinds == {"title": "text", "abstract": "text", "categories": "set"}
    assert (dataset.source, dataset.info["ties"]) == ("mind:mind", "source")


def test_news_without_event_types(prepared):
    dataset = prepared(f"mind:{FIXTURES}/mind", columns=Columns(event=""))
    assert dataset.event_types == []
    assert [event[0] for event in histories(dataset.path)["U1"]] == ["N3", "N1", "N5", "N4"]


def test_splits_of_news_are_one_log(prepared, copied, tmp_path):
    folder = copied("mind")
    (tmp_path / "all").mkdir()
    train = folder.rename(tmp_path / "all" / "train")
    for name, line in (
        ("dev", "9\tU2\t11/17/2019 1:00:00 PM\tN5 N3\tN1-1\n9\tU5\t11/17/2019 1:00:00 AM\tN2\tN3-1\n"),
        ("test", "9\tU2\t11/18/2019 1:00:00 PM\tN5 N3\tN1 N2\n"),
    ):
        shutil.copytree(train, tmp_path / "all" / name)
        (tmp_path / "all" / name / "behaviors.tsv").write_text(line)
    dataset = prepared(f"mind:{tmp_path}/all")
    assert histories(dataset.path) == NEWS | {
        "U2": [*NEWS["U2"], ("N1", at(17, 13), CLICK)],
        "U5": [("N2", at(17, 1), HISTORY), ("N3", at(17, 1), CLICK)],
    }
    assert dataset.info["dropped"]["item_rows_repeated"] == 5


def test_the_order_of_a_history_is_not_left_to_chance(prepared):
    message = refused(prepared, f"mind:{FIXTURES}/mind", ConfigError, ties="random:1")
    assert "--ties=random:1" in message
    message = refused(prepared, f"mind:{FIXTURES}/mind", ConfigError, columns=Columns(user="who"))
    assert "--user_column" in message


LINE = "1\tU1\t11/15/2019 9:55:12 AM\tN3\tN4-1 N5-0\n"


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (LINE + LINE.replace("11/15", "15/11"), ":2: time '15/11/2019 9:55:12 AM'; expected as in"),
        (LINE + "\n" + LINE.replace(" AM", ""), ":3: time '11/15/2019 9:55:12'"),
        (LINE + LINE.replace("N5-0", "N5"), ":2: impression 'N5' has no label"),
        (LINE + LINE.replace("U1", ""), ":2: first of 2 rows"),
        (LINE + "2\tU1\n", ":2: 2 fields; expected 5"),
        (LINE.encode() + b"\xff", ":2: byte 0xff is not UTF-8"),
        ("", "is empty"),
        (LINE.replace("N3", "").replace("N4-1", ""), "no rows; expected at least one event"),
    ],
)
def test_bad_behaviors_are_refused_with_the_line(prepared, copied, lines, part):
    folder = copied("mind")
    (folder / "behaviors.tsv").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    message = refused(prepared, f"mind:{folder}")
    assert str(folder) in message
    assert part in message


def test_places_without_news_are_refused(prepared, copied, tmp_path):
    assert "no behaviors.tsv, neither in it" in refused(prepared, f"mind:{tmp_path}")
    assert "no such folder" in refused(prepared, f"mind:{tmp_path}/none")
    folder = copied("mind")
    (folder / "news.tsv").write_text("N1\tsports\n")
    assert "news.tsv:1: 2 fields; expected 8" in refused(prepared, f"mind:{folder}")
    (folder / "news.tsv").unlink()
    assert "news.tsv: no such file" in refused(prepared, f"mind:{folder}")
    (tmp_path / "items.json").write_text(json.dumps({"N1": ["a"]}))
    assert prepared(f"mind:{folder}", items=tmp_path / "items.json").info["item_columns"] == ["attributes"]
