"""Who is scored: a file of user ids, or of whole new histories."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.data.cache import Windows, from_start
from dynrec_jax.data.units import UNIT_LESS, UNITS
from dynrec_jax.errors import DataError
from dynrec_jax.score.files import read_file, strings

USER = ("user_id", "user")
LISTS = ("item_ids", "items")


@dataclasses.dataclass(frozen=True)
class NewHistories:
    """Histories from a file, in memory; cuts them as `Histories` does.

    Attributes:
      users: ids, in the order of the file.
      items: int32, item indices of all histories, one after the other.
      starts: int64[U + 1], where each history begins in `items`.
      times: int32, seconds since the dataset's first event, as `items`; None where the file has none.
      events: int32, event types as the dataset counts them, 0 for none and for unknown ones, as `items`.
      moment: when recommendations are asked for: with the last event of the file.
      unknown_items: events left out because the model knows no such item.
      empty_users: users left out because no event was left.
    """

    users: list[str]
    items: np.ndarray
    starts: np.ndarray
    times: np.ndarray | None
    events: np.ndarray
    moment: int
    unknown_items: int
    empty_users: int

    @property
    def lengths(self) -> np.ndarray:
        """int64[U], events of each history."""
        return np.diff(self.starts)

    def last_items(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
        """int32[B, size], the last items before event number `end` of each user; a user of -1 has none."""
        return self.windows(users_B, ends_B, size).items

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> Windows:
        """The last events before event number `end` of each user, as `data.cache.Histories` gives them."""
        real_B = users_B >= 0
        ends_B = np.where(real_B, ends_B, 0)
        at_BxW = np.maximum(ends_B - size, 0)[:, None] + np.arange(size)
        inside = at_BxW < ends_B[:, None]
        place = np.where(inside, self.starts[np.where(real_B, users_B, 0)][:, None] + at_BxW, 0)
        items, times, events = (
            np.zeros(place.shape, np.int32) if column is None else np.where(inside, column[place], 0)
            for column in (self.items, self.times, self.events)
        )
        return Windows(items, times, events)

    def asked(self, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        """int32[B], `moment`."""
        return np.full(len(users_B), self.moment, np.int32)


def read_table(path: Path) -> pa.Table:
    """A CSV or Parquet file with a column `user_id` of strings, so that `001` stays `001`.

    Raises:
      DataError: no such file, not readable, empty, or without a column of users that each row fills.
    """
    table = read_file(path, USER[0])
    names = table.column_names
    user = next((name for name in USER if name in names), None)
    if user is None:
        raise DataError(f"{path}: has the columns {', '.join(names)}; expected one named user_id")
    if table.num_rows == 0:
        raise DataError(f"{path}: holds no users")
    users = strings(table.column(user), user, path)
    if users.null_count:
        row = pc.index(users.is_null(), True).as_py() + 1
        raise DataError(f"{path}: row {row} has no {user}; expected one in every row")
    return table.set_column(names.index(user), "user_id", users)


def has_histories(table: pa.Table) -> bool:
    """Whether a users file brings its own histories: a list of items a row, or an item a row."""
    return "item" in table.column_names or any(name in table.column_names for name in LISTS)


class _Events(NamedTuple):
    """Events of a file, those of a user in their order.

    Attributes:
      users: ids.
      parents: int64, number of each event's user.
      items: ids of items.
      times: int64, seconds since 1970; None where the file has none.
      types: names of event types; None where the file has none.
    """

    users: list[str]
    parents: np.ndarray
    items: pa.Array
    times: np.ndarray | None
    types: pa.Array | None


def new_histories(
    table: pa.Table,
    item_ids: pa.Array,
    path: Path | None,
    first_time: int | None = None,
    event_types: Sequence[str] = (),
    until: int | None = None,
) -> NewHistories:
    """Histories of a users file; unknown items are left out and counted.

    Args:
      table: as `read_table` gives it: a list of items a row, oldest first, or an item a row, ordered by a column
        `time` where there is one and by row where there is not. Lists may have lists `times` and `events` beside them,
        rows a column `event`.
      item_ids: of the items that are known, by index.
      path: of the file, for messages.
      first_time: of the dataset, in seconds since 1970.
      event_types: of the dataset, by index from 1.
      until: events from this moment on, in seconds since 1970, are left out; None leaves out none.

    Raises:
      DataError: a column of another type, a user with two lists, or no known item at all; no times and an `until`.
    """
    place = path or Path("users")
    lists = next((name for name in LISTS if name in table.column_names), None)
    found = _of_lists(table, lists, place) if lists else _of_rows(table, place)
    index = pc.index_in(found.items, item_ids.cast(pa.string()))
    known = index.is_valid().to_numpy(zero_copy_only=False)
    unknown = int((~known).sum())
    if until is not None:
        if found.times is None:
            raise DataError(f"{place}: has no times, and --until asks for them; expected a column time")
        known = known & (found.times < until)
        index = pc.if_else(pa.array(known), index, pa.scalar(None, index.type))
    parents, numbers = found.parents[known], index.drop_null().to_numpy().astype(np.int32) + 1
    order = np.argsort(parents, kind="stable")
    counts = np.bincount(parents, minlength=len(found.users))
    kept = np.nonzero(counts)[0]
    if len(kept) == 0:
        raise DataError(
            f"{place}: no item of these histories is in the model's catalogue of {len(item_ids):,} items"
            + ("" if until is None else ", and before --until")
        )
    times = None if found.times is None else from_start(found.times, first_time or 0)[known][order]
    events = np.zeros(len(numbers), np.int32)
    if found.types is not None and event_types:
        type_ = pc.fill_null(pc.index_in(found.types, pa.array(event_types, pa.string())), -1)
        events = type_.to_numpy(zero_copy_only=False)[known][order].astype(np.int32) + 1
    return NewHistories(
        users=[found.users[i] for i in kept],
        items=numbers[order],
        starts=np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64),
        times=times,
        events=events,
        moment=0 if times is None else int(times.max()),
        unknown_items=unknown,
        empty_users=len(found.users) - len(kept),
    )


def _of_lists(table: pa.Table, name: str, path: Path) -> _Events:
    """Of a table with a list of items a row."""
    column = table.column(name).combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{path}: column {name} is {column.type}; expected lists of item ids, oldest first")
    users = table.column("user_id").to_pylist()
    if len(set(users)) < len(users):
        twice = Counter(users).most_common(1)[0][0]
        raise DataError(f"{path}: user {twice!r} has two rows; expected one list a user")
    items = strings(pa.chunked_array([pc.list_flatten(column)]), name, path)

    def beside(other: str) -> pa.ChunkedArray | None:
        """The values of another column of lists."""
        if other not in table.column_names:
            return None
        values = table.column(other).combine_chunks()
        lists = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        if not lists or not _lengths(values).equals(_lengths(column)):
            raise DataError(f"{path}: column {other}: expected a list as long as {name} in each row")
        return pa.chunked_array([pc.list_flatten(values)])

    times, types = beside("times"), beside("events")
    return _Events(
        users,
        pc.list_parent_indices(column).to_numpy(),
        items,
        None if times is None else _seconds(times, path),
        None if types is None else _names(types, "events", path),
    )


def _lengths(lists: pa.Array) -> pa.Array:
    """int64 lengths of lists; none is an empty one."""
    return pc.fill_null(pc.list_value_length(lists).cast(pa.int64()), 0)


def _names(column: pa.ChunkedArray, name: str, path: Path) -> pa.Array | None:
    """Names of event types; None where the column has none at all."""
    return None if pa.types.is_null(column.type) else strings(column, name, path)


def _of_rows(table: pa.Table, path: Path) -> _Events:
    """Of a table with an item a row."""
    times = None
    if "time" in table.column_names:
        seconds = _seconds(table.column("time"), path)
        # By the column itself, which may be finer than seconds; equal times stay in the order of the rows.
        number = pa.array(np.arange(table.num_rows))
        keys = pa.table({"time": table.column("time"), "row": number})
        order = pc.sort_indices(keys, sort_keys=[("time", "ascending"), ("row", "ascending")])
        table, times = table.take(order), seconds[order.to_numpy()]
    encoded = table.column("user_id").combine_chunks().dictionary_encode()
    parents = encoded.indices.to_numpy(zero_copy_only=False)
    items = strings(table.column("item"), "item", path)
    types = _names(table.column("event"), "event", path) if "event" in table.column_names else None
    return _Events(encoded.dictionary.to_pylist(), parents, items, times, types)


def _seconds(times: pa.ChunkedArray, path: Path) -> np.ndarray:
    """int64, whole seconds since 1970; DataError for what is no time.

    Numbers may be finer units, which are told by their size as `prepare` does, all in one unit.
    """
    _check_times(times, path)
    if pa.types.is_temporal(times.type):
        times = times.cast(pa.timestamp("s", getattr(times.type, "tz", None)), safe=False).cast(pa.int64())
        return np.asarray(times.combine_chunks().to_numpy(zero_copy_only=False), np.int64)
    values = times.combine_chunks().to_numpy(zero_copy_only=False)
    size = np.abs(values.astype(np.float64))
    telling = size[size >= UNIT_LESS]
    bounds = [bound for bound, _ in UNITS.values()]
    found = np.unique(np.searchsorted(bounds, telling, side="right"))
    if not np.isfinite(size).all() or (found >= len(bounds)).any():
        raise DataError(f"{path}: a time is no number of seconds, ms, us or ns since 1970")
    if len(found) > 1:
        names = [name for i, name in enumerate(UNITS) if i in found]
        raise DataError(
            f"{path}: times look like {' and like '.join(names)}; expected one unit in the whole column"
        )
    divisor = list(UNITS.values())[int(found[0]) if len(found) else 0][1]
    return (np.floor(values).astype(np.int64)) // divisor


def _check_times(times: pa.ChunkedArray, path: Path) -> None:
    """Raises DataError for times that cannot be ordered: text would sort 10 before 9."""
    kind = times.type
    if times.null_count:
        row = pc.index(times.is_null(), True).as_py() + 1
        raise DataError(f"{path}: row {row} has no time; expected one in every row, or no column time")
    moment = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or moment):
        row, text = next(((i, t) for i, t in enumerate(times.to_pylist(), 1) if not _is_number(t)), (1, kind))
        raise DataError(f"{path}: row {row}: time {text!r} is no number; expected seconds since 1970")


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True
