"""Items as JSON: an object a line, or one object that maps item ids to lists."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dynrec_jax.data.kinds import SET, TEXT, VECTOR
from dynrec_jax.data.sources.described import ID, Vectors, set_of
from dynrec_jax.data.sources.lines import line_blocks, open_bytes, read_bytes
from dynrec_jax.data.sources.text import without_surrogates
from dynrec_jax.errors import DataError

ROWS = 10_000
ATTRIBUTES = "attributes"
# Sorts of values, as they are told to whoever mixed them.
WORD, WORDS, WHOLE, REAL, OTHER = (
    "a string or whole number", "a list of strings", "a list of whole numbers", "a list of numbers",
    "a value that is neither text nor a list",
)  # fmt: skip
FITS = {VECTOR: {WHOLE, REAL}, SET: {WORD, WORDS, WHOLE}}
Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class JsonItems:
    """A JSON file of items.

    Attributes:
      rows: Starts to read it: pairs of a number and a row with a key `item_id`.
      where: Such a number as a place, for messages.
    """

    rows: Callable[[], Rows]
    where: Callable[[int], str]


def is_json(path: Path) -> bool:
    """Whether the first thing in a file is an object; DataError where it is an array."""
    with open_bytes(path) as file:
        start = read_bytes(file, path, 4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        raise DataError(
            f"{path}: is a JSON array; expected JSON lines: an object a line, no array around them"
        )
    return start == b"{"


def open_json(path: Path) -> JsonItems:
    """A file of items, whichever of the two forms it has."""
    mapping = read_mapping(path)
    if mapping is None:
        return JsonItems(lambda: json_rows(path), lambda line: f"{path}:{line}")
    rows = [{ID: without_surrogates(item), ATTRIBUTES: values} for item, values in mapping]
    return JsonItems(lambda: iter(enumerate(rows)), lambda number: f"{path}: item {rows[number][ID]!r}")


def read_mapping(path: Path) -> list[tuple[str, list[Any]]] | None:
    """Pairs of a file that is one object of lists as a whole; None for JSON lines."""
    lines = (text.strip() for _, block in line_blocks(path) for text in block)
    lines = (text for text in lines if text)
    first = next(lines, "")
    # An object that goes on in further lines leaves its first one open; a broken one of JSON lines is not read whole.
    if not first.endswith(("{", "[", ",")) and next(lines, None) is not None:
        return None
    lines.close()
    try:
        with open_bytes(path) as file:
            pairs = json.loads(
                read_bytes(file, path).decode("utf-8-sig"), object_pairs_hook=lambda pairs: pairs
            )
    except (ValueError, RecursionError):
        return None
    no_mapping = [key for key, value in pairs if not is_flat_list(value)]
    if not pairs or any(key == ID for key, _ in pairs):
        return None
    if no_mapping and not first.endswith("}"):
        raise DataError(
            f"{path}: item {no_mapping[0]!r} has no list; expected one object of item ids and lists, or an "
            "object a line"
        )
    return None if no_mapping else pairs


def is_flat_list(value: Any) -> bool:
    """Whether a value is a list of words or numbers; objects are lists of pairs here."""
    return isinstance(value, list) and not any(isinstance(each, list | tuple) for each in value)


def json_rows(path: Path) -> Rows:
    """Yields (line, object) of JSON lines; DataError where a line is none."""
    for first, lines in line_blocks(path):
        for line, text in enumerate(lines, first):
            if text.strip():
                yield line, json_object(path, line, text)


def json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    """The object on a line; DataError where there is another thing."""
    try:
        row = whole_characters(json.loads(text), text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line}: not JSON ({error}); expected an object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line}: {type(row).__name__}; expected a JSON object a line")
    return row


def whole_characters(row: Any, text: str) -> Any:
    """What was read from a text, without halves of surrogate pairs, which only an escape can be."""
    lower = text.lower()
    if "\\ud" not in lower and "\\u0000d" not in lower:
        return row
    return json.loads(without_surrogates(json.dumps(row, ensure_ascii=False, default=str)))


def columns_of(items: JsonItems) -> dict[str, dict[str, int]]:
    """Every column, with the number of the first row of each sort of value in it.

    Raises:
      DataError: A row without an id.
    """
    found: dict[str, dict[str, int]] = {}
    for number, row in items.rows():
        for name, value in row.items():
            sorts = found.setdefault(name, {})
            if (sort := sort_of(value)) is not None:
                sorts.setdefault(sort, number)
        if ID in row and (isinstance(row[ID], bool) or not isinstance(row[ID], str | int)):
            raise DataError(f"{items.where(number)}: {ID} {row[ID]!r}; expected a string or a whole number")
        if row.get(ID, "") == "":
            raise DataError(f"{items.where(number)}: no {ID}; expected one in every row")
    return found


def sort_of(value: Any) -> str | None:
    """What a value may be; None where it is empty."""
    if value is None or value == "" or value == [] or is_no_number(value):
        return None
    if not isinstance(value, list):
        return WORD if type(value) in (str, int) else OTHER
    types = set(map(type, value)) - {type(None)}
    if not types:
        return None
    if float in types and types <= {int, float}:
        return REAL
    if types == {int}:
        return WHOLE
    return WORDS if types <= {str, int} else OTHER


def kind_of(items: JsonItems, name: str, sorts: dict[str, int], known: str | None = None) -> str:
    """A column's kind, the known one where its values fit; DataError where values of two kinds are in it."""
    if known is not None and known in FITS and sorts.keys() <= FITS[known]:
        return known
    if REAL in sorts:
        kind, sure = VECTOR, REAL
    elif WORDS in sorts or WHOLE in sorts:
        kind, sure = SET, min(sorts.keys() & {WORDS, WHOLE}, key=sorts.__getitem__)
    else:
        return TEXT
    for sort, number in sorted(sorts.items(), key=lambda entry: entry[1]):
        if sort not in FITS[kind]:
            raise DataError(
                f"{items.where(number)}: column {name!r} has {sort}, but {sure} in {items.where(sorts[sure])}; "
                "expected one kind of value in a column"
            )
    return kind


def arrays(items: JsonItems, kinds: dict[str, str]) -> Iterator[list[pa.Array]]:
    """Item ids and the columns, a block of rows at a time."""
    vectors = {name: Vectors(name) for name, kind in kinds.items() if kind == VECTOR}

    def typed(numbers: list[int], rows: list[dict[str, Any]]) -> list[pa.Array]:
        made = [pa.array([str(row[ID]) for row in rows], pa.string())]
        for name, kind in kinds.items():
            values = [row.get(name) for row in rows]
            if kind == VECTOR:
                made.append(vectors[name].checked(float_lists(values), lambda i: items.where(numbers[i])))
            elif kind == SET:
                made.append(pa.array(map(set_of, values), pa.list_(pa.string())))
            else:
                made.append(pa.array(map(value_text, values), pa.string()))
        return made

    numbers: list[int] = []
    rows: list[dict[str, Any]] = []
    for number, row in items.rows():
        numbers.append(number)
        rows.append(row)
        if len(rows) == ROWS:
            yield typed(numbers, rows)
            numbers, rows = [], []
    if rows:
        yield typed(numbers, rows)


def float_lists(values: list[list[Any] | None]) -> pa.Array:
    """Lists of numbers as lists of float64."""
    try:
        return pa.array(values, pa.list_(pa.float64()))
    except (pa.ArrowInvalid, OverflowError):  # a whole number that no float64 equals
        rounded = [None if value is None else list(map(rounded_float, value)) for value in values]
        return pa.array(rounded, pa.list_(pa.float64()))


def rounded_float(number: float | None) -> float | None:
    """The nearest float64; infinite where a whole number is larger than all."""
    try:
        return None if number is None else float(number)
    except OverflowError:
        return math.inf


def is_no_number(value: Any) -> bool:
    """Whether a value is NaN or infinite, as programs write what is not there."""
    return isinstance(value, float) and not math.isfinite(value)


def value_text(value: Any) -> str | None:
    """A value of JSON as text: lists joined by commas, objects as JSON."""
    if value is None or isinstance(value, str):
        return value
    if is_no_number(value):
        return None
    if isinstance(value, list):
        return ", ".join(text for text in map(value_text, value) if text)
    return json.dumps(value, ensure_ascii=False, default=str)
