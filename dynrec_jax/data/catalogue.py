"""The items beside the events: titles and attributes, joined by item id."""

from __future__ import annotations

from typing import Any

import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend

from dynrec_jax.data.kinds import PLACE, SET, TEXT, VECTOR
from dynrec_jax.errors import DataError

NTH = "nth row of the item"
RESERVED = {"index", "item_id", PLACE, NTH}


def with_columns(
    con: Backend, items: ir.Table, described: ir.Table, columns: list[str], where: str
) -> tuple[ir.Table, dict[str, int]]:
    """Joins columns to the catalogue by item id.

    The first row of an item id counts; where it is empty in a column, the first later row that has a value there
    gives it.

    Args:
      con: The engine.
      items: index and item_id.
      described: item_id, PLACE and the columns, null where empty.
      columns: Which columns to join.
      where: What describes them, for messages.

    Returns:
      The items with the columns, null where an item has none; and counts of items without a row, of rows that repeat
      an item id, and, where there are columns of text, of items without any text.

    Raises:
      DataError: No item of the catalogue is described.
    """
    once = con.create_table("described", one_row_an_item(described, columns))
    joined = con.create_table(
        "items_described", items.left_join(once, "item_id").select("index", items["item_id"], *columns)
    )
    with_row = count(items.semi_join(once, "item_id"))
    if not with_row:
        theirs, ours = (str(table.limit(1).to_pyarrow()["item_id"][0]) for table in (once, items))
        raise DataError(
            f"{where}: none of its {count(once):,} items is in the log; they are such as {theirs!r}, and those of the "
            f"log such as {ours!r}; expected the same ids"
        )
    counts = {
        "items_without_row": count(items) - with_row,
        "item_rows_repeated": count(described) - count(once),
    }
    if texts := [name for name, kind in kinds_of(joined, columns).items() if kind == TEXT]:
        counts["items_without_text"] = count(joined.filter([joined[name].isnull() for name in texts]))
    return joined, counts


def one_row_an_item(described: ir.Table, columns: list[str]) -> ir.Table:
    """item_id and the columns, each item once."""
    number = ibis.row_number().over(group_by="item_id", order_by=PLACE)
    rows = described.mutate(**{NTH: number})
    first = rows.filter(rows[NTH] == 0).select("item_id", *columns)
    again = rows.filter(rows[NTH] > 0).select("item_id").distinct()
    if not columns or not count(again):
        return first
    several = described.semi_join(again, "item_id")
    values: dict[str, Any] = {
        name: several[name].argmin(several[PLACE], where=several[name].notnull()) for name in columns
    }
    filled = several.group_by("item_id").agg(**values)
    return first.anti_join(again, "item_id").union(filled.select("item_id", *columns))


def kinds_of(table: ir.Table, columns: list[str]) -> dict[str, str]:
    """The kind of each column of a relation, by its type."""
    types = {name: table.schema()[name] for name in columns}
    return {
        name: (SET if type_.value_type.is_string() else VECTOR) if type_.is_array() else TEXT
        for name, type_ in types.items()
    }


def count(table: ir.Table) -> int:
    """Number of rows."""
    return int(table.count().to_pyarrow().as_py())


def chosen_columns(where: str, found: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    """Which columns of an items file to keep: those that were asked for, or, for None, all that have a name.

    Raises:
      DataError: A column that is not there, whose name the dataset uses itself, or that differs from another by its
        case alone.
    """
    there = [name for name in found if name not in ("item_id", "")]
    for name in wanted or ():
        if name not in there:
            raise DataError(
                f"{where}: no column {name!r}; found {', '.join(there) or 'none'} (--text_columns)"
            )
    columns = there if wanted is None else list(dict.fromkeys(wanted))
    lower: dict[str, str] = {}
    for name in columns:
        if name.lower() in RESERVED:
            raise DataError(f"{where}: a column is named {name!r}, which the dataset uses itself; rename it")
        if (other := lower.setdefault(name.lower(), name)) != name:
            raise DataError(f"{where}: columns {other!r} and {name!r} differ by case alone; rename one")
    return columns
