import copy
import errno
import hashlib
import hmac
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from absl import flags
from rich.console import Console

from dynrec_jax.data import prepare as preparation
from dynrec_jax.data.clean import Filters
from dynrec_jax.data.dataset import Dataset, open_dataset
from dynrec_jax.data.engine import engine
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.data.write import shard_groups
from dynrec_jax.errors import ConfigError, DataError, MachineError
from dynrec_jax.verbs import prepare as verb

from . import reference


def write_csv(path: Path, rows: list[tuple], header: str = "user,item,time,event,rating") -> str:
    """Writes rows; gives the source that names them."""
    names = ",".join(header.split(",")[: len(rows[0])])
    lines = [names, *(",".join("" if value is None else str(value) for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return f"table:{path}"


def made(
    tmp_path: Path, rows: list[tuple], name: str = "out", console: Console | None = None, **options
) -> Dataset:
    source = write_csv(tmp_path / f"{name}.csv", rows)
    return prepare(PrepareOptions(source=source, out=tmp_path / name, **{"shards": 3, **options}), console)


def some_rows(seed: int, users: int = 23, items: int = 17, count: int = 300) -> list[tuple]:
    """user, item, time, event, rating; ids with letters outside of ASCII, many equal times."""
    rng = random.Random(seed)
    return [
        (
            f"ü{rng.randrange(users)}",
            f"{rng.choice('aÄ𐌀')}{rng.randrange(items)}",
            1_000_000_000 + rng.randrange(40),
            rng.choice(["view", "buy", "cart"]),
            rng.randrange(1, 6),
        )
        for _ in range(count)
    ]


def expected(rows: list[tuple]) -> dict[str, list[tuple]]:
    """Histories of rows (user, item, time, event, rating): duplicates out, by time, then as in the file."""
    kinds = {name: i for i, name in enumerate(sorted({row[3] for row in rows}), 1)}
    found: dict[str, list[tuple]] = {}
    for user, item, time, event, _ in sorted(dict.fromkeys(rows), key=lambda row: row[2]):
        found.setdefault(user, []).append((item, time, kinds[event]))
    return found


# ---------------------------------------------------------------- the folder


def test_histories_are_those_of_plain_python(tmp_path):
    rows = [*some_rows(0), ("001", "x", 5, "view", 1), ("1", "x", 5, "view", 1)]
    rows += rows[:20]
    dataset = made(tmp_path, rows)
    assert reference.histories(dataset.path) == expected(rows)
    assert dataset.info["dropped"] == {"missing": 0, "duplicates": len(rows) - len(set(rows))}
    assert (dataset.users, dataset.events) == (len({row[0] for row in rows}), len(set(rows)))


def test_an_item_is_the_rank_of_its_bytes(tmp_path):
    rows = some_rows(1) + [
        ("u", item, 7, "view", 1) for item in ("10", "9", "Z", "a", "\U00010330", "\uff21")
    ]
    dataset = made(tmp_path, rows)
    table = dataset.items_table()
    assert table["item_id"].to_pylist() == sorted({row[1] for row in rows}, key=lambda name: name.encode())
    assert table["index"].to_pylist() == list(range(1, dataset.items + 1))
    assert [str(field.type) for field in table.schema] == ["int32", "string"]


@pytest.mark.parametrize("shards", [1, 3, 64, 100])
def test_a_user_is_in_the_shard_of_its_hash(tmp_path, shards):
    dataset = made(tmp_path, some_rows(2), shards=shards)
    names = sorted(path.name for path in (dataset.path / "interactions").iterdir())
    assert names == [f"part-{s:05d}-of-{shards:05d}.parquet" for s in range(shards)]
    users = [dataset.read_shard(s)["user_id"].to_pylist() for s in range(shards)]
    for s, found in enumerate(users):
        assert [reference.shard(user, shards) for user in found] == [s] * len(found)
        assert found == sorted(found, key=str.encode)
    assert {user for found in users for user in found} == {row[0] for row in some_rows(2)}


def test_columns_and_their_types(tmp_path):
    timed = made(tmp_path, some_rows(3))
    plain = made(tmp_path, [("a", "x"), ("b", "y"), ("a", "x")], "plain")
    for dataset, nulls in ((timed, 0), (plain, 2)):
        schema = pq.read_schema(dataset.path / "interactions/part-00000-of-00003.parquet")
        kinds = {field.name: field.type for field in schema}
        assert list(kinds) == ["user_id", "items", "times", "events"]
        assert [str(kinds[name].value_type) for name in ("items", "times", "events")] == [
            "int32",
            "int64",
            "int32",
        ]
        tables = [dataset.read_shard(s) for s in range(3)]
        assert sum(table["times"].null_count for table in tables) == nulls
        assert sum(table["events"].null_count for table in tables) == nulls


def test_without_times_a_repeat_is_an_event(tmp_path):
    dataset = made(tmp_path, [("a", "x"), ("a", "x"), ("a", "y"), ("a", "x")])
    assert [item for item, _, _ in reference.histories(dataset.path)["a"]] == ["x", "x", "y", "x"]
    assert "duplicates" not in dataset.info["dropped"]


def test_content_is_of_the_rows_alone(tmp_path):
    rows = some_rows(4)
    first = made(tmp_path, rows)
    shuffled = [row for user in sorted({r[0] for r in rows}) for row in rows if row[0] == user]
    again = made(tmp_path, shuffled + rows[:9], "again", group_events=1)
    assert again.content == first.content
    changed = [(*rows[0][:2], rows[0][2] + 1, *rows[0][3:]), *rows[1:]]
    renamed = [(*row[:3], row[3].replace("cart", "carts"), row[4]) for row in rows]
    others = [made(tmp_path, changed, "changed"), made(tmp_path, renamed, "renamed")]
    others.append(made(tmp_path, rows, "sharded", shards=4))
    others.append(made(tmp_path, [row[:3] for row in rows], "untyped"))
    assert len({first.content, *(other.content for other in others)}) == 5


def test_content_counts_what_describes_items(tmp_path):
    contents = set()
    for name, title in (("one", "A lamp"), ("two", "A rope")):
        (tmp_path / "items.csv").write_text(f"item_id,title\nx,{title}\n")
        contents.add(made(tmp_path, [("a", "x")], name, items=tmp_path / "items.csv").content)
    contents.add(made(tmp_path, [("a", "x")], "bare").content)
    assert len(contents) == 3


def test_content_is_the_hash_that_its_definition_gives(tmp_path):
    # Caches and run folders know a dataset by this: a change of it is a change of the format.
    dataset = made(tmp_path, [("b", "y", 7, "view"), ("a", "x", 5, "buy"), ("a", "é", -6, "view")], shards=2)
    rows = [("a", [3, 1], [-6, 5], [2, 1]), ("b", [2], [7], [2])]
    shards = [[row for row in rows if reference.shard(row[0], 2) == s] for s in range(2)]
    assert dataset.content == reference.content(shards, [(1, "x"), (2, "y"), (3, "é")], ["buy", "view"])


# ------------------------------------------------------------------- cleaning


def test_rows_with_missing_values_are_dropped_when_told(tmp_path):
    rows = [("a", "x", 1), (None, "x", 2), ("b", None, 3), ("c", "y", None), ("d", "z", 4)]
    dataset = made(tmp_path, rows, filters=Filters(missing="drop"))
    assert reference.histories(dataset.path).keys() == {"a", "d"}
    assert dataset.info["dropped"]["missing"] == 3


def test_duplicates_need_every_column_to_be_equal(tmp_path):
    row = ("a", "x", 5, "view", 3)
    near = [
        ("a", "x", 5, "view", 4),
        ("a", "x", 5, "buy", 3),
        ("a", "x", 6, "view", 3),
        ("b", "x", 5, "view", 3),
    ]
    dataset = made(tmp_path, [row, *near, row, row, ("a", "z", 5, None, None), ("a", "z", 5, None, None)])
    assert dataset.events == 6
    assert dataset.info["dropped"]["duplicates"] == 3


def test_ratings_below_the_threshold_go_with_those_that_are_missing(tmp_path):
    rows = [("a", "x", 1, "v", 3), ("a", "y", 2, "v", 2.9), ("a", "z", 3, "v", None), ("b", "x", 4, "v", 5)]
    dataset = made(tmp_path, rows, filters=Filters(min_rating=3))
    assert {user: [e[0] for e in events] for user, events in reference.histories(dataset.path).items()} == {
        "a": ["x"],
        "b": ["x"],
    }
    assert dataset.info["dropped"]["min_rating"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_core_is_the_one_found_by_brute_force(tmp_path, seed):
    rng = random.Random(seed)
    rows = [(f"u{int(rng.paretovariate(0.7)) % 40}", f"i{rng.randrange(25)}", t) for t in range(160)]
    kept = reference.core([row[:2] for row in rows], 4)
    assert 0 < len(kept) < len(rows)
    dataset = made(tmp_path, rows, filters=Filters(core=4))
    found = [
        (user, item) for user, events in reference.histories(dataset.path).items() for item, _, _ in events
    ]
    assert sorted(found) == sorted(kept)
    assert dataset.info["dropped"]["core"] == len(rows) - len(kept)


def test_minimum_counts_apply_once_items_first(tmp_path):
    rows = [("a", "x"), ("b", "x"), ("a", "y"), ("a", "y"), ("a", "z"), ("b", "z"), ("c", "z"), ("c", "w")]
    dataset = made(tmp_path, rows, filters=Filters(min_item_users=2, min_user_events=2))
    # y has two events but one user; c is left with one event; z keeps a and b though c goes.
    found = {user: [e[0] for e in events] for user, events in reference.histories(dataset.path).items()}
    assert found == {"a": ["x", "z"], "b": ["x", "z"]}
    assert dataset.info["dropped"] == {"missing": 0, "min_item_users": 3, "min_user_events": 1}


def test_what_was_dropped_is_printed_and_why(tmp_path):
    text = io.StringIO()
    rows = [("a", "x", 1), ("a", "x", 1), ("a", "y", 2), ("b", None, 3), ("b", "x", 4), ("c", "x", 5)]
    filters = Filters(missing="drop", min_user_events=2)
    made(tmp_path, rows, console=Console(file=text, width=100), filters=filters)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines()]
    assert ["1", "rows without user, item or time", "5"] in lines
    assert ["1", "exact duplicates", "4"] in lines
    assert ["2", "users with fewer than 2 events, once", "2"] in lines
    assert "1 users, 2 items, 2 events" in text.getvalue()


# ----------------------------------------------------------------------- ties


def tied_rows(order: str, number: int = 30) -> list[tuple]:
    items = [str(2**i) for i in range(number)]
    if order == "bytes":
        items.sort()
    if order == "mixed":
        random.Random(5).shuffle(items)
    return [("a", item, 100) for item in items]


@pytest.mark.parametrize(
    ("order", "number", "ties"),
    [
        ("numbers", 30, "item_sorted"),
        ("bytes", 30, "item_sorted"),
        ("mixed", 30, "source"),
        ("numbers", 15, "source"),
    ],
)
def test_ties_sorted_by_item_are_noticed(tmp_path, order, number, ties):
    text = io.StringIO()
    dataset = made(tmp_path, tied_rows(order, number), console=Console(file=text))
    assert (dataset.info["ties"], dataset.info["tied_events"]) == (ties, number - 1)
    assert ("--ties=random:SEED" in text.getvalue()) == (ties == "item_sorted")
    assert [e[0] for e in reference.histories(dataset.path)["a"]] == [
        row[1] for row in tied_rows(order, number)
    ]


def test_ties_at_random_follow_the_hash_and_leave_times_alone(tmp_path):
    rows = [*tied_rows("numbers"), ("a", "first", 99), ("a", "last", 101), ("b", "2", 100), ("b", "3", 100)]
    found = []
    for seed in (1, 2):
        dataset = made(tmp_path, rows, f"out{seed}", ties=f"random:{seed}")
        assert dataset.info["ties"] == f"random:{seed}"
        order = sorted(
            (time, hashlib.sha256(f"{seed}\t{user}\t{item}\t{place}".encode()).hexdigest(), item)
            for place, (user, item, time) in enumerate(rows, 1)
            if user == "a"
        )
        found.append([event[0] for event in reference.histories(dataset.path)["a"]])
        assert found[-1] == [item for _, _, item in order]
    assert found[0] != found[1]


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


@pytest.mark.parametrize("place", ["write_interactions", "write_items"])
def test_a_full_disk_while_parquet_is_written(tmp_path, monkeypatch, place):
    monkeypatch.setattr(preparation, place, full)
    with pytest.raises(MachineError, match="the disk is full") as caught:
        made(tmp_path, [("a", "x")])
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
    ("count", "memory"), [(60_000, "64MiB"), pytest.param(3_000_000, "128MiB", marks=pytest.mark.slow)]
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
    values = copy.deepcopy(verb.FLAGS)
    values(["prepare", *arguments])
    return values


def test_the_verb_hands_its_flags_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(verb, "prepare", calls.append)
    arguments = {
        "source": "table:log", "out": "there", "items": "i", "text_columns": "a,b", "user_column": "u",
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
