import errno
import hmac
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from dynrec_jax.data import prepare as preparation
from dynrec_jax.data.clean import Filters
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.engine import engine
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.data.write import shard_groups
from dynrec_jax.errors import ConfigError, DataError, MachineError
from dynrec_jax.verbs import prepare as verb

from . import reference
from .logs import expected, made, some_rows, write_csv

# ----------------------------------------------------------------- pseudonyms


def test_user_ids_become_keyed_and_appear_nowhere(tmp_path):
    key = bytes(range(20))
    (tmp_path / "key").write_bytes(key)
    rows = [(f"secret-user-{row[0]}", *row[1:]) for row in some_rows(6)]
    dataset = made(tmp_path, rows, pseudonymise=tmp_path / "key", ties="random:1")
    names = {user: hmac.new(key, user.encode(), "sha256").hexdigest() for user, *_ in rows}
    found = reference.histories(dataset.path)
    assert found.keys() == set(names.values())
    for user, name in names.items():
        assert sorted(found[name]) == sorted(expected(rows)[user])
    for s in range(3):
        assert all(reference.shard(u, 3) == s for u in dataset.read_shard(s)["user_id"].to_pylist())
    assert dataset.info["pseudonymised"] is True
    assert [p for p in dataset.path.rglob("*") if p.is_file() and b"secret-user" in p.read_bytes()] == []


def test_user_ids_are_keyed_before_the_engine_writes_them(tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(b"k" * 16)
    seen = []

    def stop(con, *_):
        con.raw_sql("CHECKPOINT")
        files = [path for path in tmp_path.glob(".out*/**/*") if path.is_file()]
        seen.extend(path.read_bytes() for path in files)
        raise DataError("stopped")

    monkeypatch.setattr(preparation, "clean", stop)
    with pytest.raises(DataError, match="stopped"):
        made(
            tmp_path,
            [(f"secret-user-{i}", "visible-item", i) for i in range(9)],
            pseudonymise=tmp_path / "key",
        )
    assert any(b"visible-item" in data for data in seen)
    assert not any(b"secret-user" in data for data in seen)


@pytest.mark.parametrize("key", [None, b"", b"k" * 15])
def test_a_key_must_be_there_and_long_enough(tmp_path, key):
    if key is not None:
        (tmp_path / "key").write_bytes(key)
    with pytest.raises(DataError, match=r"16 random bytes|no such file"):
        made(tmp_path, [("a", "x")], pseudonymise=tmp_path / "key")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------- faults


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".csv")


@pytest.mark.parametrize(
    ("options", "kind", "part"),
    [
        ({"shards": 0}, ConfigError, "--shards=0"),
        ({"shards": 4097}, ConfigError, "--shards=4097"),
        ({"ties": "random"}, ConfigError, "--ties=random"),
        ({"ties": "item"}, ConfigError, "--ties=item"),
        ({"filters": Filters(missing="maybe")}, ConfigError, "--missing=maybe"),
        ({"filters": Filters(core=-1)}, ConfigError, "--core=-1"),
        (
            {"filters": Filters(core=9)},
            DataError,
            "no user is left after 'users or items with fewer",
        ),
        ({"filters": Filters(min_rating=6)}, DataError, "no user is left after 'rated below 6"),
        ({"filters": Filters(min_user_events=99)}, DataError, "no user is left"),
    ],
)
def test_options_that_cannot_be_met(tmp_path, options, kind, part):
    with pytest.raises(kind, match=part) as caught:
        made(tmp_path, [("a", "x", 1, "v", 2), ("b", "y", 2, "v", 2)], **options)
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


def test_a_threshold_needs_ratings(tmp_path):
    with pytest.raises(DataError, match="no ratings, but --min_rating=3"):
        made(tmp_path, [("a", "x", 1)], filters=Filters(min_rating=3))


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(DataError, match="exists already"):
        made(tmp_path, [("a", "x", 1)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert left(tmp_path) == ["out"]


def test_parents_are_made_and_unmade(tmp_path):
    source = write_csv(tmp_path / "log.csv", [("a", "x")])
    with pytest.raises(DataError):
        prepare(PrepareOptions(source=source, out=tmp_path / "new/er/data", filters=Filters(core=5)))
    assert not (tmp_path / "new").exists()
    prepare(PrepareOptions(source=source, out=tmp_path / "new/er/data", shards=1))
    assert open_dataset(tmp_path / "new/er/data").users == 1
    with pytest.raises(DataError, match=r"log\.csv: is not a folder"):
        prepare(PrepareOptions(source=source, out=tmp_path / "log.csv" / "data"))


def test_what_a_killed_run_left_is_removed_and_a_running_one_is_not(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    for pid in (finished.pid, os.getppid()):
        (tmp_path / f".out.tmp-{pid}" / "work").mkdir(parents=True)
    made(tmp_path, [("a", "x")])
    assert left(tmp_path) == [f".out.tmp-{os.getppid()}", "out"]


@pytest.mark.parametrize("place", ["write_interactions", "write_items", "write_triples"])
def test_a_full_disk_while_parquet_is_written(tmp_path, monkeypatch, place):
    monkeypatch.setattr(preparation, place, full)
    (tmp_path / "kg").write_text("x\tby\ty\n")
    with pytest.raises(MachineError, match="the disk is full") as caught:
        made(tmp_path, [("a", "x")], triples=tmp_path / "kg")
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
from dynrec_jax.data.engine import engine
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.errors import MachineError
try:
    prepare(PrepareOptions(source=sys.argv[1], out=sys.argv[2], shards=1))
except MachineError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("limit", [4_000, 300_000])
def test_a_file_that_cannot_grow_is_a_full_disk_to_the_engine_too(tmp_path, limit):
    rng = random.Random(0)
    rows = [(rng.randrange(9_000), rng.randbytes(8).hex(), t) for t in range(30_000)]
    source = write_csv(tmp_path / "log.csv", rows)
    command = [sys.executable, "-c", LIMITED, source, str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (
        1,
        f"{tmp_path / 'out'}: the disk is full, nothing was kept; free some space and prepare again\n",
    ), done.stderr
    assert left(tmp_path) == []


# --------------------------------------------------------------- out of core


@pytest.mark.parametrize("limit", [1, 5, 11, 1000])
def test_groups_cover_all_shards_within_the_limit(limit):
    counts = {0: 3, 2: 4, 3: 9, 6: 1, 7: 5}
    groups = list(shard_groups(counts, 9, limit))
    assert [shard for group in groups for shard in group] == list(range(9))
    assert all(len(g) == 1 or sum(counts.get(s, 0) for s in g) <= limit for g in groups)
    assert (len(groups) == 1) == (limit == 1000)


@pytest.mark.parametrize(
    ("count", "memory"), [(60_000, "64MiB"), pytest.param(1_500_000, "96MiB", marks=pytest.mark.slow)]
)
def test_little_memory_gives_the_same_dataset(tmp_path, count, memory):
    rng = random.Random(1)
    with (tmp_path / "log.csv").open("w") as file:
        file.write("user,item,time\n")
        for time in range(count):
            file.write(f"user-{rng.randrange(count // 20):020d},item-{rng.randrange(5_000):020d},{time}\n")
    source = f"table:{tmp_path}/log.csv"
    options = [{"memory": memory, "group_events": count // 20}, {}]
    small, large = (
        prepare(PrepareOptions(source=source, out=tmp_path / f"out{i}", filters=Filters(core=8), **extra))
        for i, extra in enumerate(options)
    )
    assert 0 < small.events < count
    assert (small.events, small.content) == (large.events, large.content)


def test_the_engine_spills_into_its_folder_and_fetches_nothing(tmp_path):
    with engine(tmp_path, "64MiB") as con:
        settings = [
            "memory_limit",
            "temp_directory",
            "autoinstall_known_extensions",
            "autoload_known_extensions",
        ]
        query = "SELECT " + ", ".join(f"current_setting('{name}')" for name in settings)
        assert con.raw_sql(query).fetchone() == ("64.0 MiB", f"{tmp_path}/spill", False, False)


# --------------------------------------------------------------------- the verb


def flag_values(*arguments: str) -> flags.FlagValues:
    values = verb.define_flags()
    values(["prepare", *arguments])
    return values


def test_the_verb_hands_its_flags_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(preparation, "prepare", calls.append)
    arguments = {
        "source": "table:log", "out": "there", "items": "i", "text_columns": "a,b", "triples": "g", "user_column": "u",
        "item_column": "v", "time_column": "", "event_column": "e", "rating_column": "r", "core": "5",
        "min_rating": "3.5", "min_user_events": "2", "min_item_users": "4", "missing": "drop",
        "ties": "random:3", "pseudonymise": "k", "shards": "8",
    }  # fmt: skip
    verb.run(flag_values(*(f"--{name}={value}" for name, value in arguments.items())))
    assert calls == [
        PrepareOptions(
            source="table:log",
            out="there",
            items="i",
            text_columns=("a", "b"),
            triples="g",
            columns=preparation.Columns("u", "v", "", "e", "r"),
            filters=Filters("drop", 3.5, 5, 4, 2),
            ties="random:3",
            pseudonymise="k",
            shards=8,
        )
    ]


def test_the_verbs_defaults_take_nothing_away(tmp_path):
    source = write_csv(tmp_path / "log.csv", [("a", "x"), ("a", "x")])
    verb.run(flag_values(f"--source={source}", f"--out={tmp_path}/out"))
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (info["counts"]["events"], info["shards"]) == (2, 64)
    assert info["filters"] == {
        "missing": "refuse", "min_rating": None, "core": 0, "min_item_users": 0, "min_user_events": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "users", "items", "events"),
    [("ml-1m", 6_040, 3_416, 999_611), ("amazon-beauty", 22_363, 12_101, 198_502)],
)
def test_published_counts(tmp_path, shared_data, name, users, items, events):
    source = f"sequences:{shared_data}/{name}/sequences.txt"
    dataset = prepare(PrepareOptions(source=source, out=tmp_path / "out"))
    assert (dataset.users, dataset.items, dataset.events) == (users, items, events)
