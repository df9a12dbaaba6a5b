"""`--items=FILE`: what describes the items: CSV, Parquet or JSON lines with a column `item_id`, or a JSON object.

A column of CSV is text. In Parquet (by its type) and in JSON (by its values) a column of lists of strings or whole
numbers is a set, one of lists of real numbers a vector, all else is text. The JSON object maps item ids to lists, which
become the column `attributes`. A meta file of Amazon's reviews and GroupLens'
movies.dat are read as their sources read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend

from dynrec_jax.data.catalogue import chosen_columns
from dynrec_jax.data.kinds import SET, TEXT, VECTOR
from dynrec_jax.data.sources import amazon_items, json_items, movielens
from dynrec_jax.data.sources.described import ID, Vectors, load_described, numbered, set_of
from dynrec_jax.data.sources.lines import require_file
from dynrec_jax.data.sources.tabular import (
    as_text,
    check_type,
    csv_batches,
    csv_header,
    csv_line,
    is_parquet,
    is_text,
    parquet_batches,
    parquet_schema,
)
from dynrec_jax.errors import DataError

TABLE = "raw_items_file"
NOTHING: Mapping[str, str] = MappingProxyType({})


def read_items(
    con: Backend, path: Path, wanted: tuple[str, ...] | None, kinds: Mapping[str, str] = NOTHING
) -> tuple[ir.Table, list[str]]:
    """Reads a file that describes items; gives item_id, place and the kept columns, and those columns' names.

    Args:
      con: The engine.
      path: The file.
      wanted: Columns to keep; None keeps all.
      kinds: What columns of these names are elsewhere: values of JSON that may be of that kind are.

    Raises:
      DataError: No such file or no row, no column `item_id` or none of a name in `wanted`; a row without an id; a
        column that holds values of two kinds, vectors of two lengths or a number that is not finite.
    """
    require_file(path, f"CSV, Parquet or JSON lines with a column {ID!r}")
    if is_parquet(path):
        return read_parquet(con, path, wanted)
    if movielens.is_movies_dat(path):
        columns = chosen_columns(str(path), list(movielens.ITEMS), wanted)
        return movielens.movies_dat(con, path, TABLE), columns
    if not json_items.is_json(path):
        return read_csv(con, path, wanted)
    if amazon_items.is_meta(path):
        columns = chosen_columns(str(path), list(amazon_items.KINDS), wanted)
        return amazon_items.read_meta(con, path, TABLE), columns
    return read_json(con, path, wanted, kinds)


def columns_in(path: Path) -> list[str]:
    """Names of the columns that a file has, the id's among them, as `read_items` finds them.

    Raises:
      DataError: no such file, or not what it must be.
    """
    require_file(path, f"CSV, Parquet or JSON lines with a column {ID!r}")
    if is_parquet(path):
        return list(parquet_schema(path).names)
    if movielens.is_movies_dat(path):
        return [ID, *movielens.ITEMS]
    if not json_items.is_json(path):
        return csv_header(path)
    if amazon_items.is_meta(path):
        return [ID, *amazon_items.KINDS]
    return list(json_items.columns_of(json_items.open_json(path)))


def keep(path: Path, found: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    """Columns to keep; DataError where the id or one that is wanted is not there."""
    if ID not in found:
        raise DataError(f"{path}: no column {ID!r}; found {', '.join(found)}")
    if twice := [
        name
        for name in found
        if found.count(name) > 1 and (name == ID or (wanted is None and name) or name in (wanted or ()))
    ]:
        raise DataError(f"{path}: {found.count(twice[0])} columns are named {twice[0]!r}; expected one")
    return chosen_columns(str(path), found, wanted)


def placed(
    con: Backend, path: Path, kinds: dict[str, str], batches: Iterator[list[pa.Array]]
) -> tuple[ir.Table, list[str]]:
    """Loads arrays (id first, then the columns) with their row as the place."""
    return load_described(con, TABLE, kinds, numbered(batches), str(path)), list(kinds)


def refuse_without_id(ids: pa.Array, where: Callable[[int], str]) -> None:
    """Raises DataError at the first row whose id is missing; `where` makes its index a place."""
    for index, value in enumerate(ids.to_pylist() if ids.null_count else ()):
        if not value:
            raise DataError(f"{where(index)}: no {ID}; expected one in every row")


def read_csv(con: Backend, path: Path, wanted: tuple[str, ...] | None) -> tuple[ir.Table, list[str]]:
    """Reads CSV; every value stays the text that it is."""
    columns = keep(path, csv_header(path), wanted)

    def batches() -> Iterator[list[pa.Array]]:
        done = 1
        for batch in csv_batches(path, [ID, *columns]):
            refuse_without_id(batch.column(0), lambda i: f"{path}:{csv_line(path, done + i)}")  # noqa: B023
            yield batch.columns
            done += batch.num_rows

    return placed(con, path, dict.fromkeys(columns, TEXT), batches())


def read_json(
    con: Backend, path: Path, wanted: tuple[str, ...] | None, known: Mapping[str, str] = NOTHING
) -> tuple[ir.Table, list[str]]:
    """Reads JSON; a key that an object lacks is null."""
    items = json_items.open_json(path)
    found = json_items.columns_of(items)
    kept = keep(path, list(found), wanted)
    kinds = {name: json_items.kind_of(items, name, found[name], known.get(name)) for name in kept}
    return placed(con, path, kinds, json_items.arrays(items, kinds))


def read_parquet(con: Backend, path: Path, wanted: tuple[str, ...] | None) -> tuple[ir.Table, list[str]]:
    """Reads Parquet; numbers become their text."""
    schema = parquet_schema(path)
    columns = keep(path, schema.names, wanted)
    check_type(path, ID, schema.field(ID).type, "item")
    kinds = {name: kind_of(schema.field(name).type) for name in columns}
    vectors = {name: Vectors(name) for name in columns}

    def batches() -> Iterator[list[pa.Array]]:
        done = 1

        def where(index: int) -> str:
            return f"{path}: row {done + index}"

        for batch in parquet_batches(path, [ID, *columns]):
            ids = as_text(path, ID, batch.column(0))
            refuse_without_id(ids, where)
            arrays = [ids]
            for name, values in zip(columns, batch.columns[1:], strict=True):
                if kinds[name] == VECTOR:
                    arrays.append(vectors[name].checked(values, where))
                elif kinds[name] == SET:
                    arrays.append(pa.array(map(set_of, values_of(path, name, values)), pa.list_(pa.string())))
                else:
                    arrays.append(column_text(path, name, values))
            yield arrays
            done += batch.num_rows

    return placed(con, path, kinds, batches())


def kind_of(type_: pa.DataType) -> str:
    """What a column of a Parquet type is."""
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        if is_text(type_.value_type) or pa.types.is_integer(type_.value_type):
            return SET
        if pa.types.is_floating(type_.value_type):
            return VECTOR
    return TEXT


def column_text(path: Path, name: str, values: pa.Array) -> pa.Array:
    """A column's values as text, nested ones value by value."""
    if pa.types.is_nested(values.type):
        return pa.array(map(json_items.value_text, values_of(path, name, values)), pa.string())
    if pa.types.is_temporal(values.type):
        return values.cast(pa.string())
    return as_text(path, name, values)


def values_of(path: Path, name: str, values: pa.Array) -> list[Any]:
    """Values in Python; DataError where text among them is none."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: column {name!r}: {error}; expected text in UTF-8") from None
