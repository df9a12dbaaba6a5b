"""What a reader gives: events with the places they came from, and the items where it has them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend

from dynrec_jax.data.engine import drop, load
from dynrec_jax.data.sources.typed import typed_events
from dynrec_jax.errors import DataError

RAW = "raw_events"


@dataclass(frozen=True)
class Columns:
    """Names of columns as the user gave them: None is the reader's own default, '' none at all."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    event: str | None = None
    rating: str | None = None

    def given(self) -> list[str]:
        """Which of them the user named."""
        return [
            name for name in ("user", "item", "time", "event", "rating") if getattr(self, name) is not None
        ]


@dataclass(frozen=True)
class Source:
    """A log in one shape, whatever it was read from.

    Attributes:
      name: KIND and the file's name or the parameters, without the path.
      events: user, item (string, null where missing), time (int64 seconds, null), event (string, null),
        rating (float64, null) and place (int64): grows in the order of (file, row), unique.
      where: A place as `file:line`, for messages.
      has_times, has_events, has_ratings: Whether the source has the column at all.
      time_unit: How the source wrote times.
      items: What `load_described` gives, or None; item ids may repeat.
      ordered_ties: Whether events at the same time are known to be in the order in which they happened.
    """

    name: str
    events: ir.Table
    where: Callable[[int], str]
    has_times: bool
    has_events: bool
    has_ratings: bool
    time_unit: str | None = None
    items: ir.Table | None = None
    ordered_ties: bool = False


@dataclass
class Job:
    """What every reader is handed.

    Attributes:
      con: The engine that relations are made in.
      path: What followed `KIND:`.
      columns: Column names given by the user.
      key: Where given, user ids become HMAC-SHA256 under this key before they reach the engine.
      folder: A temporary folder that exists.
      own_items: Whether the source's own items are wanted; not where a file describes them.
    """

    con: Backend
    path: str
    columns: Columns = field(default_factory=Columns)
    key: bytes | None = None
    folder: Path = Path()
    own_items: bool = True


def raw_schema(times: bool, events: bool, ratings: bool) -> pa.Schema:
    """Schema of a reader's batches: strings as they were written, and the place."""
    optional = [("time", times), ("event", events), ("rating", ratings)]
    names = ["user", "item", *(name for name, there in optional if there)]
    return pa.schema([*((name, pa.string()) for name in names), ("place", pa.int64())])


def pseudonyms(users: pa.Array, key: bytes) -> pa.Array:
    """HMAC-SHA256 of each user id in hex; null stays null."""
    coded = users.dictionary_encode()
    hashed = [
        None if user is None else hmac.new(key, user.encode(), hashlib.sha256).hexdigest()
        for user in coded.dictionary.to_pylist()
    ]
    return pa.array(hashed, pa.string()).take(coded.indices)


def finish(
    job: Job,
    name: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    where: Callable[[int], str],
    *,
    time_unit: str | None = None,
    items: ir.Table | None = None,
    ordered_ties: bool = False,
) -> Source:
    """Loads a reader's raw batches and gives them their types.

    Args:
      job: The reader's job.
      name: The source's name for the dataset.
      schema: What `raw_schema` gave.
      batches: Record batches of that schema; '' is missing.
      where: A place as `file:line`.
      time_unit: Unit of the times where the reader knows it; else it is told by their magnitude.
      items: Relation of items.
      ordered_ties: Whether events at the same time are known to be in the order in which they happened.

    Raises:
      DataError: No rows at all; a time or rating that is not a number; times in mixed units.
    """
    user = schema.get_field_index("user")

    def hidden() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if job.key is not None:
                batch = batch.set_column(user, "user", pseudonyms(batch.column(user), job.key))
            yield batch

    raw = load(job.con, RAW, schema, hidden())
    if not raw.count().to_pyarrow().as_py():
        raise DataError(f"{job.path}: no rows; expected at least one event")
    events, unit = typed_events(job.con, raw, where, time_unit)
    drop(job.con, RAW)
    has_times, has_events, has_ratings = (name in schema.names for name in ("time", "event", "rating"))
    return Source(name, events, where, has_times, has_events, has_ratings, unit, items, ordered_ties)
