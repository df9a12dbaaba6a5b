"""From a log's text to typed columns, with the line of the first value that has not the type it must."""

from __future__ import annotations

from collections.abc import Callable

import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend

from dynrec_jax.data.units import UNIT_LESS, UNITS
from dynrec_jax.errors import DataError

TYPED = "typed_events"
INTEGER = r"^[+-]?[0-9]{1,19}$"
EXPECTED = {
    "time": "a number; expected seconds, ms, us or ns since 1970 (choose the column with --time_column)",
    "rating": "a number (choose the column with --rating_column, or --rating_column= for none)",
}
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"


def typed_events(
    con: Backend, raw: ir.Table, where: Callable[[int], str], unit: str | None
) -> tuple[ir.Table, str | None]:
    """user, item, place, time (int64 seconds), event and rating (float64) of a table of text.

    Args:
      con: The engine.
      raw: place, and as strings user, item and any of time, event, rating; '' is missing.
      where: A place as `file:line`.
      unit: Unit of the times where it is known.

    Returns:
      The relation, and the unit that times were written in (None without times).

    Raises:
      DataError: A time or rating that is not a number; times in mixed units.
    """
    texts = raw.mutate(**{name: raw[name].nullif("") for name in raw.columns if name != "place"})
    columns: dict[str, ir.Value] = {
        "event": texts["event"] if "event" in raw.columns else ibis.null("string")
    }
    for name, kind, number in (("time", "int64", whole_number), ("rating", "float64", real_number)):
        value = number(texts[name].strip()) if name in raw.columns else ibis.null(kind)
        columns[name] = value
        # The text is kept only where it is not a number: what the column is checked by, once, below.
        columns[f"{name}_text"] = (
            ibis.cases((value.isnull(), texts[name])) if name in raw.columns else ibis.null("string")
        )
    # A table: the conversions would run again in every query on a view.
    typed = con.create_table(TYPED, texts.select("user", "item", "place", **columns))
    check(typed, where)
    if "time" not in raw.columns:
        unit = None
    else:
        unit = unit or told_by_magnitude(typed, where)
        typed = typed.mutate(time=in_seconds(typed["time"], unit))
    return typed.drop("time_text", "rating_text"), unit


def whole_number(text: ir.StringValue) -> ir.IntegerValue:
    """Text as int64, rounded down; null where it is not a number or too large."""
    real = text.try_cast("float64")
    return ibis.cases(
        (text.re_search(INTEGER), text.try_cast("int64")),
        (text.re_search(NUMBER) & (real.abs() < 9e18), real.floor().cast("int64")),
    )


def real_number(text: ir.StringValue) -> ir.FloatingValue:
    """Text as float64; null where it is not a number."""
    return ibis.cases((text.re_search(NUMBER), text.try_cast("float64")))


def check(typed: ir.Table, where: Callable[[int], str]) -> None:
    """Raises DataError at the first text that should be a number."""
    bad = {name: typed[f"{name}_text"].notnull() for name in EXPECTED}
    firsts = typed.agg(**{name: typed["place"].min(where=is_bad) for name, is_bad in bad.items()})
    found = firsts.to_pyarrow().to_pylist()[0]
    for name, expected in EXPECTED.items():
        if (place := found[name]) is not None:
            text = typed.filter(typed["place"] == place).select(f"{name}_text").to_pyarrow()[0][0].as_py()
            raise DataError(f"{where(place)}: {name} {text!r} is not {expected}")


def in_seconds(time: ir.IntegerColumn, unit: str) -> ir.IntegerColumn:
    """Times of a unit as seconds, rounded down; a unit that is not in UNITS is seconds already."""
    divisor = UNITS.get(unit, (0, 1))[1]
    if divisor == 1:
        return time
    # A floor by whole numbers: as a float64, a time in nanoseconds would lose its last digits. The difference
    # is a multiple of the divisor, so that rounding its quotient is exact.
    rest = ((time % divisor) + divisor) % divisor
    return ((time - rest) / divisor).round().cast("int64")


def told_by_magnitude(values: ir.Table, where: Callable[[int], str]) -> str:
    """The unit of column `time`; DataError where some rows look like one unit and some like another."""
    size = values["time"].cast("float64").abs()
    unit = ibis.cases(
        *((size < float(bound), name) for name, (bound, _) in UNITS.items()), else_="nanoseconds"
    )
    telling = values.filter(size >= UNIT_LESS).mutate(unit=unit)
    found = (
        telling.group_by("unit").agg(n=telling.count(), place=telling["place"].min()).to_pyarrow().to_pylist()
    )
    if not found:
        return "seconds"
    found.sort(key=lambda row: -row["n"])
    if len(found) > 1:
        common, odd = found[0], found[-1]
        raise DataError(
            f"{where(odd['place'])}: a time that looks like {odd['unit']} ({odd['n']:,} such rows), while "
            f"{common['n']:,} rows look like {common['unit']}; expected one unit in the whole column"
        )
    return str(found[0]["unit"])
