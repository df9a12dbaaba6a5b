"""Training batches: a function of the step alone, made of training events alone."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dynrec_jax.batch import Batch
from dynrec_jax.data import examples
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.pipeline import (
    BatchSource,
    agreed,
    batches,
    check_trains,
    make_splits,
    time_cuts,
    trains,
)
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.errors import ConfigError, DataError

from .. import tiny


def source(histories: Histories, multiple: int = 1, **changes: object) -> BatchSource:
    config = tiny.config(**changes)
    return BatchSource(histories, make_splits(histories, config), config, multiple)


def windows_of(batch: Batch) -> dict[int, list[int]]:
    """Items by window, read off the segments."""
    return {
        int(number): batch.items[batch.segments == number].tolist()
        for number in np.unique(batch.segments[batch.segments > 0])
    }


def histories_by_items(histories: Histories, end: np.ndarray) -> dict[tuple[int, ...], int]:
    items = histories.windows(np.arange(histories.users), end, 64).items
    return {tuple(row[row > 0].tolist()): user for user, row in enumerate(items)}


def test_rows_hold_the_training_events_of_the_users_that_the_draws_name(histories: Histories):
    made = source(histories, data__max_length=30)
    known = histories_by_items(histories, examples.leave_one_out(histories.lengths).train_end)
    users = [known[tuple(items)] for step in range(5) for items in windows_of(made[step]).values()]
    assert len(users) == 40, "every draw is a window"
    able = np.nonzero(examples.leave_one_out(histories.lengths).train_end >= 2)[0]
    assert set(users) <= set(able.tolist())


def test_every_user_with_a_target_trains_once_an_epoch_of_its_shard(histories: Histories):
    made = source(histories, data__max_length=30, train__batch_size=4)
    known = histories_by_items(histories, examples.leave_one_out(histories.lengths).train_end)
    shard_of_user = np.repeat(np.arange(4), histories.shard_users)
    # Of three events one trains, and of one event none has a target.
    can_train = (histories.lengths == 2) | (histories.lengths >= 4)
    able = {s: np.nonzero(can_train & (shard_of_user == s))[0].tolist() for s in range(4)}
    drawn: dict[int, list[int]] = {s: [] for s in range(4)}
    for step in range(40):
        for items in windows_of(made[step]).values():
            user = known[tuple(items)]
            drawn[int(shard_of_user[user])].append(user)
    for shard, users in able.items():
        size = len(users)
        assert len(drawn[shard]) == 40
        for epoch in range(40 // size):
            assert sorted(drawn[shard][epoch * size : (epoch + 1) * size]) == users


def test_batches_are_the_same_wherever_the_run_starts(histories: Histories):
    made = source(histories, data__windows="random", data__max_length=5)
    whole = list(batches(made, 0, 4))
    assert len(whole) == 12
    for start in (1, 7, 11):
        rest = list(batches(source(histories, data__windows="random", data__max_length=5), start, 2))
        assert len(rest) == 12 - start
        for one, other in zip(whole[start:], rest, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_random_windows_cover_all_of_a_long_history(histories: Histories):
    """The longest history has 28 training events; windows of 6 reach every one of them, and nothing else."""
    made = source(
        histories, data__windows="random", data__max_length=5, train__batch_size=32, train__steps=300
    )
    longest = int(histories.lengths.argmax())
    end = int(histories.lengths[longest]) - 2
    items = histories.windows(np.array([longest]), np.array([end]), end).items[0].tolist()
    possible = {tuple(items[start : start + 6]): start for start in range(end - 5)}
    found = set()
    for step in range(300):
        for window in windows_of(made[step]).values():
            if tuple(window) in possible:
                found.add(possible[tuple(window)])
    assert found == set(range(end - 5))


def test_the_number_of_rows_divides_over_devices_and_parts(histories: Histories):
    batch = source(histories, multiple=6, train__batch_size=16, train__accumulation=4)[0]
    assert batch.items.shape[0] % 24 == 0
    assert batch.items.shape[1] == 9


def test_a_batch_that_does_not_fit_the_shards_is_refused(histories: Histories):
    with pytest.raises(ConfigError, match="4 shards do not divide"):
        source(histories, train__batch_size=6)


def test_nothing_to_learn_from_is_refused(histories: Histories):
    one_event_each = examples.Splits(*(np.ones(histories.users, np.int64),) * 3)
    assert not trains(one_event_each).any()
    with pytest.raises(DataError, match="no user has two training events"):
        check_trains(histories.dataset, 0)
    check_trains(histories.dataset, 1)


def parts_of(dataset: Dataset, cache_dir: Path, parts: int, **changes: object) -> list[BatchSource]:
    """The sources of several processes, each of which holds its shards alone."""
    config = tiny.config(**changes)
    made = []
    for part in range(parts):
        held = Histories(dataset, cache_dir, range(part, dataset.shards, parts))
        made.append(BatchSource(held, make_splits(held, config), config, 1, part, parts))
    return made


@pytest.mark.parametrize("batch_size", [2, 4, 12])  # fewer than the shards, as many, more
@pytest.mark.parametrize("windows", ["last", "random"])
def test_batches_are_the_same_for_any_number_of_processes(
    histories: Histories, tiny_dataset: Dataset, cache_dir: Path, batch_size: int, windows: str
):
    """The same windows under the same numbers; only how they lie in rows is each process's own."""
    changes = {"data__windows": windows, "data__max_length": 5, "train__batch_size": batch_size}
    alone = source(histories, **changes)
    for parts in (2, 4):
        if batch_size % parts:
            with pytest.raises(ConfigError, match="do not both divide over 4 processes"):
                parts_of(tiny_dataset, cache_dir, parts, **changes)
            continue
        several = parts_of(tiny_dataset, cache_dir, parts, **changes)
        assert sum(part.trained_users for part in several) == alone.trained_users
        for step in range(12):
            whole: dict[int, list[int]] = {}
            for part in several:
                own = windows_of(part[step])
                assert len(own) == batch_size // parts
                assert not own.keys() & whole.keys()
                whole |= own
            assert whole == windows_of(alone[step])


def test_processes_agree_on_the_rows_of_each_step(tiny_dataset: Dataset, cache_dir: Path):
    """All get the rows that the one with the most needs, wherever they start; the batches stay what they are."""
    changes = {"data__max_length": 30, "train__batch_size": 64, "train__steps": 70}
    several = parts_of(tiny_dataset, cache_dir, 2, **changes)
    for part in several:
        part.rows = 8  # what a plan of a few steps might have said

    def rows(start: int) -> list[list[int]]:
        asked: list[list[int]] = []  # what both need, block by block

        def tell(needs: list[int]) -> list[list[int]]:
            asked.append(needs)
            return [needs]

        for part in several:
            list(agreed(part, batches(part, start, 2), start, tell))
        blocks = len(asked) // 2
        found = []
        for number, part in enumerate(several):
            both = iter([asked[block], asked[blocks + block]] for block in range(blocks))
            stream = list(agreed(part, batches(part, start, 2), start, lambda _, both=both: next(both)))
            for step, batch in enumerate(stream, start):
                assert windows_of(batch) == windows_of(part[step])
            found.append([batch.items.shape[0] for batch in stream])
            assert all(r >= max(part.needed(range(s, s + 1)), 8) for s, r in enumerate(found[number], start))
        assert found[0] == found[1]
        return found

    whole = rows(0)
    assert len(whole[0]) == 70
    assert len(set(whole[0])) > 1, "some batches need more rows than others"
    assert rows(67)[0] == whole[0][67:]


def test_a_process_whose_shards_are_empty_supplies_empty_rows(tmp_path: Path):
    (tmp_path / "log.txt").write_text("u0 a b c d\n")
    dataset = prepare(
        PrepareOptions(source=f"sequences:{tmp_path / 'log.txt'}", out=tmp_path / "dataset", shards=2),
        Console(file=io.StringIO()),
    )
    several = parts_of(dataset, tmp_path / "cache", 2, train__batch_size=2)
    counts = sorted(len(windows_of(part[0])) for part in several)
    assert counts == [0, 1]


def test_a_time_split_cuts_all_histories_at_the_same_moments(timed_dataset: Dataset, cache_dir: Path):
    held = Histories(timed_dataset, cache_dir)
    config = tiny.config(evaluation__split="global_time", evaluation__holdout=0.2)
    validation, test = time_cuts(held, config.evaluation)
    first = 1_600_000_000
    # One event a minute: the cuts are near the 180th and the 240th of 300 events.
    assert abs((validation - first) / 60 - 180) <= 1
    assert abs((test - first) / 60 - 240) <= 1
    splits = make_splits(held, config)
    rows = [row for shard in range(4) for row in timed_dataset.read_shard(shard).to_pylist()]
    for user, row in enumerate(rows):
        trained = splits.train_end[user]
        assert all(t < validation for t in row["times"][:trained])
        assert all(t >= validation for t in row["times"][trained:])
    for user, end in zip(*splits.validation, strict=True):
        assert validation <= rows[user]["times"][end] < test
    for user, end in zip(*splits.test, strict=True):
        assert rows[user]["times"][end] >= test > rows[user]["times"][end - 1]


def test_a_time_split_without_times_is_refused(histories: Histories):
    with pytest.raises(ConfigError, match="'global_time' needs times"):
        make_splits(histories, tiny.config(evaluation__split="global_time"))
