"""Files of ids that scoring is told: of users, of items, or of both."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from dynrec_jax.errors import DataError

PARQUET = (".parquet", ".pq")


def read_file(path: Path, name: str, expected: str = "") -> pa.Table:
    """A CSV or Parquet file; of a CSV, all columns but `time` are strings, so that `001` stays `001`.

    Args:
      path: of the file. One that ends in .txt holds an id a line.
      name: of the column of ids, such as `user_id`; a .txt has no other.
      expected: what is said to be expected where it is not there; that column where not given.

    Raises:
      DataError: no such file, not readable, or two columns have one name.
    """
    check_there(path, expected or f"a column {name}")
    try:
        if path.suffix.lower() == ".txt":
            lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
            table = pa.table({name: pa.array([line for line in lines if line], pa.string())})
        elif path.suffix.lower() in PARQUET:
            table = pq.read_table(path)
        else:
            table = _read_csv(path)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not readable as CSV or Parquet: {' '.join(str(error).split())}") from None
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: has the column {twice[0]} more than once; expected one of each name")
    return table


def check_there(path: Path, expected: str) -> None:
    """Raises DataError where a path is no file; `expected` says what was expected in it."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {found}; expected a CSV or Parquet file with {expected}")


def _read_csv(path: Path) -> pa.Table:
    with path.open("rb") as file:
        header = file.readline().decode("utf-8-sig").strip()
    names = [name.strip().strip('"') for name in header.split(",")]
    types = {name: pa.string() for name in names if name != "time"}
    # An empty field is no value; a user called NA or null is one.
    options = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
    return csv.read_csv(path, convert_options=options)


def strings(column: pa.ChunkedArray, name: str, path: Path) -> pa.Array:
    """Ids as strings.

    Raises:
      DataError: the column holds something else.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{path}: column {name} is {kind}; ids are strings or integers")
    # Two steps: Arrow casts no dictionary of integers to strings.
    return column.combine_chunks().cast(kind).cast(pa.string())


def read_columns(path: Path, wanted: Mapping[str, Sequence[str]]) -> pa.Table:
    """Columns of ids, as strings; lists are taken apart, a row for each of their ids.

    Args:
      path: of the file, as `read_file` takes it.
      wanted: the names that each column may have in the file, by the name that it gets.

    Raises:
      DataError: a column is not there, holds no ids, or lacks one in some row; two columns hold lists.
    """
    expected = " and ".join(f"a column {names[0]}" for names in wanted.values())
    first = next(iter(wanted))
    table = read_file(path, first, expected)
    found: dict[str, pa.ChunkedArray] = {}
    for name, names in wanted.items():
        own = next((each for each in names if each in table.column_names), None)
        if own is None:
            raise DataError(f"{path}: has the columns {', '.join(table.column_names)}; expected {expected}")
        found[name] = table.column(own)
    lists = [name for name, column in found.items() if _is_list(column.type)]
    if len(lists) > 1:
        raise DataError(f"{path}: two columns hold lists; expected {expected}")
    if lists:
        column = found[lists[0]].combine_chunks()
        parents = pc.list_parent_indices(column)
        found = {name: other.take(parents) for name, other in found.items() if name != lists[0]}
        found[lists[0]] = pa.chunked_array([pc.list_flatten(column)])
    made = {name: strings(column, name, path) for name, column in found.items()}
    for name, column in made.items():
        if column.null_count:
            row = pc.index(column.is_null(), True).as_py() + 1
            raise DataError(f"{path}: row {row} has no {name}; expected one in every row")
        if not len(column):
            raise DataError(f"{path}: holds no {name}")
    return pa.table(made)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
