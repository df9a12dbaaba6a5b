"""Columns of the items by their kinds, and the triples, through prepare."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ibis.backends.duckdb import Backend

from dynrec_jax.data.dataset import Dataset, open_dataset
from dynrec_jax.data.engine import engine
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.data.sources.items import read_items
from dynrec_jax.data.sources.triples import read_triples
from dynrec_jax.errors import DataError, UserError

from . import reference
from .logs import made

ROWS = [("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("b", "z", 4)]


def described(dataset: Dataset) -> dict[str, dict]:
    return {row.pop("item_id"): row for row in dataset.items_table().drop_columns("index").to_pylist()}


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def con(tmp_path) -> Iterator[Backend]:
    with engine(tmp_path) as connection:
        yield connection


def unread(read: Callable[[], object]) -> str:
    """What reading a bad file says."""
    with pytest.raises(DataError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(tmp_path: Path, **options) -> str:
    """What prepare says of a bad file; nothing is left."""
    message = unread(lambda: made(tmp_path, ROWS, **options))
    assert not list(tmp_path.glob("out")), "something is left"
    assert not list(tmp_path.glob(".out*")), "something is left"
    return message


# ------------------------------------------------------------------------ kinds


def test_json_columns_are_text_sets_or_vectors_by_their_values(tmp_path):
    rows = [
        {"item_id": "x", "title": "Lamp &amp; <b>oil</b>", "tags": ["b", "", "a", "b", None], "ids": [3, 1]},
        {"item_id": "y", "title": " ", "tags": "alone", "ids": [], "image": [1, 0], "price": 2.5},
        {"item_id": "z", "ids": ["é"], "image": [0.5, -2.25], "price": {"eur": 3}},
    ]
    dataset = made(tmp_path, ROWS, items=lines(tmp_path / "items.jsonl", rows))
    assert described(dataset) == {
        "x": {"title": "Lamp & oil", "tags": ["b", "a"], "ids": ["3", "1"], "image": None, "price": None},
        "y": {"title": None, "tags": ["alone"], "ids": None, "image": [1.0, 0.0], "price": "2.5"},
        "z": {"title": None, "tags": None, "ids": ["é"], "image": [0.5, -2.25], "price": '{"eur": 3}'},
    }
    kinds = {"title": "text", "tags": "set", "ids": "set", "image": "vector", "price": "text"}
    assert dataset.item_column_kinds == dataset.info["item_column_kinds"] == kinds
    assert [str(dataset.items_table().schema.field(name).type.value_type) for name in ("tags", "image")] == [
        "string",
        "float",
    ]


@pytest.mark.parametrize("wide", [False, True])
def test_parquet_columns_are_what_their_types_say(tmp_path, wide):
    vector = pa.list_(pa.float64(), 2) if wide else pa.large_list(pa.float32())
    table = pa.table(
        {
            "item_id": [1, 2],
            "brand": pa.array([["Lux", "Lux"], []], pa.large_list(pa.string())),
            "genre": pa.array([None, [7, 8]], pa.list_(pa.int16())),
            "audio": pa.array([[1, 2.5], None], vector),
            "odd": pa.array([[[1]], [[2], [3]]]),
        }
    )
    pq.write_table(table, tmp_path / "items.parquet")
    dataset = made(tmp_path, [("a", "1"), ("a", "2")], items=tmp_path / "items.parquet")
    assert described(dataset) == {
        "1": {"brand": ["Lux"], "genre": None, "audio": [1.0, 2.5], "odd": "1"},
        "2": {"brand": None, "genre": ["7", "8"], "audio": None, "odd": "2, 3"},
    }
    kinds = {"brand": "set", "genre": "set", "audio": "vector", "odd": "text"}
    assert dataset.item_column_kinds == kinds


@pytest.mark.parametrize("form", ["{}", "\ufeff{}\n", "indent", "gzip"])
def test_an_object_of_ids_and_lists(tmp_path, form):
    mapping = {"z": [12, 5], "x": ["5"], "unseen": [1], "y": []}
    text = json.dumps(mapping, indent=1) if form == "indent" else form.replace("{}", json.dumps(mapping))
    if form == "gzip":
        (tmp_path / "map.json").write_bytes(gzip.compress(json.dumps(mapping).encode()))
    else:
        (tmp_path / "map.json").write_text(text)
    dataset = made(tmp_path, ROWS, items=tmp_path / "map.json")
    found = {item: row["attributes"] for item, row in described(dataset).items()}
    assert found == {"x": ["5"], "y": None, "z": ["12", "5"]}
    assert dataset.item_column_kinds == {"attributes": "set"}
    assert "items_without_text" not in dataset.info["dropped"]


def test_later_rows_give_what_the_first_lacks(tmp_path):
    rows = [
        {"item_id": "x", "title": "<br>", "tags": [], "image": None},
        {"item_id": "y", "title": "first", "tags": ["1"]},
        {"item_id": "x", "title": "second", "brand": "Lux"},
        {"item_id": "y", "title": "other", "tags": ["2"], "image": [0.5]},
        {"item_id": "x", "title": "third", "tags": ["3"], "image": [2.5], "brand": "Neu"},
    ]
    dataset = made(tmp_path, ROWS, items=lines(tmp_path / "items.jsonl", rows))
    assert described(dataset) == {
        "x": {"title": "second", "tags": ["3"], "image": [2.5], "brand": "Lux"},
        "y": {"title": "first", "tags": ["1"], "image": [0.5], "brand": None},
        "z": {"title": None, "tags": None, "image": None, "brand": None},
    }
    counts = {"items_without_row": 1, "item_rows_repeated": 3, "items_without_text": 1}
    assert {name: dataset.info["dropped"][name] for name in counts} == counts


def test_half_a_character_does_not_stop_a_file(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"item_id": "x", "title": "cut \\ud83d", "tags": ["\\uDE00"]}\n')
    dataset = made(tmp_path, ROWS, items=tmp_path / "items.jsonl")
    assert described(dataset)["x"] == {"title": "cut ?", "tags": ["?"]}


def test_names_that_the_engine_might_use_are_columns_like_others(tmp_path):
    rows = [{"item_id": "x", "place": "here", "nth": "1"}, {"item_id": "x", "place": "there"}]
    dataset = made(tmp_path, ROWS, items=lines(tmp_path / "items.jsonl", rows))
    assert described(dataset)["x"] == {"place": "here", "nth": "1"}


def test_content_is_the_hash_that_its_definition_gives(tmp_path):
    rows = [
        {"item_id": "y", "title": "ü", "tags": ["b", "é"], "image": [0.5, 3]},
        {"item_id": "x", "tags": [""]},
    ]
    (tmp_path / "kg.tsv").write_text("y\tnear\tx\nx\tby\té\n")
    log = [("a", "x", 5), ("a", "y", 6)]
    items = lines(tmp_path / "items.jsonl", rows)
    dataset = made(tmp_path, log, items=items, triples=tmp_path / "kg.tsv", shards=1)
    history = [("a", [1, 2], [5, 6], None)]
    table = [(1, "x", None, None, None), (2, "y", "ü", ["b", "é"], [0.5, 3.0])]
    triples = reference.table_hash(["head", "relation", "tail"], [("x", "by", "é"), ("y", "near", "x")])
    columns = ("title", "tags", "image")
    assert dataset.content == reference.content([history], table, [], columns, triples=triples)
    plain = made(tmp_path, log, "plain", items=items, text_columns=("title",), shards=1)
    assert plain.content == reference.content([history], [row[:3] for row in table], [], ("title",))


def test_folders_that_tell_no_kinds_hold_text(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\nx,Lamp\n")
    dataset = made(tmp_path, ROWS, items=tmp_path / "items.csv")
    info = {key: value for key, value in dataset.info.items() if key != "item_column_kinds"}
    (dataset.path / "dataset.json").write_text(json.dumps(info))
    old = open_dataset(dataset.path)
    assert (old.item_column_kinds, old.triples()) == ({"title": "text"}, None)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"v": [0.5, 1]}, {"v": [0.5]}], [":2: column 'v' has a vector of 1 numbers; expected 2", ":1"]),
        ([{"v": [0.5]}, {}, {"v": [float("nan")]}], [":3: column 'v' has a vector with nan in it"]),
        ([{"v": [0.5, float("inf")]}], [":1: column 'v' has a vector with inf"]),
        ([{"v": [0.5, 1e39]}], [":1: column 'v' has a vector with 1e+39"]),
        ([{"v": [0.5, None]}], [":1: column 'v' has a vector with None"]),
        ([{"v": [0.5, 10**30, 10**400]}], [":1: column 'v' has a vector with inf"]),
        ([{"v": [0.5]}, {"v": "text"}], [":2: column 'v' has a string", "a list of numbers in", ":1;"]),
        ([{"v": ["a"]}, {"v": [0.5]}], [":1: column 'v' has a list of strings, but a list of numbers"]),
        ([{"v": ["a"]}, {"v": {"b": 1}}], [":2: column 'v' has a value that is neither text nor a list"]),
        ([{"v": "a"}, {"v": ["a"]}, {"v": 0.5}], [":3: column 'v' has a value", ":2;"]),
    ],
)
def test_columns_that_mix_kinds_or_hold_no_numbers_are_refused(con, tmp_path, rows, parts):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"item_id": "x", **row}) + "\n" for row in rows))
    message = unread(lambda: read_items(con, path, None))
    assert str(path) in message
    assert [part for part in parts if part not in message] == []


def test_a_column_that_is_not_kept_is_not_judged(tmp_path):
    rows = [{"item_id": "x", "t": "a", "v": [0.5]}, {"item_id": "y", "t": "b", "v": "c"}]
    dataset = made(tmp_path, ROWS, items=lines(tmp_path / "items.jsonl", rows), text_columns=("t",))
    assert dataset.item_column_kinds == {"t": "text"}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ([[1.0, 2.0], None, [1.0]], ": row 3: column 'v' has a vector of 1 numbers; expected 2"),
        ([None, [1.0, float("inf")], [1.0]], ": row 3: column 'v' has a vector of 1 numbers"),
        ([None, [1.0, float("nan")], [1.0, 2.0]], ": row 2: column 'v' has a vector with nan"),
    ],
)
def test_bad_vectors_of_parquet_are_refused(con, tmp_path, values, part):
    pq.write_table(pa.table({"item_id": ["x", "y", "z"], "v": values}), tmp_path / "items.parquet")
    assert part in unread(lambda: read_items(con, tmp_path / "items.parquet", None))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"x": [1], "y": "b"}', ":1: no item_id"),
        ('{\n"x": [1],\n"y": {"a": 1}\n}', "item 'y' has no list"),
        ('{\n"x": [1],\n', ":1: not JSON"),
        (
            '{"x": [1.5], "y": [1.5, 2]}',
            "item 'y': column 'attributes' has a vector of 2 numbers; expected 1",
        ),
        ("{}", ":1: no item_id"),
    ],
)
def test_bad_objects_of_lists_are_refused(con, tmp_path, content, part):
    (tmp_path / "map.json").write_text(content)
    assert part in unread(lambda: read_items(con, tmp_path / "map.json", None))


def test_packed_json_lines_that_are_cut_short_are_refused(tmp_path):
    rows = "".join(json.dumps({"item_id": str(i), "title": f"{i * i}"}) + "\n" for i in range(9_000))
    packed = gzip.compress(rows.encode())
    (tmp_path / "items.jsonl.gz").write_bytes(packed)
    log = [("a", "7")]
    assert described(made(tmp_path, log, "whole", items=tmp_path / "items.jsonl.gz"))["7"]["title"] == "49"
    (tmp_path / "items.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert "items.jsonl.gz: cut short or damaged" in refused(tmp_path, items=tmp_path / "items.jsonl.gz")


def test_a_column_without_a_name_is_left_out(tmp_path):
    """As pandas writes the index of a frame."""
    (tmp_path / "items.csv").write_text(",item_id,title\n0,x,lamp\n1,y,chair\n")
    assert described(made(tmp_path, ROWS, items=tmp_path / "items.csv"))["y"] == {"title": "chair"}


def test_no_number_is_no_text(tmp_path):
    rows = [{"item_id": "x", "title": float("nan"), "year": float("inf")}, {"item_id": "y", "title": "lamp"}]
    dataset = made(tmp_path, ROWS, items=lines(tmp_path / "items.jsonl", rows))
    assert described(dataset)["x"] == {"title": None, "year": None}
    assert dataset.info["dropped"]["items_without_text"] == 2  # x and z


def test_the_words_of_a_set_are_without_space_around_them(tmp_path):
    rows = [{"item_id": "x", "tags": [" red", "red ", "dark  blue\n"]}]
    items = lines(tmp_path / "items.jsonl", rows)
    assert described(made(tmp_path, ROWS, items=items))["x"] == {"tags": ["red", "dark blue"]}


def test_items_of_another_log_are_refused(tmp_path):
    items = lines(tmp_path / "items.jsonl", [{"item_id": f"no{i}", "title": "t"} for i in range(3)])
    assert "none of its 3 items is in the log; they are such as 'no" in refused(tmp_path, items=items)


@pytest.mark.parametrize("name", ["items", "triples"])
def test_files_that_are_not_there_are_told_before_the_log_is_read(name, tmp_path):
    for value, part in (
        ("nowhere.csv", f"no such file; expected a file (--{name})"),
        ("", f"--{name}=: is empty"),
    ):
        with pytest.raises(UserError, match=re.escape(part)):
            prepare(PrepareOptions(source="table:no_log.csv", out=tmp_path / "out", **{name: value}))


def test_long_fields_and_odd_line_ends_of_csv(con, tmp_path):
    path = tmp_path / "items.csv"
    path.write_text(f"item_id,title\nx,{'long ' * 40_000}\n,none\n")
    assert "items.csv:3: no item_id" in unread(lambda: read_items(con, path, None))
    path.write_bytes(b"item_id,title\rx,lamp\r")
    assert "items.csv:1: " in unread(lambda: read_items(con, path, None))


# ---------------------------------------------------------------------- triples

TRIPLES = [("x", "by", "Lux"), ("y", "near", "x"), ("Lux", "in", "né"), ("x", "by", "Lux")]


def write_triples(path: Path, form: str) -> Path:
    if form == "parquet":
        columns = zip(*TRIPLES, strict=True)
        head, relation, tail = (pa.array(column) for column in columns)
        pq.write_table(pa.table({"tail": tail, "head": head.dictionary_encode(), "relation": relation}), path)
        return path
    separator = "," if form == "csv" else "\t"
    header = {
        "csv": "head,relation,tail",
        "tsv": "tail\thead\trelation",
        "kg": "head_id:token\trelation_id:token\ttail_id:token",
    }.get(form)
    rows = [(t, h, r) for h, r, t in TRIPLES] if form == "tsv" else TRIPLES
    text = "\n".join([*([header] if header else []), *(separator.join(row) for row in rows)])
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize("form", ["csv", "tsv", "kg", "bare", "parquet"])
def test_triples_are_kept_once_and_sorted(tmp_path, form):
    path = write_triples(tmp_path / "kg", form)
    dataset = made(tmp_path, ROWS, triples=path)
    table = open_dataset(dataset.path).triples()
    assert [str(field.type) for field in table.schema] == ["string"] * 3
    assert table.to_pylist() == [
        {"head": head, "relation": relation, "tail": tail} for head, relation, tail in sorted(set(TRIPLES))
    ]
    assert dataset.info["triples"] == {
        "count": 3,
        "duplicates": 1,
        "relations": ["by", "in", "near"],
        "heads_in_catalogue": 2,
        "tails_in_catalogue": 1,
        "items": 2,
        "entities": 2,
    }
    assert "triples/part-00000-of-00001.parquet" in dataset.info["files"]


def test_quotes_between_tabs_are_letters(tmp_path):
    (tmp_path / "kg").write_text('x\tby\tthe "Lux\n')
    assert made(tmp_path, ROWS, triples=tmp_path / "kg").triples().to_pylist()[0]["tail"] == 'the "Lux'


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("head,relation\nx,by\n", "no column 'tail'; found head, relation"),
        ("head\trelation\nx\tby\n", "no column 'tail'"),
        ("head_id:token\trel:token\ttail_id:token\nx\tby\ty\n", "no column 'relation'"),
        ("head,relation,tail,tail_id\nx,by,y,z\n", "2 columns 'tail'"),
        ("x\tby\n", ":1: 2 fields; expected 3, or a header"),
        ("x by y\n", "no column 'head'; found x by y"),
        ("head,relation,tail\nx,by,y\n\nx,,y\n", ":4: no relation"),
        ("x\tby\ty\n\nx\tby\t\n", ":3: no tail"),
        ("x\tby\ty\nx\tby\n", ":2: 2 fields; expected 3"),
        ("head,relation,tail\n", "no rows; expected at least one triple"),
        ("", "is empty"),
        (b"x\tby\t\xe9\n", ":1: byte 0xe9 is not UTF-8"),
        (None, "no such file"),
    ],
)
def test_bad_triples_are_refused(con, tmp_path, content, part):
    path = tmp_path / "kg"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = unread(lambda: read_triples(con, path))
    assert str(path) in message
    assert part in message


def test_triples_that_cannot_be_meant_are_refused(tmp_path):
    path = tmp_path / "kg"
    path.write_text("head,relation,tail\nX,by,y1\nq,by,r\n")
    message = refused(tmp_path, triples=path)
    assert f"{path}: none of 2 triples has an item of the catalogue" in message
    path.write_text("".join(f"x\tr{i}\ty\n" for i in range(10_001)))
    assert f"{path}: more than 10,000 relations, such as 'r0'" in refused(tmp_path, triples=path)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"relation": ["by", None]}, "kg.parquet: row 2: no relation"),
        ({"tail": [0.5, 1.5]}, "column 'tail' has type double; expected strings or whole numbers"),
    ],
)
def test_bad_triples_of_parquet_are_refused(con, tmp_path, changes, part):
    columns = {"head": ["x", "y"], "relation": ["by", "by"], "tail": ["y", "z"], **changes}
    pq.write_table(pa.table(columns), tmp_path / "kg.parquet")
    assert part in unread(lambda: read_triples(con, tmp_path / "kg.parquet"))


# ------------------------------------------------------------------- real files


def test_attributes_of_a_real_catalogue(tmp_path, shared_data):
    folder = shared_data / "amazon-beauty"
    options = PrepareOptions(
        source=f"sequences:{folder}/sequences.txt",
        out=tmp_path / "out",
        items=folder / "item2attributes.json",
    )
    dataset = prepare(options)
    given = json.loads((folder / "item2attributes.json").read_text())
    found = {item: row["attributes"] for item, row in described(dataset).items()}
    assert found == {item: list(dict.fromkeys(map(str, given[item]))) for item in found}


@pytest.mark.parametrize("header", ["head_id\trelation_id\ttail_id", "Head\tRelation\tTail"])
def test_a_header_of_triples_may_be_written_in_other_ways(con, header, tmp_path):
    path = tmp_path / "kg.tsv"
    path.write_text(f"{header}\nx\tby\ty\n")
    assert read_triples(con, path).to_pyarrow().to_pylist() == [{"head": "x", "relation": "by", "tail": "y"}]
