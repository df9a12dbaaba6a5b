"""From cleaned events to the files of a dataset folder."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend

from dynrec_jax.data.clean import rows
from dynrec_jax.data.content import TableHash
from dynrec_jax.data.dataset import ITEMS, shard_file
from dynrec_jax.data.engine import stream
from dynrec_jax.data.kinds import ARROW
from dynrec_jax.errors import DataError

# Sequences are collected for as many shards at a time as hold this many events (one at least): collecting
# does not spill to disk, a group must fit in memory.
GROUP_EVENTS = 4_000_000
MAX_EVENT_TYPES = 1_000
QUANTILES = 1_000
HEX = "0123456789abcdef"
INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("times", pa.list_(pa.int64())),
        ("events", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Logical:
    """Cleaned events with everything as numbers.

    Attributes:
      events: shard, user, item (index from 1), time, place, event (index from 1, 0 none), and tie (string)
        where ties are broken at random; ordered by shard, so that a shard's events lie together.
      items: index and item_id.
      event_types: Names by index - 1.
      shard_events: Events by shard; shards without any are left out.
      users: Number of users.
      item_count: Number of items.
    """

    events: ir.Table
    items: ir.Table
    event_types: list[str]
    shard_events: dict[int, int]
    users: int
    item_count: int


def logical(con: Backend, events: ir.Table, shards: int, has_events: bool, tie_seed: int | None) -> Logical:
    """Numbers items by the rank of their bytes and event types by name, and gives each user a shard."""
    names = events.select("item").distinct()
    rank = ibis.row_number().over(order_by=names["item"])
    items = con.create_table("items", names.select(index=(rank + 1).cast("int32"), item_id="item"))
    ids = events.select("user").distinct()
    users = con.create_table("users", ids.mutate(shard=shard_number(ids["user"], shards)))
    if tie_seed is not None:
        parts = [str(tie_seed), events["user"], events["item"], events["place"].cast("string")]
        key = ibis.literal("\t").join(parts).hexdigest("sha256")
        events = events.mutate(tie=key)
    types = event_names(events) if has_events else []
    event = ibis.literal(0)
    if types:
        event = ibis.cases(*((events["event"] == name, i) for i, name in enumerate(types, 1)), else_=0)
    numbered = (
        events.mutate(event=event.cast("int32"))
        .join(items, events["item"] == items["item_id"])
        .drop("item", "item_id", "rating")
        .rename(item="index")
        .join(users, "user")
        .order_by("shard")
    )
    table = con.create_table("numbered", numbered)
    counts = table.group_by("shard").agg(n=table.count()).order_by("shard").to_pyarrow()
    by_shard = dict(zip(counts["shard"].to_pylist(), counts["n"].to_pylist(), strict=True))
    return Logical(table, items, types, by_shard, rows(users), rows(items))


def event_names(events: ir.Table) -> list[str]:
    """Event types by their bytes; DataError where there are so many that they are none."""
    names = events.filter(events["event"].notnull()).select("event").distinct().limit(MAX_EVENT_TYPES + 1)
    found = names.to_pyarrow()["event"].to_pylist()
    if len(found) > MAX_EVENT_TYPES:
        raise DataError(
            f"more than {MAX_EVENT_TYPES} event types, such as {found[0]!r}; expected a few kinds (choose "
            "the column with --event_column, or --event_column= for none)"
        )
    return sorted(found, key=str.encode)


def shard_number(user: ir.StringValue, shards: int) -> ir.IntegerValue:
    """`shard_of` as an expression: 16 hex digits modulo `shards`, one by one, exact in small integers."""
    digits = user.hexdigest("sha256")
    number: ir.IntegerValue = ibis.literal(0, "int64")
    for i in range(16):
        number = (number * 16 + ibis.literal(HEX).find(digits.substr(i, 1))) % shards
    return number.cast("int32")


def shard_groups(shard_events: dict[int, int], shards: int, limit: int) -> Iterator[range]:
    """Consecutive shards with at most `limit` events together, or one alone; they cover all shards."""
    start, total = 0, 0
    for shard in range(shards):
        count = shard_events.get(shard, 0)
        if shard > start and total + count > limit:
            yield range(start, shard)
            start, total = shard, 0
        total += count
    yield range(start, shards)


def sequences(made: Logical, group: range, has_times: bool, has_events: bool) -> pa.Table:
    """Shard and columns of INTERACTIONS for some shards, ordered by shard and user."""
    events = made.events.filter(made.events["shard"].between(group.start, group.stop - 1))
    # The order of the struct's fields is the order of events; the item never decides, a place is unique.
    keys = (["time"] if has_times else []) + (["tie"] if "tie" in events.columns else []) + ["place"]
    values = ["item"] + (["event"] if has_events else [])
    packed = events.mutate(row=ibis.struct({name: events[name] for name in keys + values}))
    lists = packed.group_by("shard", "user").agg(rows=packed["row"].collect())
    lists = lists.mutate(rows=lists["rows"].sort())
    table = lists.select(
        "shard",
        user_id="user",
        items=lists["rows"].map(lambda row: row["item"]),
        times=lists["rows"].map(lambda row: row["time"]) if has_times else ibis.null("array<int64>"),
        events=lists["rows"].map(lambda row: row["event"]) if has_events else ibis.null("array<int32>"),
    )
    return table.order_by("shard", "user_id").to_pyarrow()


def write_interactions(
    folder: Path,
    made: Logical,
    shards: int,
    has_times: bool,
    has_events: bool,
    group_events: int = GROUP_EVENTS,
) -> list[str]:
    """Writes every shard's file, empty ones too; gives their hashes in order."""
    (folder / "interactions").mkdir()
    hashes = []
    for group in shard_groups(made.shard_events, shards, group_events):
        table = sequences(made, group, has_times, has_events)
        numbers = table["shard"].combine_chunks()
        for shard in group:
            part = table.filter(pc.equal(numbers, shard)) if len(group) > 1 else table
            part = part.drop_columns("shard").cast(INTERACTIONS)
            pq.write_table(part, folder / shard_file(shard, shards), compression="zstd")
            digest = TableHash(INTERACTIONS.names)
            digest.update(part)
            hashes.append(digest.hexdigest())
    return hashes


def write_items(con: Backend, folder: Path, items: ir.Table, kinds: dict[str, str]) -> str:
    """Writes the items by index, their columns as their kinds say; gives their hash."""
    schema = pa.schema(
        [
            ("index", pa.int32()),
            ("item_id", pa.string()),
            *((name, ARROW[kind]) for name, kind in kinds.items()),
        ]
    )
    return write_rows(con, folder / ITEMS, items.select(schema.names).order_by("index"), schema)


def write_rows(con: Backend, file: Path, table: ir.Table, schema: pa.Schema) -> str:
    """Streams an ordered relation into a Parquet file in a new folder; gives the hash of its rows."""
    file.parent.mkdir()
    digest = TableHash(schema.names)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in stream(con, table):
            part = batch.cast(schema)
            writer.write_batch(part)
            digest.update(part)
    return digest.hexdigest()


def time_span(events: ir.Table) -> dict[str, Any]:
    """first_time and last_time in seconds since 1970, and the quantiles of all times in steps of a thousandth.

    A time split cuts at a quantile, and a process that reads some shards must cut where all the others do. Quantile q
    is the earliest time with at least the share q of all events at it or before; found from counts, which spill.
    """
    counts = events.filter(events["time"].notnull()).group_by("time").agg(n=lambda t: t.count())
    total = counts.agg(total=counts["n"].sum()).to_pyarrow()["total"][0].as_py()
    if not total:
        return {"first_time": None, "last_time": None, "time_quantiles": None}
    running = counts.mutate(upto=counts["n"].cumsum(order_by="time"))
    before = running.mutate(below=(running["upto"] - running["n"]) * QUANTILES // total)
    # Times at which a step is passed, at most one for each step, and the first and the last.
    passed = before.filter(
        (before["upto"] * QUANTILES // total > before["below"]) | (before["upto"] == before["n"])
    )
    found = passed.select("time", "upto").order_by("time").to_pyarrow()
    times, upto = found["time"].to_pylist(), found["upto"].to_pylist()
    quantiles = [times[bisect.bisect_left(upto, step * total / QUANTILES)] for step in range(QUANTILES + 1)]
    return {"first_time": times[0], "last_time": times[-1], "time_quantiles": quantiles}
