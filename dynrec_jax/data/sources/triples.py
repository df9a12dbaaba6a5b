"""`--triples=FILE`: a knowledge graph, as CSV, TSV or Parquet with the columns head, relation, tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc
from ibis.backends.duckdb import Backend

from dynrec_jax.data.arrow import numbers
from dynrec_jax.data.engine import load
from dynrec_jax.data.sources.lines import field_blocks, first_text_line, require_file
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

COLUMNS = ("head", "relation", "tail")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
EXPECTED = "CSV, TSV or Parquet with the columns head, relation, tail"
Batches = Iterator[tuple[list[pa.Array], Callable[[int], str]]]


def read_triples(con: Backend, path: Path) -> ir.Table:
    """Reads a file of triples: head, relation and tail as strings, as often as they are written.

    In a header `head_id:token` is head, as in RecBole's .kg files. Three fields between tabs need no header.

    Raises:
      DataError: No such file or no row, a column that is not there, an empty field.
    """
    require_file(path, EXPECTED)
    if is_parquet(path):
        source = parquet_triples(path)
    elif "\t" in first_text_line(path):
        source = tab_triples(path)
    else:
        source = csv_triples(path)

    def batches() -> Iterator[pa.RecordBatch]:
        for arrays, where in source:
            for name, values in zip(COLUMNS, arrays, strict=True):
                empty = pc.fill_null(pc.equal(values, ""), True)
                if (row := pc.index(empty, True).as_py()) >= 0:
                    raise DataError(f"{where(row)}: no {name}; expected head, relation and tail in every row")
            yield pa.record_batch(arrays, schema=SCHEMA)

    table = load(con, "raw_triples", SCHEMA, batches())
    if not table.count().to_pyarrow().as_py():
        raise DataError(f"{path}: no rows; expected at least one triple")
    return table


def role(name: str) -> str:
    """`head_id:token` as `head`, in letters of any case."""
    return name.partition(":")[0].strip().lower().removesuffix("_id")


def places(path: Path, found: list[str]) -> list[int]:
    """Where head, relation and tail are among a file's columns."""
    roles = [role(name) for name in found]
    for name in COLUMNS:
        if roles.count(name) != 1:
            times = "no column" if name not in roles else f"{roles.count(name)} columns"
            raise DataError(f"{path}: {times} {name!r}; found {', '.join(found)}; expected {EXPECTED}")
    return [roles.index(name) for name in COLUMNS]


def tab_triples(path: Path) -> Batches:
    """Fields between tabs, in which quotes are letters like any other."""
    first = first_text_line(path).split("\t")
    is_header = sum(role(name) in COLUMNS for name in first) > 1 or any(name in COLUMNS for name in first)
    if not is_header and len(first) != len(COLUMNS):
        raise DataError(f"{path}:1: {len(first)} fields; expected 3, or a header with head, relation, tail")
    chosen = places(path, first) if is_header else list(range(len(COLUMNS)))
    for lines, fields in field_blocks(path, "\t", len(first), skip=int(is_header)):
        line_N = numbers(lines)
        yield [fields[i] for i in chosen], lambda row: f"{path}:{line_N[row]}"  # noqa: B023


def csv_triples(path: Path) -> Batches:
    """Comma-separated values with a header."""
    found = csv_header(path)
    names = [found[i] for i in places(path, found)]
    done = 1
    for batch in csv_batches(path, names):
        yield batch.columns, lambda row: f"{path}:{csv_line(path, done + row)}"  # noqa: B023
        done += batch.num_rows


def parquet_triples(path: Path) -> Batches:
    """Columns of strings or whole numbers."""
    schema = parquet_schema(path)
    names = [schema.names[i] for i in places(path, schema.names)]
    for name in names:
        check_type(path, name, schema.field(name).type, "item")
    done = 1
    for batch in parquet_batches(path, names):
        arrays = [as_text(path, name, batch.column(i)) for i, name in enumerate(names)]
        yield arrays, lambda row: f"{path}: row {done + row}"  # noqa: B023
        done += batch.num_rows
