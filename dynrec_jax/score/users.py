"""Who is scored: a file of user ids, or of whole new histories."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from dynrec_jax.errors import DataError

USER = ("user_id", "user")
LISTS = ("item_ids", "items")


@dataclasses.dataclass(frozen=True)
class NewHistories:
    """Histories from a file, in memory; cuts them as `Histories` does.

    Attributes:
      users: ids, in the order of the file.
      items: int32, item indices of all histories, one after the other.
      starts: int64[U + 1], where each history begins in `items`.
      unknown_items: events left out because the model knows no such item.
      empty_users: users left out because no event was left.
    """

    users: list[str]
    items: np.ndarray
    starts: np.ndarray
    unknown_items: int
    empty_users: int

    @property
    def lengths(self) -> np.ndarray:
        """int64[U], events of each history."""
        return np.diff(self.starts)

    def last_items(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
        """int32[B, size], the last items before event number `end` of each user; a user of -1 has none."""
        real_B = users_B >= 0
        ends_B = np.where(real_B, ends_B, 0)
        at_BxW = np.maximum(ends_B - size, 0)[:, None] + np.arange(size)
        inside = at_BxW < ends_B[:, None]
        place = np.where(inside, self.starts[np.where(real_B, users_B, 0)][:, None] + at_BxW, 0)
        return np.where(inside, self.items[place], 0).astype(np.int32)


def read_table(path: Path) -> pa.Table:
    """A CSV or Parquet file with a column `user_id` of strings, so that `001` stays `001`.

    Raises:
      DataError: no such file, not readable, empty, or without a column of users that each row fills.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {found}; expected a CSV or Parquet file with a column user_id")
    try:
        table = pq.read_table(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv(path)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not readable as CSV or Parquet: {' '.join(str(error).split())}") from None
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: has the column {twice[0]} more than once; expected one of each name")
    user = next((name for name in USER if name in names), None)
    if user is None:
        raise DataError(f"{path}: has the columns {', '.join(names)}; expected one named user_id")
    if table.num_rows == 0:
        raise DataError(f"{path}: holds no users")
    users = _strings(table.column(user), user, path)
    if users.null_count:
        row = pc.index(users.is_null(), True).as_py() + 1
        raise DataError(f"{path}: row {row} has no {user}; expected one in every row")
    return table.set_column(names.index(user), "user_id", users)


def _read_csv(path: Path) -> pa.Table:
    with path.open("rb") as file:
        header = file.readline().decode("utf-8-sig").strip()
    names = [name.strip().strip('"') for name in header.split(",")]
    types = {name: pa.string() for name in names if name != "time"}
    # An empty field is no value; a user called NA or null is one.
    options = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
    return csv.read_csv(path, convert_options=options)


def _strings(column: pa.ChunkedArray, name: str, path: Path) -> pa.Array:
    """Ids as strings; raises DataError for a column that holds something else."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{path}: column {name} is {kind}; ids are strings or integers")
    # Two steps: Arrow casts no dictionary of integers to strings.
    return column.combine_chunks().cast(kind).cast(pa.string())


def has_histories(table: pa.Table) -> bool:
    """Whether a users file brings its own histories: a list of items a row, or an item a row."""
    return "item" in table.column_names or any(name in table.column_names for name in LISTS)


def new_histories(table: pa.Table, item_ids: pa.Array, path: Path | None) -> NewHistories:
    """Histories of a users file; unknown items are left out and counted.

    Args:
      table: as `read_table` gives it: a list of items a row, oldest first, or an item a row, ordered by a column
        `time` where there is one and by row where there is not.
      item_ids: of the items that are known, by index.
      path: of the file, for messages.

    Raises:
      DataError: a column of another type, a user with two lists, or no known item at all.
    """
    place = path or Path("users")
    lists = next((name for name in LISTS if name in table.column_names), None)
    users, parents, items = _of_lists(table, lists, place) if lists else _of_rows(table, place)
    index = pc.index_in(items, item_ids.cast(pa.string()))
    known = index.is_valid().to_numpy(zero_copy_only=False)
    parents, numbers = parents[known], index.drop_null().to_numpy().astype(np.int32) + 1
    order = np.argsort(parents, kind="stable")
    counts = np.bincount(parents, minlength=len(users))
    kept = np.nonzero(counts)[0]
    if len(kept) == 0:
        raise DataError(
            f"{place}: no item of these histories is in the model's catalogue of {len(item_ids):,} items"
        )
    return NewHistories(
        users=[users[i] for i in kept],
        items=numbers[order],
        starts=np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64),
        unknown_items=int((~known).sum()),
        empty_users=len(users) - len(kept),
    )


def _of_lists(table: pa.Table, name: str, path: Path) -> tuple[list[str], np.ndarray, pa.Array]:
    """Users, and for every event the number of its user and its item."""
    column = table.column(name).combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{path}: column {name} is {column.type}; expected lists of item ids, oldest first")
    users = table.column("user_id").to_pylist()
    if len(set(users)) < len(users):
        twice = next(user for i, user in enumerate(users) if user in users[:i])
        raise DataError(f"{path}: user {twice!r} has two rows; expected one list a user")
    items = _strings(pa.chunked_array([pc.list_flatten(column)]), name, path)
    return users, pc.list_parent_indices(column).to_numpy(), items


def _of_rows(table: pa.Table, path: Path) -> tuple[list[str], np.ndarray, pa.Array]:
    """As `_of_lists`, of a table with an item a row."""
    if "time" in table.column_names:
        _check_times(table.column("time"), path)
        number = pa.array(np.arange(table.num_rows))
        table = table.append_column("_row", number).sort_by([("time", "ascending"), ("_row", "ascending")])
    encoded = table.column("user_id").combine_chunks().dictionary_encode()
    parents = encoded.indices.to_numpy(zero_copy_only=False)
    return encoded.dictionary.to_pylist(), parents, _strings(table.column("item"), "item", path)


def _check_times(times: pa.ChunkedArray, path: Path) -> None:
    """Raises DataError for times that cannot be ordered: text would sort 10 before 9."""
    kind = times.type
    if times.null_count:
        row = pc.index(times.is_null(), True).as_py() + 1
        raise DataError(f"{path}: row {row} has no time; expected one in every row, or no column time")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind)):
        row, text = next(((i, t) for i, t in enumerate(times.to_pylist(), 1) if not _is_number(t)), (1, kind))
        raise DataError(f"{path}: row {row}: time {text!r} is no number; expected seconds since 1970")


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True
