"""Histories in memory-mapped Arrow: built once from the Parquet shards, then read without a copy.

The cache is one Arrow IPC file, a record batch a shard, uncompressed. The list columns' buffers all lie in one
mapping, so a history is a range of it, and a batch of histories one gather.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.data.arrow import numbers, to_arrow
from dynrec_jax.data.dataset import Dataset, shard_of
from dynrec_jax.errors import DataError, MachineError

VERSION = 1  # of the layout below
LISTS = {"items": np.int32, "times": np.int64, "events": np.int32}
SCHEMA = pa.schema(
    [
        ("user_id", pa.large_string()),
        ("items", pa.large_list(pa.int32())),
        ("times", pa.large_list(pa.int64())),
        ("events", pa.large_list(pa.int32())),
    ]
)


class Windows(NamedTuple):
    """Ranges of histories, padded with zeros on the right.

    Attributes:
      items: int32[B, W].
      times: int32[B, W], seconds since the dataset's first event; zeros where the data has no times.
      events: int32[B, W]; zeros where the data has no event types.
    """

    items: np.ndarray
    times: np.ndarray
    events: np.ndarray


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/dynrec_jax`, or `~/.cache/dynrec_jax`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dynrec_jax"


class Histories:
    """The histories of some shards, memory-mapped.

    Users are numbered in the order of their shards, and within a shard by user id.

    Attributes:
      dataset: where they come from.
      shards: the shards held, in order.
      lengths: int64[U], events of each user.
      shard_first: int64[S], number of the first user of each of the dataset's shards (0 for shards not held).
      shard_users: int64[S], users of each shard (0 for shards not held).
    """

    def __init__(self, dataset: Dataset, cache_dir: str | Path = "", shards: range | None = None):
        """Maps the cache of `shards` (all by default), building it where it is not there yet.

        Raises:
          DataError: a shard's Parquet is missing, damaged or not the one that `dataset.json` names.
          MachineError: the cache cannot be written.
        """
        self.dataset = dataset
        self.shards = range(dataset.shards) if shards is None else shards
        path = _build(dataset, Path(cache_dir) if cache_dir else default_cache_dir(), self.shards)
        self._mapping = pa.memory_map(str(path)).read_buffer()
        reader = pa.ipc.open_file(pa.BufferReader(self._mapping))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.shard_first = np.zeros(dataset.shards, np.int64)
        self.shard_users = np.zeros(dataset.shards, np.int64)
        users = 0
        for shard, batch in zip(self.shards, self._batches, strict=True):
            self.shard_first[shard], self.shard_users[shard] = users, batch.num_rows
            users += batch.num_rows
        self.lengths = self._join([np.diff(_offsets(b.column("items"))) for b in self._batches])
        self._start = {
            name: self._join([self._starts(b.column(name), kind) for b in self._batches])
            for name, kind in LISTS.items()
        }
        self._flat = {
            name: np.frombuffer(self._mapping, kind, self._mapping.size // np.dtype(kind).itemsize)
            for name, kind in LISTS.items()
        }

    @staticmethod
    def _join(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([*parts, np.zeros(0, np.int64)])

    def _starts(self, column: pa.Array, kind: type) -> np.ndarray:
        """Where each list of a column begins, counted in elements from the start of the mapping."""
        values = column.values.buffers()[1]
        if values is None:
            return np.zeros(len(column), np.int64)
        first = (values.address - self._mapping.address) // np.dtype(kind).itemsize
        return first + _offsets(column)[:-1]

    @property
    def users(self) -> int:
        """U, users of the shards held."""
        return len(self.lengths)

    def ids_of(self, users_U: np.ndarray) -> list[str]:
        """Ids of some users."""
        return self.id_column(users_U).to_pylist()

    def id_column(self, users_U: np.ndarray) -> pa.Array:
        """Ids of some users as Arrow's strings."""
        found, places = [pa.nulls(0, pa.large_string())], [np.zeros(0, np.int64)]
        first = 0
        for batch in self._batches:
            here = np.nonzero((users_U >= first) & (users_U < first + batch.num_rows))[0]
            if len(here):
                found.append(batch.column("user_id").take(to_arrow(users_U[here] - first)))
                places.append(here)
            first += batch.num_rows
        return pa.concat_arrays(found).take(to_arrow(np.argsort(np.concatenate(places))))

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> Windows:
        """The last `size` events before event number `end` of each user; a user of -1 gives an empty row."""
        real_B = users_B >= 0
        user_B = np.where(real_B, users_B, 0)
        ends_B = np.where(real_B, ends_B, 0)
        starts_B = np.maximum(ends_B - size, 0)
        at_BxW = starts_B[:, None] + np.arange(size)
        inside = at_BxW < ends_B[:, None]
        items = self._gather("items", user_B, at_BxW, inside)
        zeros = np.zeros_like(items)
        times = zeros
        if self.dataset.has_times:
            seconds = self._gather("times", user_B, at_BxW, inside)
            times = np.where(inside, from_start(seconds, self.dataset.first_time or 0), 0)
        events = self._gather("events", user_B, at_BxW, inside) if self.dataset.has_events else zeros
        return Windows(items, times, events)

    def last_items(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
        """int32[B, size], the items of `windows` alone."""
        real_B = users_B >= 0
        ends_B = np.where(real_B, ends_B, 0)
        at_BxW = np.maximum(ends_B - size, 0)[:, None] + np.arange(size)
        return self._gather("items", np.where(real_B, users_B, 0), at_BxW, at_BxW < ends_B[:, None])

    def asked(self, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        """int32[B], the time of event number `end` of each user, as `Windows.times`.

        Where a history has no such event, as if it was asked for when the log ended. Zeros where there are no times.
        """
        dataset = self.dataset
        if dataset.first_time is None:
            return np.zeros(len(users_B), np.int32)
        there_B = (users_B >= 0) & (ends_B < self.lengths[users_B] if self.users else False)
        seconds_B = self._gather("times", np.where(there_B, users_B, 0), ends_B, there_B)
        seconds_B = np.where(there_B, seconds_B, int(dataset.info["last_time"]))
        return from_start(seconds_B, dataset.first_time)

    def first_target(
        self, types: frozenset[int] | None, start_U: np.ndarray, stop_U: np.ndarray
    ) -> np.ndarray:
        """int64[U], the first event of some types among `start` to `stop - 1` of each user; -1 for none."""
        return self._target(types, start_U, stop_U, last=False)

    def last_target(
        self, types: frozenset[int] | None, start_U: np.ndarray, stop_U: np.ndarray
    ) -> np.ndarray:
        """As `first_target`, the last one."""
        return self._target(types, start_U, stop_U, last=True)

    def _target(
        self, types: frozenset[int] | None, start_U: np.ndarray, stop_U: np.ndarray, last: bool
    ) -> np.ndarray:
        start_U, stop_U = np.maximum(start_U, 0).astype(np.int64), np.asarray(stop_U, np.int64)
        if types is None:
            found_U = stop_U - 1 if last else start_U
        else:
            found, first = [], 0
            for batch in self._batches:
                users = slice(first, first + batch.num_rows)
                first += batch.num_rows
                column = batch.column("events")
                offset = _offsets(column)[:-1]
                is_target = np.isin(numbers(column.values), list(types))
                # Where they stand in order: the next one from an event on, or the last before one.
                places = np.append(np.flatnonzero(is_target), np.iinfo(np.int64).max)
                if last:
                    at = np.searchsorted(places, offset + stop_U[users], side="left") - 1
                    found.append(np.where(at < 0, -1, places[np.maximum(at, 0)] - offset))
                else:
                    at = np.searchsorted(places, offset + start_U[users], side="left")
                    found.append(places[at] - offset)
            found_U = self._join(found)
        return np.where((found_U >= start_U) & (found_U < stop_U), found_U, -1)

    @property
    def keys(self) -> np.ndarray:
        """int64[U], a number of each user that does not depend on which shards are held: place · S + shard."""
        parts = [np.arange(self.shard_users[s]) * self.dataset.shards + s for s in self.shards]
        return self._join(parts)

    def event_at(self, users_B: np.ndarray, at_B: np.ndarray) -> np.ndarray:
        """int32[B], type of event number `at` of each user."""
        return self._flat["events"][self._start["events"][users_B] + at_B]

    def item_at(self, users_B: np.ndarray, at_B: np.ndarray) -> np.ndarray:
        """int32[B], item of event number `at` of each user."""
        return self._flat["items"][self._start["items"][users_B] + at_B]

    def _gather(self, name: str, users_B: np.ndarray, at_BxW: np.ndarray, inside: np.ndarray) -> np.ndarray:
        if not self.users:  # all shards held are empty
            return np.zeros(inside.shape, LISTS[name])
        starts_B = self._start[name][users_B]
        place = np.where(inside, (starts_B[:, None] if at_BxW.ndim == 2 else starts_B) + at_BxW, 0)
        return np.where(inside, self._flat[name][place], 0)

    def times_from(self, moment: int) -> np.ndarray:
        """int64, times of all events from a moment on (seconds since 1970), in no order."""
        parts = [numbers(batch.column("times").values) for batch in self._batches]
        return self._join([times[times >= moment] for times in parts])

    def count_before(self, moment: int) -> np.ndarray:
        """int64[U], events of each user before a moment (seconds since 1970)."""
        parts = []
        for batch in self._batches:
            column = batch.column("times")
            early = np.concatenate([[0], np.cumsum(numbers(column.values) < moment)])
            offsets = _offsets(column)
            parts.append(early[offsets[1:]] - early[offsets[:-1]])
        return self._join(parts)

    def events_before(self, ends_U: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Users int64[E], items int32[E], times int32[E] (as in `Windows`) of events before number `end` of each user.

        Users one after the other, each oldest first.
        """
        users, items, times, first = [], [], [], 0
        for batch in self._batches:
            column = batch.column("items")
            offsets = _offsets(column)
            ends = ends_U[first : first + batch.num_rows]
            length = np.diff(offsets)
            kept = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length) < np.repeat(ends, length)
            users.append(np.repeat(np.arange(first, first + batch.num_rows), length)[kept])
            items.append(numbers(column.values)[kept])
            if self.dataset.has_times:
                times.append(
                    from_start(numbers(batch.column("times").values)[kept], self.dataset.first_time or 0)
                )
            else:
                times.append(np.zeros(int(kept.sum()), np.int32))
            first += batch.num_rows
        return self._join(users), self._join(items).astype(np.int32), self._join(times).astype(np.int32)

    def item_counts(
        self, ends_U: np.ndarray, starts_U: np.ndarray | None = None, since: int | None = None
    ) -> np.ndarray:
        """int64[N + 1], events of each item before event number `end` of every user.

        Args:
          ends_U: int64[U].
          starts_U: int64[U], count from these events on; from the first where not given.
          since: count events from this moment on (seconds since 1970).
        """
        counts = np.zeros(self.dataset.items + 1, np.int64)
        first = 0
        for batch in self._batches:
            column = batch.column("items")
            offsets = _offsets(column)
            users = slice(first, first + batch.num_rows)
            first += batch.num_rows
            length = np.diff(offsets)
            at = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length)
            chosen = at < np.repeat(ends_U[users], length)
            if starts_U is not None:
                chosen &= at >= np.repeat(starts_U[users], length)
            if since is not None:
                chosen &= numbers(batch.column("times").values) >= since
            items = numbers(column.values)
            counts += np.bincount(items[chosen], minlength=len(counts))
        return counts

    def _before(self, ends_U: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Of each shard, its users, and of their events before number `end` the user, from 0, and the item."""
        first = 0
        for batch in self._batches:
            column = batch.column("items")
            offsets = _offsets(column)
            users = slice(first, first + batch.num_rows)
            first += batch.num_rows
            length = np.diff(offsets)
            row = np.repeat(np.arange(batch.num_rows), length)
            kept = np.arange(offsets[-1]) - offsets[:-1][row] < ends_U[users][row]
            yield users, row[kept], numbers(column.values)[kept]

    def holders(self, ends_U: np.ndarray) -> np.ndarray:
        """int64[N + 1], users who have each item among their events before number `end`."""
        most = self.dataset.items + 1
        counts = np.zeros(most, np.int64)
        for _, row, items in self._before(ends_U):
            counts += np.bincount(np.unique(row * most + items) % most, minlength=most)
        return counts

    def means(self, values_N: np.ndarray, ends_U: np.ndarray) -> np.ndarray:
        """float64[U], the mean of `values[item]` over each user's events before number `end`; NaN for no event."""
        found_U = np.full(self.users, np.nan)
        for users, row, items in self._before(ends_U):
            count = np.bincount(row, minlength=users.stop - users.start)
            total = np.bincount(row, values_N[items], minlength=len(count))
            found_U[users] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return found_U

    def numbers_of(self, ids: pa.Array) -> np.ndarray:
        """int64, numbers of users by their ids (strings); -1 for one of no shard held."""
        shards = np.array([shard_of(user, self.dataset.shards) for user in ids.to_pylist()], np.int64)
        found = np.full(len(ids), -1, np.int64)
        for shard in np.unique(shards):
            if shard in self.shards:
                here = np.flatnonzero(shards == shard)
                column = self._batches[self.shards.index(shard)].column("user_id")
                places = pc.index_in(ids.take(to_arrow(here)).cast(column.type), value_set=column)
                at = numbers(places.fill_null(-1))
                found[here] = np.where(at < 0, -1, self.shard_first[shard] + at)
        return found


def from_start(seconds: np.ndarray, first_time: int) -> np.ndarray:
    """int32, seconds since a log's first event from seconds since 1970, no further than int32 counts."""
    return np.clip(seconds - first_time, 0, np.iinfo(np.int32).max).astype(np.int32)


def _offsets(column: pa.Array) -> np.ndarray:
    """int64[rows + 1]; a null list has no elements."""
    return numbers(column.offsets).astype(np.int64, copy=False)


def _build(dataset: Dataset, cache_dir: Path, shards: range) -> Path:
    folder = cache_dir / f"v{VERSION}-{dataset.content[:32]}"
    path = folder / f"{shards.start:05d}-{shards.stop:05d}-{shards.step:05d}-of-{dataset.shards:05d}.arrow"
    if path.exists():
        return path
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: processes of other machines, with the same number, may share the folder.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
        temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with pa.ipc.new_file(file, SCHEMA) as writer:
                for shard in shards:
                    batch = _shard_batch(dataset, shard)
                    with _writing(folder):
                        writer.write_batch(batch)
            with _writing(folder):
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{folder}: the cache of the dataset cannot be written ({error}); set --cache_dir"
        ) from None


def _shard_batch(dataset: Dataset, shard: int) -> pa.RecordBatch:
    try:
        table = dataset.read_shard(shard).select(SCHEMA.names).cast(SCHEMA).combine_chunks()
    except (pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{dataset.path}: shard {shard} has other columns ({reason}); prepare the dataset again"
        ) from None
    if table.num_rows == 0:
        return pa.RecordBatch.from_pylist([], schema=SCHEMA)
    return table.to_batches()[0]
