"""`table:FILE`: CSV or Parquet with named columns; `table:logs/*.parquet` reads several, sorted by name."""

import glob
from collections.abc import Iterator
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa

from dynrec_jax.data.sources.columns import pick
from dynrec_jax.data.sources.lines import FILE_SHIFT, require_file
from dynrec_jax.data.sources.source import Columns, Job, Source, finish, raw_schema
from dynrec_jax.data.sources.tabular import (
    as_text,
    check_type,
    csv_batches,
    csv_header,
    csv_line,
    is_parquet,
    is_time,
    parquet_batches,
    parquet_schema,
)
from dynrec_jax.errors import DataError

DEFAULTS = Columns("user", "item", "time", "event", "rating")
TIMESTAMP = "timestamp"


def read(job: Job) -> Source:
    """Reads one or several CSV or Parquet files of the same columns.

    Raises:
      DataError: No such file, a column that is not there or has another type than it must.
    """
    return read_files(job, files(job.path), f"table:{Path(job.path).name}", DEFAULTS)


def files(path: str) -> list[Path]:
    """The files that a path or a pattern names, sorted."""
    expected = "a CSV or Parquet file"
    if Path(path).exists() or not glob.has_magic(path):
        return [require_file(Path(path), expected)]
    found = [require_file(Path(name), expected) for name in sorted(glob.glob(path))]
    if not found:
        raise DataError(f"{path}: no file matches; expected {expected}")
    return found


def read_files(
    job: Job, paths: list[Path], name: str, defaults: Columns, items: ir.Table | None = None
) -> Source:
    """Reads files that have the same columns, in order."""
    picked = [(path, roles(path, job.columns, defaults)) for path in paths]
    first = picked[0]
    for path, (columns, unit) in picked:
        if (columns.keys(), unit) != (first[1][0].keys(), first[1][1]):
            raise DataError(f"{path}: has other columns than {first[0]}; expected the same in all files")
    columns, unit = first[1]
    schema = raw_schema("time" in columns, "event" in columns, "rating" in columns)

    def batches() -> Iterator[pa.RecordBatch]:
        for number, (path, (columns, _)) in enumerate(picked):
            yield from file_batches(path, columns, schema, number << FILE_SHIFT)

    def where(place: int) -> str:
        path, record = paths[place >> FILE_SHIFT], place & ((1 << FILE_SHIFT) - 1)
        return f"{path}: row {record}" if is_parquet(path) else f"{path}:{csv_line(path, record)}"

    return finish(job, name, schema, batches(), where, time_unit=unit, items=items)


def roles(path: Path, columns: Columns, defaults: Columns) -> tuple[dict[str, str], str | None]:
    """Column names by role, and the unit of times where the file's types tell it."""
    if not is_parquet(path):
        return pick(path, csv_header(path), columns, defaults), None
    schema = parquet_schema(path)
    picked = pick(path, schema.names, columns, defaults)
    for role, name in picked.items():
        check_type(path, name, schema.field(name).type, role)
    timed = "time" in picked and is_time(schema.field(picked["time"]).type)
    return picked, TIMESTAMP if timed else None


def file_batches(
    path: Path, columns: dict[str, str], schema: pa.Schema, start: int
) -> Iterator[pa.RecordBatch]:
    """Raw batches of one file; places are `start` plus the row, from 1."""
    names = list(columns.values())
    for batch in parquet_batches(path, names) if is_parquet(path) else csv_batches(path, names):
        values = [as_text(path, name, batch.column(i)) for i, name in enumerate(names)]
        place = pa.array(range(start + 1, start + 1 + batch.num_rows), pa.int64())
        yield pa.record_batch([*values, place], schema=schema)
        start += batch.num_rows
