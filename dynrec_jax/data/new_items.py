"""Items that arrived after a dataset was prepared: read as `prepare --items` reads them, in the dataset's columns."""

import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.data.catalogue import count, one_row_an_item
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.engine import engine
from dynrec_jax.data.faults import machine_faults
from dynrec_jax.data.kinds import SET, TEXT, VECTOR
from dynrec_jax.data.sources.items import columns_in, read_items
from dynrec_jax.errors import DataError


class NewItems(NamedTuple):
    """Items that a dataset does not have.

    Attributes:
      table: rows as in `Dataset.items_table`; their indices follow the dataset's, in the order of the ids' bytes.
      known: how many items of the file are the dataset's, and were left out.
      repeated: rows whose item a row before them has.
      bare: new items of which the file holds nothing that the model reads.
      path: of the file.
    """

    table: pa.Table
    known: int
    repeated: int
    bare: int
    path: Path | None = None


def read_new_items(path: Path, dataset: Dataset, needed: set[str], graph: bool = False) -> NewItems:
    """Reads a file of items; columns that the model does not read are not looked at.

    Args:
      path: anything that `prepare --items` takes.
      dataset: whose items are known.
      needed: columns that the model reads, of which the file must have one at least; empty where it reads none.
      graph: whether the model reads the dataset's triples too, so that items without any column may be described.

    Raises:
      DataError: no such file, not what it must be, none of the columns, a column of another kind, no new item, or
        nothing that describes any.
    """
    own = dataset.items_table()
    with (
        tempfile.TemporaryDirectory(prefix="dynrec-") as folder,
        machine_faults(Path(folder)),
        engine(Path(folder)) as con,
    ):
        found = [name for name in columns_in(path) if name != "item_id"]
        columns = [name for name in own.column_names[2:] if name in found and name in needed]
        if needed and not columns:
            raise DataError(
                f"{path}: has the columns {', '.join(found) or 'none'}; the model describes items by "
                f"{', '.join(sorted(needed))}, expected one of these"
            )
        kinds = {name: _kind(own.schema.field(name).type) for name in columns}
        described, _ = read_items(con, path, tuple(columns), kinds)
        rows = count(described)
        table = one_row_an_item(described, columns).order_by("item_id").to_pyarrow()
    ids = table.column("item_id").cast(pa.string()).combine_chunks()
    new = pc.invert(pc.is_in(ids, value_set=dataset.item_ids().cast(pa.string())))
    fresh = table.filter(new)
    if not fresh.num_rows:
        raise DataError(f"{path}: all of its {table.num_rows:,} items are in the dataset; leave --items out")
    arrays: list[pa.Array | pa.ChunkedArray] = [
        pa.array(range(dataset.items + 1, dataset.items + 1 + fresh.num_rows), pa.int32()),
        fresh.column("item_id").cast(pa.string()),
    ]
    for name in own.column_names[2:]:
        kind = own.schema.field(name).type
        values = fresh.column(name) if name in columns else None
        if values is None or values.null_count == len(values):  # what holds nothing is of any kind
            arrays.append(pa.nulls(fresh.num_rows, kind))
        elif _kind(values.type) == _kind(kind):
            arrays.append(values.cast(kind))
        else:
            raise DataError(
                f"{path}: column {name!r} is {_kind(values.type)}; expected {_kind(kind)}, as the dataset's"
            )
    made = pa.table(arrays, names=own.column_names)
    empty = [pc.is_null(made.column(name)) for name in columns]
    bare = pc.sum(functools.reduce(pc.and_, empty)).as_py() if empty else 0
    if columns and not graph and bare == made.num_rows:
        raise DataError(
            f"{path}: none of its {bare:,} new items has anything in {', '.join(columns)}; expected what "
            "describes them"
        )
    return NewItems(made, table.num_rows - fresh.num_rows, rows - table.num_rows, bare, path)


def _kind(kind: pa.DataType) -> str:
    """Text, sets and vectors: no two of them are read as each other, for a set holds each value once."""
    if not pa.types.is_list(kind):
        return TEXT
    return VECTOR if pa.types.is_floating(kind.value_type) else SET
