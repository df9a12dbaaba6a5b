"""The items beside the events: titles and attributes, joined by item id."""

from __future__ import annotations

import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend

from dynrec_jax.errors import DataError

RESERVED = {"index", "item_id"}


def with_columns(
    con: Backend, items: ir.Table, described: ir.Table, columns: list[str]
) -> tuple[ir.Table, dict[str, int]]:
    """Joins columns to the catalogue by item id, the first row of each id.

    Args:
      con: The engine.
      items: index and item_id.
      described: item_id, place and the columns.
      columns: Which columns to join.

    Returns:
      The items with the columns, null where an item has no row; and counts of items without a row and of rows
      that repeat an item id.
    """
    first = described.mutate(nth=ibis.row_number().over(group_by="item_id", order_by="place"))
    texts = {name: first[name].nullif("") for name in columns}
    once = con.create_table("described", first.filter(first["nth"] == 0).select(item_id="item_id", **texts))
    joined = con.create_table(
        "items_described", items.left_join(once, "item_id").select("index", items["item_id"], *columns)
    )
    with_row = items.semi_join(once, "item_id").count().to_pyarrow().as_py()
    counts = {
        "items_without_row": items.count().to_pyarrow().as_py() - with_row,
        "item_rows_repeated": described.count().to_pyarrow().as_py() - once.count().to_pyarrow().as_py(),
    }
    return joined, counts


def chosen_columns(where: str, found: list[str], wanted: tuple[str, ...]) -> list[str]:
    """Which columns of an items file to keep: those that were asked for, or all.

    Raises:
      DataError: A column that is not there, is named twice, or whose name the dataset uses itself.
    """
    there = [name for name in found if name != "item_id"]
    for name in wanted:
        if name not in there:
            raise DataError(
                f"{where}: no column {name!r}; found {', '.join(there) or 'none'} (--text_columns)"
            )
    columns = list(dict.fromkeys(wanted)) or there
    if taken := RESERVED.intersection(columns):
        raise DataError(
            f"{where}: a column is named {taken.pop()!r}, which the dataset uses itself; rename it"
        )
    return columns
