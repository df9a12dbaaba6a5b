"""Who is scored: a file of user ids, or of whole new histories."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from dynrec_jax.data.cache import Windows
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.errors import DataError

USER = ("user_id", "user")
LISTS = ("item_ids", "items")


@dataclasses.dataclass(frozen=True)
class NewHistories:
    """Histories from a file, in memory; cuts windows as `Histories` does.

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

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> Windows:
        """The last `size` events before event number `end`; a user of -1 gives an empty row."""
        real_B = users_B >= 0
        ends_B = np.where(real_B, ends_B, 0)
        at_BxW = np.maximum(ends_B - size, 0)[:, None] + np.arange(size)
        inside = at_BxW < ends_B[:, None]
        place = np.where(inside, self.starts[np.where(real_B, users_B, 0)][:, None] + at_BxW, 0)
        items = np.where(inside, self.items[place], 0).astype(np.int32)
        return Windows(items, np.zeros_like(items), np.zeros_like(items))


def read_table(path: Path) -> pa.Table:
    """A CSV or Parquet file; ids as strings, so that `001` stays `001`.

    Raises:
      DataError: no such file, not readable, empty, or without a column of users.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a CSV or Parquet file with a column user_id")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pq.read_table(path)
        else:
            with path.open("rb") as file:
                header = file.readline().decode("utf-8-sig").strip()
            names = [name.strip().strip('"') for name in header.split(",")]
            types = {name: pa.string() for name in names if name != "time"}
            options = csv.ConvertOptions(column_types=types, strings_can_be_null=True)
            table = csv.read_csv(path, convert_options=options)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not readable as CSV or Parquet: {' '.join(str(error).split())}") from None
    user = next((name for name in USER if name in table.column_names), None)
    if user is None:
        raise DataError(
            f"{path}: has the columns {', '.join(table.column_names)}; expected one named user_id"
        )
    if table.num_rows == 0:
        raise DataError(f"{path}: holds no users")
    column = table.column(user)
    if pa.types.is_floating(column.type):
        raise DataError(f"{path}: column {user} is {column.type}; ids are strings or integers")
    return table.set_column(table.column_names.index(user), "user_id", column.cast(pa.string()))


def has_histories(table: pa.Table) -> bool:
    """Whether a users file brings its own histories: a list of items a row, or an item a row."""
    return "item" in table.column_names or any(name in table.column_names for name in LISTS)


def new_histories(table: pa.Table, dataset: Dataset, path: Path | None) -> NewHistories:
    """Histories of a users file; unknown items are left out and counted.

    Raises:
      DataError: a list column of another type, or no known item at all.
    """
    lists = next((name for name in LISTS if name in table.column_names), None)
    if lists is not None:
        column = table.column(lists).combine_chunks()
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise DataError(
                f"{path}: column {lists} is {column.type}; expected lists of item ids, oldest first"
            )
        parents = pc.list_parent_indices(column).to_numpy()
        items = pc.list_flatten(column).cast(pa.string())
        users = table.column("user_id").to_pylist()
    else:
        if "time" in table.column_names:
            number = pa.array(np.arange(table.num_rows))
            table = table.append_column("_row", number).sort_by(
                [("time", "ascending"), ("_row", "ascending")]
            )
        encoded = table.column("user_id").combine_chunks().dictionary_encode()
        users = encoded.dictionary.to_pylist()
        parents = encoded.indices.to_numpy(zero_copy_only=False)
        items = table.column("item").combine_chunks().cast(pa.string())
    index = pc.index_in(items, dataset.item_ids().cast(pa.string()))
    known = index.is_valid().to_numpy(zero_copy_only=False)
    parents, numbers = parents[known], index.drop_null().to_numpy().astype(np.int32) + 1
    order = np.argsort(parents, kind="stable")
    counts = np.bincount(parents, minlength=len(users))
    kept = np.nonzero(counts)[0]
    if len(kept) == 0:
        raise DataError(
            f"{path}: no item of these histories is in the model's catalogue of {dataset.items:,} items"
        )
    return NewHistories(
        users=[users[i] for i in kept],
        items=numbers[order],
        starts=np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64),
        unknown_items=int((~known).sum()),
        empty_users=len(users) - len(kept),
    )
