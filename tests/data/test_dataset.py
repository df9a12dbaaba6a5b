import json
from pathlib import Path

import pyarrow as pa
import pytest

from dynrec_jax.data.content import TableHash
from dynrec_jax.data.dataset import Dataset, open_dataset, shard_of
from dynrec_jax.data.folder import new_folder
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.errors import DataError

from .reference import shard

FIXTURES = Path(__file__).parent / "fixtures"
ITEMS = "items/part-00000-of-00001.parquet"
PART = "interactions/part-00001-of-00002.parquet"


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    source = f"table:{FIXTURES}/table/small.csv"
    return prepare(PrepareOptions(source=source, out=tmp_path / "data", shards=2))


def test_what_was_written_is_what_is_opened(dataset):
    opened = open_dataset(str(dataset.path))
    opened.verify()
    assert opened == dataset
    assert (opened.users, opened.items, opened.events, opened.shards) == (2, 3, 4, 2)
    assert (opened.has_times, opened.has_events, opened.first_time) == (True, True, 1000000005)
    assert opened.item_ids() == pa.array(["NA", "x", "y,z"])
    assert opened.items_table().column_names == ["index", "item_id"]
    assert sum(opened.read_shard(s).num_rows for s in range(2)) == 2
    assert opened.source == "table:small.csv"


def test_nothing_but_the_dataset_is_left(dataset):
    files = {str(p.relative_to(dataset.path)) for p in dataset.path.rglob("*") if p.is_file()}
    assert files == {"dataset.json", *dataset.info["files"]}
    assert dataset.info["files"].keys() == {ITEMS, PART, PART.replace("00001-of", "00000-of")}
    assert [p.name for p in dataset.path.parent.iterdir()] == ["data"]


def test_the_rule_of_shards_is_sha256_by_big_ends():
    assert [shard_of(user, 7) for user in ("", "1", "ü", "001")] == [
        shard(u, 7) for u in ("", "1", "ü", "001")
    ]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_places_that_are_no_dataset(tmp_path):
    (tmp_path / "file").write_text("")
    assert "no such folder" in refused(tmp_path / "none")
    assert "is a file" in refused(tmp_path / "file")
    assert "has no dataset.json" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not readable as JSON"),
        ("[]", "format None"),
        ('{"format": 2}', "format 2; this version reads format 1"),
        ('{"format": 1}', "has no content, counts"),
    ],
)
def test_a_garbled_description(dataset, text, part):
    (dataset.path / "dataset.json").write_text(text)
    assert part in refused(dataset.path)


@pytest.mark.parametrize("name", [ITEMS, PART])
def test_a_file_that_is_missing_or_cut_short(dataset, name):
    path = dataset.path / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    message = refused(dataset.path)
    assert name in message
    assert f"{len(data) - 1} bytes; expected {len(data)}" in message
    assert "prepare the dataset again" in message
    path.unlink()
    assert f"{name}: is missing" in refused(dataset.path)


def test_a_byte_that_changed_is_found_by_verify(dataset):
    path = dataset.path / PART
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    opened = open_dataset(dataset.path)
    with pytest.raises(DataError, match=r"part-00001.*SHA-256"):
        opened.verify()


def test_a_shard_that_is_no_parquet_is_named(dataset):
    path = dataset.path / PART
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"part-00001.*SHA-256 is not the one") as caught:
        open_dataset(dataset.path).read_shard(1)
    assert "\n" not in str(caught.value)


def test_description_keeps_the_contract(dataset):
    info = json.loads((dataset.path / "dataset.json").read_text())
    assert info["format"] == 1
    assert info["event_types"] == ["buy", "view"]
    assert (info["ties"], info["time_unit"], info["pseudonymised"]) == ("source", "seconds", False)
    assert (info["first_time"], info["last_time"]) == (1000000005, 1000000010)
    assert (info["item_columns"], info["item_column_kinds"]) == ([], {})
    assert "triples" not in info


# -------------------------------------------------------------------- the hash


def rows(**changes) -> pa.Table:
    columns = {"id": ["a", "bc", None, ""], "n": [[1, 2], [], None, [3]], "i": [1, 2, None, 0]}
    columns |= {"s": [["a", "bc"], [], None, [""]], "f": [[0.5, 2], None, [3], []]}
    columns.update(changes)
    types = {"id": pa.string(), "n": pa.list_(pa.int32()), "i": pa.int64()}
    types |= {"s": pa.list_(pa.string()), "f": pa.list_(pa.float32())}
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})


def digest(*tables: pa.Table) -> str:
    made = TableHash(["id", "n", "i", "s", "f"])
    for table in tables:
        made.update(table)
    return made.hexdigest()


def test_batches_and_widths_do_not_change_a_hash():
    table = rows()
    cut = [table.slice(0, 1), table.slice(1, 2), table.slice(3)]
    wide = table.set_column(1, "n", table["n"].cast(pa.list_(pa.int64())))
    assert digest(*cut) == digest(table) == digest(pa.concat_tables(cut)) == digest(wide)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ["ab", "c", None, ""]},
        {"id": ["a", "bc", "", None]},
        {"id": ["bc", "a", None, ""]},
        {"n": [[1], [2], None, [3]]},
        {"n": [[1, 2], None, [], [3]]},
        {"n": [[2, 1], [], None, [3]]},
        {"i": [1, 2, 0, 0]},
        {"i": [1, 2, None, 1]},
        {"s": [["ab", "c"], [], None, [""]]},
        {"s": [["a"], ["bc"], None, [""]]},
        {"s": [["bc", "a"], [], None, [""]]},
        {"s": [["a", "bc"], [], [], [""]]},
        {"s": [["a", "bc"], [], None, []]},
        {"f": [[0.5], [2], [3], []]},
        {"f": [[0.25, 2], None, [3], []]},
    ],
)
def test_every_value_counts_in_a_hash(changes):
    assert digest(rows(**changes)) != digest(rows())


# ----------------------------------------------------------- all or nothing


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_is_gone(tmp_path, error):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(DataError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
