"""Meta files of Amazon's reviews: an object a line that describes a product, in the fields of 2014, 2018 or 2023."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend

from dynrec_jax.data.kinds import ARROW, SET, TEXT
from dynrec_jax.data.sources.described import ID as OWN_ID
from dynrec_jax.data.sources.described import load_described, set_of
from dynrec_jax.data.sources.json_items import value_text, whole_characters
from dynrec_jax.data.sources.lines import line_blocks
from dynrec_jax.data.sources.text import clean
from dynrec_jax.errors import DataError

KINDS = {"title": TEXT, "brand": TEXT, "description": TEXT, "categories": SET}
# Names of the fields that tell reviews and products apart.
USERS = ("reviewerID", "user_id")
PRODUCTS = ("parent_asin", "asin")
ROWS = 10_000
# Some titles of 2018 are a piece of the page's program, which this word of it tells.
PROGRAM = "getTime"


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, object) of a file that may be packed with gzip.

    A line is JSON or, as in files of 2014, a literal of Python.

    Raises:
      DataError: A line that is neither, or a packed file that is cut short.
    """
    for first, lines in line_blocks(path):
        for line, text in enumerate(lines, first):
            if text.strip():
                yield line, record(path, line, text)


def record(path: Path, line: int, text: str) -> dict[str, Any]:
    """The object on a line; DataError where there is none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        row = python_literal(text)
        if row is None or not is_plain(row):
            raise DataError(f"{path}:{line}: not JSON ({error}); expected an object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line}: {type(row).__name__}; expected an object a line")
    return whole_characters(row, text)


def python_literal(text: str) -> Any:
    """The value of a literal, of which nothing is executed; None where the text is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backslash in a title that escapes nothing
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


def is_plain(value: Any) -> bool:
    """Whether a value is what JSON has too; a set, such as `{'a', 'b'}`, has no order that stays."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)


def first_record(path: Path) -> dict[str, Any]:
    """The first object of a file; empty where it has none."""
    return next((row for _, row in records(path)), {})


def is_meta(path: Path) -> bool:
    """Whether a file of objects describes products in Amazon's fields."""
    try:
        row = first_record(path)
    except DataError:
        return False
    return (
        OWN_ID not in row and not any(name in row for name in USERS) and any(name in row for name in PRODUCTS)
    )


def product(path: Path, line: int, row: dict[str, Any]) -> str | None:
    """Id of a row's product: that of the family of variants where there is one."""
    return next((each for name in PRODUCTS if (each := identifier(path, line, name, row.get(name)))), None)


def identifier(path: Path, line: int, name: str, value: Any) -> str | None:
    """An id as a string; DataError where it is none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{path}:{line}: {name} {value!r}; expected a string or a whole number")
    return str(value)


def read_meta(con: Backend, path: Path, table: str) -> ir.Table:
    """Reads a meta file into a table of the engine: item_id, the columns of KINDS, and the line as the place.

    `brand` is the store where there is no brand; `description` joins a list's parts, and is the list of features where
    there is none; `categories` are the names of all
    paths, each once.

    Raises:
      DataError: A line that is no object, or one without a product's id.
    """

    def batches() -> Iterator[tuple[list[pa.Array], pa.Array]]:
        types = [pa.string(), *(ARROW[kind] for kind in KINDS.values()), pa.int64()]
        rows: list[tuple[Any, ...]] = []

        def made() -> tuple[list[pa.Array], pa.Array]:
            *arrays, places = map(pa.array, zip(*rows, strict=True), types)
            return arrays, places

        for line, row in records(path):
            rows.append((*described(path, line, row), line))
            if len(rows) == ROWS:
                yield made()
                rows = []
        if rows:
            yield made()

    return load_described(con, table, KINDS, batches(), str(path))


def described(path: Path, line: int, row: dict[str, Any]) -> tuple[Any, ...]:
    """Id and columns of a product."""
    item = product(path, line, row)
    if not item:
        raise DataError(f"{path}:{line}: no {' or '.join(PRODUCTS)}; expected a product's id in every row")
    title = value_text(row.get("title"))
    brand = clean(value_text(row.get("brand")) or "") or value_text(row.get("store"))
    description = " ".join(words(row.get("description")) or words(row.get("features") or row.get("feature")))
    names = map(clean, words(row.get("categories") or row.get("category")))
    return item, None if title and PROGRAM in title else title, brand, description, set_of(list(names))


def words(value: Any) -> list[str]:
    """Texts in a value and in the lists that are in it."""
    if isinstance(value, list | tuple):
        return [word for each in value for word in words(each)]
    return [text] if (text := value_text(value)) else []
