"""`--items=FILE`: what describes the items, as CSV, Parquet or JSON lines with a column `item_id`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend

from dynrec_jax.data.catalogue import chosen_columns
from dynrec_jax.data.engine import load
from dynrec_jax.data.sources.lines import line_blocks, require_file
from dynrec_jax.data.sources.tabular import (
    as_text,
    check_type,
    csv_batches,
    csv_header,
    csv_line,
    is_parquet,
    parquet_batches,
    parquet_schema,
)
from dynrec_jax.errors import DataError

ID = "item_id"
TABLE = "raw_items_file"


def read_items(con: Backend, path: Path, wanted: tuple[str, ...]) -> tuple[ir.Table, list[str]]:
    """Reads a file that describes items; gives item_id, place and the kept columns, and those columns' names.

    Args:
      con: The engine.
      path: The file.
      wanted: Columns to keep; empty keeps all.

    Raises:
      DataError: No such file, no column `item_id` or none of a name in `wanted`; a row without an id.
    """
    require_file(path, f"CSV, Parquet or JSON lines with a column {ID!r}")
    if is_parquet(path):
        return read_parquet(con, path, wanted)
    return read_json(con, path, wanted) if is_json(path) else read_csv(con, path, wanted)


def is_json(path: Path) -> bool:
    """Whether the first thing in a file is an object."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def keep(path: Path, found: list[str], wanted: tuple[str, ...]) -> list[str]:
    """Columns to keep; DataError where the id or one that is wanted is not there."""
    if ID not in found:
        raise DataError(f"{path}: no column {ID!r}; found {', '.join(found)}")
    if twice := [
        name for name in found if found.count(name) > 1 and (name == ID or not wanted or name in wanted)
    ]:
        raise DataError(f"{path}: {found.count(twice[0])} columns are named {twice[0]!r}; expected one")
    return chosen_columns(str(path), found, wanted)


def placed(
    con: Backend, path: Path, columns: list[str], batches: Iterator[list[pa.Array]]
) -> tuple[ir.Table, list[str]]:
    """Loads arrays (id first, then the columns) with their row as the place."""
    schema = pa.schema([(ID, pa.string()), *((name, pa.string()) for name in columns), ("place", pa.int64())])

    def numbered() -> Iterator[pa.RecordBatch]:
        start = 1
        for arrays in batches:
            size = len(arrays[0])
            yield pa.record_batch([*arrays, pa.array(range(start, start + size), pa.int64())], schema=schema)
            start += size

    return load(con, TABLE, schema, numbered()), columns


def refuse_without_id(ids: pa.Array, where: Any) -> None:
    """Raises DataError at the first row whose id is missing; `where` makes its index a place."""
    for index, value in enumerate(ids.to_pylist() if ids.null_count else ()):
        if not value:
            raise DataError(f"{where(index)}: no {ID}; expected one in every row")


def read_csv(con: Backend, path: Path, wanted: tuple[str, ...]) -> tuple[ir.Table, list[str]]:
    """Reads CSV; every value stays the text that it is."""
    columns = keep(path, csv_header(path), wanted)

    def batches() -> Iterator[list[pa.Array]]:
        done = 1
        for batch in csv_batches(path, [ID, *columns]):
            refuse_without_id(batch.column(0), lambda i: f"{path}:{csv_line(path, done + i)}")  # noqa: B023
            yield batch.columns
            done += batch.num_rows

    return placed(con, path, columns, batches())


def read_parquet(con: Backend, path: Path, wanted: tuple[str, ...]) -> tuple[ir.Table, list[str]]:
    """Reads Parquet; numbers become their text, lists are joined by commas."""
    schema = parquet_schema(path)
    columns = keep(path, schema.names, wanted)
    check_type(path, ID, schema.field(ID).type, "item")

    def batches() -> Iterator[list[pa.Array]]:
        done = 1
        for batch in parquet_batches(path, [ID, *columns]):
            arrays = [column_text(path, name, batch.column(i)) for i, name in enumerate([ID, *columns])]
            refuse_without_id(arrays[0], lambda i: f"{path}: row {done + i}")  # noqa: B023
            yield arrays
            done += batch.num_rows

    return placed(con, path, columns, batches())


def column_text(path: Path, name: str, values: pa.Array) -> pa.Array:
    """A column's values as text, nested ones value by value."""
    if pa.types.is_nested(values.type):
        return pa.array([value_text(value) for value in values.to_pylist()], pa.string())
    if pa.types.is_temporal(values.type):
        return values.cast(pa.string())
    return as_text(path, name, values)


def value_text(value: Any) -> str | None:
    """A value of JSON as text: lists joined by commas, objects as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(text for text in map(value_text, value) if text)
    return json.dumps(value, ensure_ascii=False, default=str)


def read_json(con: Backend, path: Path, wanted: tuple[str, ...]) -> tuple[ir.Table, list[str]]:
    """Reads JSON lines; a key that an object lacks is null."""
    found: dict[str, None] = {}
    for line, row in json_rows(path):
        found.update(dict.fromkeys(row))
        if ID in row and (isinstance(row[ID], bool) or not isinstance(row[ID], str | int)):
            raise DataError(f"{path}:{line}: {ID} {row[ID]!r}; expected a string or a whole number")
        if row.get(ID, "") == "":
            raise DataError(f"{path}:{line}: no {ID}; expected one in every row")
    columns = keep(path, list(found), wanted)

    def batches() -> Iterator[list[pa.Array]]:
        block: list[list[str | None]] = []
        for _, row in json_rows(path):
            block.append([value_text(row.get(name)) for name in (ID, *columns)])
            if len(block) == 10_000:
                yield [pa.array(values, pa.string()) for values in zip(*block, strict=True)]
                block = []
        if block:
            yield [pa.array(values, pa.string()) for values in zip(*block, strict=True)]

    return placed(con, path, columns, batches())


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, object); DataError where a line is none."""
    for first, lines in line_blocks(path):
        for line, text in enumerate(lines, first):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}:{line}: not JSON ({error}); expected an object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{line}: {type(row).__name__}; expected a JSON object a line")
            yield line, row
