"""Cleaning, as Ibis expressions: every step counts what it takes away."""

from __future__ import annotations

from dataclasses import dataclass, field

import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend

from dynrec_jax.data.engine import drop
from dynrec_jax.data.sources.source import Source
from dynrec_jax.data.sources.typed import TYPED
from dynrec_jax.errors import DataError

# As many same-time neighbours as this, and this share of them with ascending items, is no chance: of 20 coin
# tosses, 19 or more are heads 2 times in 100,000.
ENOUGH_TIES = 20
SORTED_SHARE = 0.95


@dataclass(frozen=True)
class Filters:
    """What to take away; the defaults take away nothing that may be meant.

    Attributes:
      missing: `refuse` or `drop` rows without user, item or time.
      min_rating: Events rated lower, or not at all, go; None keeps all.
      core: The k-core: users and items with fewer events than this go, again and again until none is left.
      min_item_users: Then items with fewer users than this go, once.
      min_user_events: Then users with fewer events than this go, once.
    """

    missing: str = "refuse"
    min_rating: float | None = None
    core: int = 0
    min_item_users: int = 0
    min_user_events: int = 0


@dataclass
class Step:
    """One line of what prepare prints."""

    name: str
    why: str
    dropped: int
    left: int


@dataclass
class Cleaned:
    """Events that are left, and what was dropped on the way."""

    events: ir.Table
    steps: list[Step] = field(default_factory=list)

    def dropped(self) -> dict[str, int]:
        """Dropped events by the step's name."""
        return {step.name: step.dropped for step in self.steps}


def rows(table: ir.Table) -> int:
    """Number of rows."""
    return int(table.count().to_pyarrow().as_py())


def clean(con: Backend, source: Source, filters: Filters) -> Cleaned:
    """Applies the filters in their order; the events that are left are a table of the engine.

    Raises:
      DataError: Missing values under `refuse`; a rating threshold without ratings; nothing left.
    """
    left = rows(source.events)
    table = TYPED
    cleaned = Cleaned(source.events)

    def step(name: str, why: str, events: ir.Table) -> None:
        nonlocal left, table
        if events is not cleaned.events:
            # A table of its own: a chain of views would be computed anew by every later step.
            cleaned.events = con.create_table(f"events_{name}", events)
            drop(con, table)
            table = f"events_{name}"
        now = rows(cleaned.events)
        cleaned.steps.append(Step(name, why, left - now, now))
        if not now:
            raise DataError(
                f"{source.name}: no user is left after '{why}' (of {left:,} events); loosen the filters"
            )
        left = now

    step("missing", "rows without user, item or time", with_all_values(source, filters.missing))
    if source.has_times:
        # Without times, the same user and item twice are two events.
        step("duplicates", "exact duplicates", distinct(cleaned.events))
    if filters.min_rating is not None:
        if not source.has_ratings:
            raise DataError(
                f"{source.name}: no ratings, but --min_rating={filters.min_rating:g}; leave the flag out"
            )
        why = f"rated below {filters.min_rating:g} or not at all"
        step("min_rating", why, cleaned.events.filter(cleaned.events["rating"] >= filters.min_rating))
    if filters.core > 1:
        why = f"users or items with fewer than {filters.core} events, repeatedly"
        step("core", why, k_core(con, cleaned.events, filters.core))
    if filters.min_item_users > 1:
        why = f"items with fewer than {filters.min_item_users} users, once"
        step("min_item_users", why, popular(cleaned.events, filters.min_item_users))
    if filters.min_user_events > 1:
        why = f"users with fewer than {filters.min_user_events} events, once"
        step("min_user_events", why, active(cleaned.events, filters.min_user_events))
    return cleaned


def with_all_values(source: Source, missing: str) -> ir.Table:
    """Events that have a user, an item and, where the source has times, a time."""
    events = source.events
    names = ["user", "item"] + (["time"] if source.has_times else [])
    is_missing = ibis.or_(*(events[name].isnull() for name in names))
    bad = events.filter(is_missing)
    counts = {name: bad[name].isnull().sum() for name in names}
    found = bad.agg(place=bad["place"].min(), all=bad.count(), **counts).to_pyarrow().to_pylist()[0]
    if not found["all"]:
        return events
    if missing == "refuse":
        parts = ", ".join(f"{found[name]:,} without {name}" for name in names if found[name])
        raise DataError(
            f"{source.where(found['place'])}: first of {found['all']:,} rows with missing values ({parts}); "
            "fill them, or leave those rows out with --missing=drop"
        )
    return events.filter(~is_missing)


def distinct(events: ir.Table) -> ir.Table:
    """One of each (user, item, time, event, rating): the first in the source."""
    keys = ["user", "item", "time", "event", "rating"]
    return events.group_by(keys).agg(place=events["place"].min())


def k_core(con: Backend, events: ir.Table, core: int) -> ir.Table:
    """The largest part of the events in which every user and every item has at least `core` of them."""
    pairs = con.create_table("pairs_0", events.group_by("user", "item").agg(n=events.count()))
    before, number = -1, 0
    while (now := rows(pairs)) != before:
        before, number = now, number + 1
        users, items = (
            pairs.group_by(by).agg(all=pairs["n"].sum()).filter(lambda t: t["all"] >= core)
            for by in ("user", "item")
        )
        kept = con.create_table(f"pairs_{number}", pairs.semi_join(users, "user").semi_join(items, "item"))
        drop(con, f"pairs_{number - 1}")
        pairs = kept
    if number == 1:
        return events
    return events.semi_join(pairs, ["user", "item"])


def popular(events: ir.Table, users: int) -> ir.Table:
    """Events with items that at least so many different users have."""
    kept = events.group_by("item").agg(n=events["user"].nunique()).filter(lambda t: t["n"] >= users)
    return events.semi_join(kept, "item")


def active(events: ir.Table, count: int) -> ir.Table:
    """Events of users that have at least so many."""
    kept = events.group_by("user").agg(n=events.count()).filter(lambda t: t["n"] >= count)
    return events.semi_join(kept, "user")


@dataclass(frozen=True)
class Ties:
    """Neighbours in the source's order of one user that have the same time and different items."""

    count: int
    ascending: int

    @property
    def item_sorted(self) -> bool:
        """Whether the source was plainly sorted by item, which says nothing about what came first."""
        return self.count >= ENOUGH_TIES and self.ascending >= SORTED_SHARE * self.count


def find_ties(events: ir.Table) -> Ties:
    """Counts ties, and how many of them ascend by item, as numbers or as bytes, whichever fits better."""
    by_place = ibis.window(group_by=["user", "time"], order_by="place")
    pairs = events.mutate(before=events["item"].lag().over(by_place))
    pairs = pairs.filter(pairs["before"].notnull() & (pairs["before"] != pairs["item"]))
    number, number_before = (pairs[name].try_cast("float64") for name in ("item", "before"))
    counts = pairs.agg(
        count=pairs.count(),
        by_bytes=(pairs["item"] > pairs["before"]).sum(),
        by_number=(number > number_before).sum(),
    )
    found = counts.to_pyarrow().to_pylist()[0]
    return Ties(found["count"], max(found["by_bytes"] or 0, found["by_number"] or 0))
