import hashlib
import io
import random

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dynrec_jax.data.clean import Filters

from . import reference
from .logs import expected, made, some_rows

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
