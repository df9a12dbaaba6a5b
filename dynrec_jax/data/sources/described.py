"""What describes items, on its way into the engine: columns of text, sets of ids, vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ibis.backends.duckdb import Backend

from dynrec_jax.data.arrow import numbers, to_arrow
from dynrec_jax.data.engine import load
from dynrec_jax.data.kinds import ARROW, PLACE, TEXT
from dynrec_jax.data.sources.text import SPACES, clean_column
from dynrec_jax.errors import DataError

ID = "item_id"


def load_described(
    con: Backend,
    name: str,
    kinds: dict[str, str],
    batches: Iterable[tuple[list[pa.Array], pa.Array]],
    where: str,
) -> ir.Table:
    """Loads what describes items into a table of the engine: item_id, the columns, and place; text is cleaned.

    Args:
      con: The engine.
      name: The table's name.
      kinds: Kind of each column, in their order.
      batches: Pairs of arrays (item ids, then the columns, of their kinds' types) and places.
      where: The file, for messages.

    Raises:
      DataError: No rows.
    """
    fields = [(column, ARROW[kind]) for column, kind in kinds.items()]
    schema = pa.schema([(ID, pa.string()), *fields, (PLACE, pa.int64())])
    texts = [i for i, kind in enumerate(kinds.values(), 1) if kind == TEXT]

    def cleaned() -> Iterator[pa.RecordBatch]:
        for arrays, places in batches:
            for i in texts:
                arrays[i] = clean_column(arrays[i])
            yield pa.record_batch([*arrays, places], schema=schema)

    table = load(con, name, schema, cleaned())
    if not table.count().to_pyarrow().as_py():
        raise DataError(f"{where}: no rows; expected at least one item")
    return table


def numbered(batches: Iterable[list[pa.Array]]) -> Iterator[tuple[list[pa.Array], pa.Array]]:
    """Arrays with their row, from 1, as the place."""
    start = 1
    for arrays in batches:
        size = len(arrays[0])
        yield list(arrays), to_arrow(np.arange(start, start + size))
        start += size


def set_of(value: list[Any] | str | int | None) -> list[str] | None:
    """Ids of a set as strings, each once, in their order; None where there is none. A value alone is a set of one."""
    values = value if isinstance(value, list) else [value]
    found = dict.fromkeys(SPACES.sub(" ", str(each)).strip() for each in values if each is not None)
    found.pop("", None)
    return list(found) or None


class Vectors:
    """Checks the vectors of one column, batch by batch.

    Args:
      column: Name of the column, for messages.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._length: int | None = None
        self._first = ""

    def checked(self, values: pa.Array, where: Callable[[int], str]) -> pa.Array:
        """Lists of numbers as lists of float32; null where there is none.

        Args:
          values: Lists of numbers.
          where: Index in `values` as a place, for messages.

        Raises:
          DataError: A vector of another length than the first, or with a value that is not a finite float32.
        """
        lists = values.cast(pa.list_(pa.float64()))
        length_N = numbers(pc.fill_null(pc.list_value_length(lists), 0))
        there_N = length_N > 0
        if not there_N.any():
            return pa.nulls(len(values), pa.list_(pa.float32()))
        if self._length is None:
            first = int(there_N.argmax())
            self._length, self._first = int(length_N[first]), where(first)
        for row in np.flatnonzero(there_N & (length_N != self._length))[:1]:
            raise DataError(
                f"{where(row)}: column {self._column!r} has a vector of {length_N[row]} numbers; expected "
                f"{self._length}, as in {self._first}"
            )
        with np.errstate(over="ignore"):
            flat = numbers(pc.fill_null(pc.list_flatten(lists), np.nan)).astype(np.float32)
        for bad in np.flatnonzero(~np.isfinite(flat))[:1]:
            row = np.flatnonzero(there_N)[bad // self._length]
            found = pc.list_flatten(lists)[bad].as_py()
            raise DataError(
                f"{where(row)}: column {self._column!r} has a vector with {found} in it; expected finite numbers"
            )
        ends = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32)
        return pa.ListArray.from_arrays(to_arrow(ends), to_arrow(flat), mask=pa.array(~there_N))
