"""Items that arrive later: read as the dataset's columns are, whatever else their file holds."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.new_items import NewItems, read_new_items
from dynrec_jax.errors import DataError

from .logs import made

ROWS = [("a", "x", 1), ("a", "y", 2), ("b", "x", 3)]
OLD = [
    {"item_id": "x", "title": "lamp", "tags": ["red", "old"], "v": [0.5, 1.0]},
    {"item_id": "y", "title": "chair", "tags": ["red"], "v": [0.0, 2.5]},
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("shop")
    return made(folder, ROWS, items=write(folder / "items.jsonl", OLD))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(dataset: Dataset, path: Path, rows: list[dict], *needed: str, graph: bool = False) -> NewItems:
    return read_new_items(write(path / "new.jsonl", rows), dataset, set(needed), graph)


def test_values_are_of_the_datasets_kinds_where_they_can_be(dataset, tmp_path):
    """Alone, `[1, 2]` would be a set and `"red"` a text."""
    new = read(dataset, tmp_path, [{"item_id": "n", "v": [1, 2], "tags": "red"}], "v", "tags")
    assert new.table.to_pylist() == [
        {"index": 3, "item_id": "n", "title": None, "tags": ["red"], "v": [1.0, 2.0]}
    ]


@pytest.mark.parametrize(
    ("row", "needed", "part"),
    [
        ({"v": ["a"]}, "v", "column 'v' is set; expected vector, as the dataset's"),
        ({"tags": [0.5]}, "tags", "column 'tags' is vector; expected set"),
        ({"title": ["a"]}, "title", "column 'title' is set; expected text"),
        ({"title": None}, "title", "none of its 1 new items has anything in title"),
    ],
)
def test_values_of_another_kind_are_refused(row, needed, part, dataset, tmp_path):
    with pytest.raises(DataError, match=r"new\.jsonl") as caught:
        read(dataset, tmp_path, [{"item_id": "n", **row}], needed)
    assert part in str(caught.value)


def test_what_the_model_does_not_read_is_not_looked_at(dataset, tmp_path):
    rows = [{"item_id": "n", "title": "sofa", "v": "odd", "index": 7, "w": [0.5]}, {"item_id": "m", "w": "x"}]
    new = read(dataset, tmp_path, rows, "title")
    assert new.table.column("title").to_pylist() == [None, "sofa"]
    assert new.table.column("v").null_count == 2
    # With triples alone no column is read at all.
    assert read(dataset, tmp_path, rows, graph=True).table.column("item_id").to_pylist() == ["m", "n"]


def test_what_is_known_repeated_or_empty_is_counted(dataset, tmp_path):
    rows = [
        {"item_id": "x", "title": "lamp"},
        {"item_id": "n", "title": "sofa"},
        {"item_id": "n", "title": "couch"},
        {"item_id": "m", "title": ""},
    ]
    new = read(dataset, tmp_path, rows, "title")
    assert (new.known, new.repeated, new.bare) == (1, 1, 1)
    assert new.table.column("title").to_pylist() == [None, "sofa"]


def test_parquet_has_its_own_types(dataset, tmp_path):
    path = tmp_path / "new.parquet"
    pq.write_table(pa.table({"item_id": ["n"], "v": pa.array([[1.0, 2.0]], pa.list_(pa.float64()))}), path)
    assert read_new_items(path, dataset, {"v"}).table.column("v").to_pylist() == [[1.0, 2.0]]
