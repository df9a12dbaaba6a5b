"""Memory-mapped histories give what the Parquet shards hold."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dynrec_jax.data import cache
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset, open_dataset
from dynrec_jax.errors import DataError, MachineError


def rows_of(dataset: Dataset) -> list[dict]:
    """All users in the order of shards, read by pyarrow alone."""
    return [row for shard in range(dataset.shards) for row in dataset.read_shard(shard).to_pylist()]


def last(values: list[int], end: int, size: int) -> list[int]:
    kept = values[max(end - size, 0) : end]
    return kept + [0] * (size - len(kept))


def test_windows_are_the_last_events_before_an_end(histories: Histories, tiny_dataset: Dataset):
    rows = rows_of(tiny_dataset)
    assert histories.users == len(rows) == 41
    assert histories.lengths.tolist() == [len(row["items"]) for row in rows]
    users = np.arange(41)
    for size in (1, 7, 40):
        for ends in (histories.lengths, histories.lengths // 2):
            windows = histories.windows(users, ends, size)
            assert windows.items.dtype == np.int32
            wanted = [last(row["items"], int(end), size) for row, end in zip(rows, ends, strict=True)]
            assert windows.items.tolist() == wanted
            assert not windows.times.any()
            assert not windows.events.any()


def test_an_unknown_user_gives_an_empty_row(histories: Histories):
    windows = histories.windows(np.array([-1, 3]), np.array([5, 5]), 5)
    assert not windows.items[0].any()
    assert windows.items[1].any()


def test_ids_and_single_items(histories: Histories, tiny_dataset: Dataset):
    rows = rows_of(tiny_dataset)
    users = np.array([40, 0, 17, 17])
    assert histories.ids_of(users) == [rows[u]["user_id"] for u in users]
    at = histories.lengths[users] - 1
    assert histories.item_at(users, at).tolist() == [rows[u]["items"][-1] for u in users]


def test_times_are_int32_seconds_since_the_first_event(timed_dataset: Dataset, cache_dir: Path):
    held = Histories(timed_dataset, cache_dir)
    rows = rows_of(timed_dataset)
    windows = held.windows(np.arange(len(rows)), held.lengths, 30)
    assert windows.times.dtype == np.int32
    first = min(row["times"][0] for row in rows)
    assert first > np.iinfo(np.int32).max / 2, "the folder's own times are absolute"
    relative = [last([t - first for t in row["times"]], len(row["times"]), 30) for row in rows]
    assert windows.times.tolist() == relative
    assert windows.times.max() == 60 * 299
    assert windows.events.tolist() == [last(row["events"], len(row["events"]), 30) for row in rows]


def test_counts_before_a_moment(timed_dataset: Dataset, cache_dir: Path):
    held = Histories(timed_dataset, cache_dir)
    moment = 1_600_000_000 + 60 * 150
    counted = held.count_before(moment)
    assert counted.tolist() == [sum(t < moment for t in row["times"]) for row in rows_of(timed_dataset)]
    assert counted.sum() == 150


def test_item_counts_between_events_and_since_a_moment(timed_dataset: Dataset, cache_dir: Path):
    held = Histories(timed_dataset, cache_dir)
    rows = rows_of(timed_dataset)
    ends, starts = held.lengths - 2, held.lengths // 2
    since = 1_600_000_000 + 60 * 200
    expected = {key: np.zeros(timed_dataset.items + 1, int) for key in ("all", "from", "since")}
    for row, start, end in zip(rows, starts, ends, strict=True):
        for at, (item, time) in enumerate(zip(row["items"], row["times"], strict=True)):
            expected["all"][item] += at < end
            expected["from"][item] += start <= at < end
            expected["since"][item] += at < end and time >= since
    assert held.item_counts(ends).tolist() == expected["all"].tolist()
    assert held.item_counts(ends, starts).tolist() == expected["from"].tolist()
    assert held.item_counts(ends, since=since).tolist() == expected["since"].tolist()


def test_some_shards_hold_their_users_alone(histories: Histories, tiny_dataset: Dataset, cache_dir: Path):
    part = Histories(tiny_dataset, cache_dir, range(1, 3))
    rows = tiny_dataset.read_shard(1).to_pylist() + tiny_dataset.read_shard(2).to_pylist()
    assert part.ids_of(np.arange(part.users)) == [row["user_id"] for row in rows]
    assert part.windows(np.arange(part.users), part.lengths, 30).items.tolist() == [
        last(row["items"], len(row["items"]), 30) for row in rows
    ]
    assert part.shard_users.tolist() == [0, *histories.shard_users[1:3].tolist(), 0]


def test_a_second_opening_does_not_build_again(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = Histories(tiny_dataset, tmp_path)
    (file,) = tmp_path.rglob("*.arrow")
    before = (file.stat().st_ino, file.stat().st_mtime_ns)

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was read again")

    monkeypatch.setattr(cache, "_shard_batch", refuse)
    second = Histories(tiny_dataset, tmp_path)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    assert second.lengths.tolist() == first.lengths.tolist()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_named_and_leaves_no_cache(tiny_dataset: Dataset, tmp_path: Path, damage: str):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dataset.path, copy)
    dataset = open_dataset(copy)
    shard = copy / "interactions" / "part-00002-of-00004.parquet"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(raw if damage == "flip" else raw[:-9])
    with pytest.raises(DataError, match=r"part-00002-of-00004\.parquet.*again"):
        Histories(dataset, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_is_a_fault_of_the_machine(tiny_dataset: Dataset, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="set --cache_dir"):
        Histories(tiny_dataset, tmp_path / "file" / "cache")


def test_a_full_disk_leaves_nothing(tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left"):
        Histories(tiny_dataset, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
