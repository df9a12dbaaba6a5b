"""CSV and Parquet as string columns, a record batch at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from dynrec_jax.data.sources.lines import first_text_line, is_gzip, line_blocks
from dynrec_jax.errors import DataError

BLOCK = 16 << 20
ROWS = 1 << 17
PARQUET_MAGIC = b"PAR1"
csv.field_size_limit(2**31 - 1)  # descriptions are longer than Python's 131,072 characters


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does."""
    with path.open("rb") as file:
        return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


# ---------------------------------------------------------------------- CSV


def csv_delimiter(path: Path) -> str:
    """A tab where the header has one, else a comma."""
    return "\t" if "\t" in first_text_line(path) else ","


def csv_header(path: Path) -> list[str]:
    """Names of a CSV file's columns; DataError where it is packed."""
    if is_gzip(path):
        raise DataError(f"{path}: is packed with gzip; expected plain CSV, unpack it first")
    try:
        return next(csv.reader([first_text_line(path)], delimiter=csv_delimiter(path)), [])
    except csv.Error as error:
        raise DataError(f"{path}:1: {error}; expected CSV with lines that end in LF or CR LF") from None


def csv_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns of a CSV file as strings; an empty field is null.

    Raises:
      DataError: Not UTF-8, or a row with another number of fields, with the line.
    """
    read = pacsv.ReadOptions(block_size=BLOCK, column_names=csv_header(path), skip_rows=1)
    parse = pacsv.ParseOptions(delimiter=csv_delimiter(path), newlines_in_values=True)
    convert = pacsv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
        include_columns=list(columns),
        null_values=[""],
        strings_can_be_null=True,
    )
    try:
        with pacsv.open_csv(path, read, parse, convert) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise csv_fault(path, str(error)) from None


def csv_fault(path: Path, message: str) -> DataError:
    """What is wrong with a CSV file, with the line; read again, since Arrow names rows at best."""
    for _ in line_blocks(path):
        pass  # raises with the line where a byte is not UTF-8
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=csv_delimiter(path))
        width = len(next(reader, []))
        try:
            for row in reader:
                if row and len(row) != width:
                    found = f"{len(row)} fields; expected {width}, as the header has"
                    return DataError(f"{path}:{reader.line_num}: {found}")
        except csv.Error as error:
            return DataError(f"{path}:{reader.line_num}: {error}; expected CSV")
    return DataError(f"{path}: not readable as CSV: {message.splitlines()[0]}")


def csv_line(path: Path, record: int) -> int:
    """The line on which a record ends; records count from 1 below the header, blank lines do not."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=csv_delimiter(path))
        next(reader, None)
        for row in reader:
            record -= bool(row)
            if not record:
                break
        return reader.line_num


# ------------------------------------------------------------------ Parquet


def parquet_schema(path: Path) -> pa.Schema:
    """Schema of a Parquet file; DataError where it is damaged."""
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from None


def parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns of a Parquet file, as they are typed."""
    try:
        with pq.ParquetFile(path) as file:
            yield from (
                batch.select(list(columns)) for batch in file.iter_batches(ROWS, columns=list(columns))
            )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from None


def is_text(type_: pa.DataType) -> bool:
    """Whether values are strings, also in a dictionary."""
    kind = type_.value_type if pa.types.is_dictionary(type_) else type_
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_time(type_: pa.DataType) -> bool:
    """Whether values are points in time, which need no unit told by their magnitude."""
    return pa.types.is_timestamp(type_) or pa.types.is_date(type_)


def check_type(path: Path, name: str, type_: pa.DataType, role: str) -> None:
    """Raises DataError where a Parquet column's type does not fit its role."""
    number = pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_)
    fits = {
        "user": is_text(type_) or pa.types.is_integer(type_),
        "item": is_text(type_) or pa.types.is_integer(type_),
        "time": is_text(type_) or number or is_time(type_),
        "event": is_text(type_) or pa.types.is_integer(type_) or pa.types.is_boolean(type_),
        "rating": is_text(type_) or number,
    }
    expected = {"time": "a timestamp or a number", "rating": "a number"}.get(role, "strings or whole numbers")
    if not fits[role]:
        raise DataError(f"{path}: column {name!r} has type {type_}; expected {expected} for the {role}")


def as_text(path: Path, name: str, values: pa.Array) -> pa.Array:
    """Values of one column as strings; points in time as whole seconds, NaN as null."""
    try:
        if is_time(values.type):
            values = whole_seconds(values)
        elif pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values).cast(pa.float64())
        text = values.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: column {name!r}: {str(error).splitlines()[0]}") from None
    return text


def whole_seconds(values: pa.Array) -> pa.Array:
    """Points in time as int64 seconds since 1970, rounded down."""
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("ms"))
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[values.type.unit]
    known = pc.fill_null(values.cast(pa.int64()), 0).to_numpy()
    return pa.array(
        np.floor_divide(known, per_second), mask=pc.is_null(values).to_numpy(zero_copy_only=False)
    )
