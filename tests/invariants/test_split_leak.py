"""No split lets the model see, in training or in what it is asked from, what comes later."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrec_jax.data import examples
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.examples import Asked, Splits
from dynrec_jax.data.pipeline import BatchSource, make_splits, time_cuts

from .. import tiny

# Each protocol: how it cuts, what it asks for, and of which types of events.
SPLITS: dict[str, dict[str, Any]] = {
    "leave_one_out": {},
    "leave_one_out, buy": {"data__target_events": ("buy",)},
    **{
        f"global_time, {targets}": {"evaluation__split": "global_time", "evaluation__targets": targets}
        for targets in ("first", "last", "all", "random")
    },
    "global_time, all buy": {
        "evaluation__split": "global_time",
        "evaluation__targets": "all",
        "data__target_events": ("buy",),
    },
}


@pytest.fixture(scope="module")
def held(timed_dataset: Dataset, cache_dir: Path) -> Histories:
    return Histories(timed_dataset, cache_dir)


def config_of(name: str) -> Any:
    return tiny.config(evaluation__holdout=0.2, **SPLITS[name])


def rows_of(histories: Histories) -> list[dict[str, Any]]:
    dataset = histories.dataset
    return [row for shard in range(dataset.shards) for row in dataset.read_shard(shard).to_pylist()]


def expected(histories: Histories, name: str) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Where training ends, and the events that validation and test ask for, of each user; in plain Python."""
    config = config_of(name)
    types = [histories.dataset.event_types.index(t) + 1 for t in config.data.target_events]
    trained, validation, test = [], [], []
    for row in rows_of(histories):
        length = len(row["items"])
        able = [n for n in range(length) if not types or row["events"][n] in types]
        if config.evaluation.split == "leave_one_out":
            enough = length >= 3 and len(able) >= 2 and able[-2] >= 1
            trained.append(able[-2] if enough else length)
            validation.append([able[-2]] if enough else [])
            test.append([able[-1]] if enough else [])
            continue
        first, second = time_cuts(histories, config.evaluation)
        trained.append(sum(t < first for t in row["times"]))
        parts = (
            [n for n in able if first <= row["times"][n] < second],
            [n for n in able if row["times"][n] >= second],
        )
        for chosen, into in zip(parts, (validation, test), strict=True):
            some = {"first": chosen[:1], "last": chosen[-1:]}.get(config.evaluation.targets)
            some = [n for n in (chosen if some is None else some) if n >= 1 and length >= 3]
            into.append(some)
    return trained, validation, test


def by_user(asked: Asked, users: int) -> list[list[int]]:
    return [asked.ends[asked.users == user].tolist() for user in range(users)]


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_what_plain_python_makes_of_the_rows(held: Histories, name: str):
    splits = make_splits(held, config_of(name))
    trained, validation, test = expected(held, name)
    assert splits.train_end.tolist() == trained
    for found, wanted in ((splits.validation, validation), (splits.test, test)):
        assert (np.diff(found.users) >= 0).all()
        users = by_user(found, held.users)
        if "random" not in name:
            assert users == wanted
            continue
        assert [len(one) for one in users] == [min(len(each), 1) for each in wanted]
        assert all(set(one) <= set(each) for one, each in zip(users, wanted, strict=True))
    assert sum(map(len, test)) > 3


def test_a_random_target_depends_on_the_user_and_the_seed_alone(timed_dataset: Dataset, cache_dir: Path):
    whole = Histories(timed_dataset, cache_dir)
    config = config_of("global_time, random")
    ids = whole.ids_of(np.arange(whole.users))
    found = {}
    for shards in (range(4), range(0, 4, 2), range(1, 4, 2)):
        part = Histories(timed_dataset, cache_dir, shards)
        asked = make_splits(part, config).test
        names = part.ids_of(np.arange(part.users))
        for user, end in zip(asked.users.tolist(), asked.ends.tolist(), strict=True):
            assert found.setdefault(names[user], end) == end
    assert set(found) <= set(ids)
    config.seed = 1
    other = make_splits(whole, config).test
    assert any(
        found[ids[user]] != end for user, end in zip(other.users.tolist(), other.ends.tolist(), strict=True)
    )


def poisoned(histories: Histories, ends_U: np.ndarray) -> Histories:
    """Other items, times and types from event number `end` of each user on."""
    other = Histories.__new__(Histories)
    other.__dict__.update(histories.__dict__)
    flat = {name: values.copy() for name, values in histories._flat.items()}
    for user, end in enumerate(ends_U.tolist()):
        for name, values in flat.items():
            start = histories._start[name][user]
            late = slice(start + end, start + histories.lengths[user])
            values[late] = {"items": 1, "times": 1_700_000_000, "events": 0}[name]
    other._flat = flat
    return other


@pytest.mark.parametrize("name", SPLITS)
def test_what_comes_later_changes_neither_batches_nor_what_is_asked_from(held: Histories, name: str):
    config = config_of(name)
    splits = make_splits(held, config)
    early = poisoned(held, splits.train_end)
    for step in range(3):
        one, other = (BatchSource(source, splits, config)[step] for source in (held, early))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    for asked in (splits.validation, splits.test):
        for turn in range(int(np.bincount(asked.users).max())):
            # One query of each user at a time.
            rank = np.arange(len(asked.users)) - np.searchsorted(asked.users, asked.users)
            users, ends = asked.users[rank == turn], asked.ends[rank == turn]
            ends_U = held.lengths.copy()
            ends_U[users] = ends
            late = poisoned(held, ends_U)
            for a, b in zip(held.windows(users, ends, 8), late.windows(users, ends, 8), strict=True):
                np.testing.assert_array_equal(a, b)
            assert (held.item_at(users, ends) != late.item_at(users, ends)).any(), (
                "the target itself is changed"
            )


def test_the_time_of_the_request_is_that_of_the_target_and_of_the_logs_end_without_one(held: Histories):
    rows, first = rows_of(held), held.dataset.first_time
    users = np.arange(held.users)
    found = held.asked(users, held.lengths - 1)
    assert found.tolist() == [row["times"][-1] - first for row in rows]
    latest = max(t for row in rows for t in row["times"]) - first
    assert held.asked(users, held.lengths).tolist() == [latest] * held.users
    assert held.asked(np.array([-1]), np.array([0])).tolist() == [latest]


def test_an_event_type_that_the_dataset_has_not_is_refused(held: Histories):
    from dynrec_jax.errors import ConfigError

    with pytest.raises(ConfigError, match="no event type 'rent'; its types are buy, view"):
        make_splits(held, tiny.config(data__target_events=("rent",)))


def test_splits_hold_one_event_of_each_user():
    splits = examples.leave_one_out(np.array([2, 3, 5]))
    assert isinstance(splits, Splits)
    assert splits.test.users.tolist() == [1, 2]
    key = functools.partial(examples.one_at_random, keys_U=np.array([5, 6, 7]), seed=0)
    every = examples.between(np.array([1, 1, 2]), np.array([2, 3, 5]))
    assert every.users.tolist() == [0, 1, 1, 2, 2, 2]
    assert every.ends.tolist() == [1, 1, 2, 2, 3, 4]
    assert key(every).users.tolist() == [0, 1, 2]
