"""The dataset folder as everything after prepare sees it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynrec_jax.data.kinds import TEXT
from dynrec_jax.errors import DataError

FORMAT = 1
INFO = "dataset.json"
ITEMS = "items/part-00000-of-00001.parquet"
TRIPLES = "triples/part-00000-of-00001.parquet"
AGAIN = "prepare the dataset again"
# What every reader of `info` may rely on.
KEYS = {
    "counts", "shards", "source", "filters", "dropped", "ties", "time_unit", "first_time", "last_time",
    "time_quantiles", "event_types", "item_columns", "pseudonymised", "content", "files",
}  # fmt: skip


def shard_file(shard: int, shards: int) -> str:
    """Name of a shard's file inside the folder."""
    return f"interactions/part-{shard:05d}-of-{shards:05d}.parquet"


def shard_of(user: str, shards: int) -> int:
    """The logical shard of a user id: a rule that any language can repeat."""
    return int(hashlib.sha256(user.encode()).hexdigest()[:16], 16) % shards


@dataclass(frozen=True)
class Dataset:
    """An immutable dataset folder; `info` is its dataset.json."""

    path: Path
    info: dict[str, Any]

    @property
    def content(self) -> str:
        """Hash of the logical rows."""
        return str(self.info["content"])

    @property
    def users(self) -> int:
        """Number of users."""
        return int(self.info["counts"]["users"])

    @property
    def items(self) -> int:
        """Number of items N; their indices are 1 … N."""
        return int(self.info["counts"]["items"])

    @property
    def events(self) -> int:
        """Number of events."""
        return int(self.info["counts"]["events"])

    @property
    def shards(self) -> int:
        """Number of logical shards."""
        return int(self.info["shards"])

    @property
    def source(self) -> str:
        """What the dataset was prepared from."""
        return str(self.info["source"])

    @property
    def has_times(self) -> bool:
        """Whether events have times."""
        return self.first_time is not None

    @property
    def has_events(self) -> bool:
        """Whether events have types."""
        return bool(self.event_types)

    @property
    def event_types(self) -> list[str]:
        """Names of event types: index 1 is the first, 0 is an event whose source names none."""
        return list(self.info["event_types"])

    @property
    def first_time(self) -> int | None:
        """Time of the first event, in seconds since 1970."""
        return None if self.info["first_time"] is None else int(self.info["first_time"])

    def read_shard(self, shard: int) -> pa.Table:
        """A shard's rows: user_id, items, times, events; lists are oldest first.

        Raises:
          DataError: The file is missing or damaged.
        """
        return self._read(shard_file(shard, self.shards))

    @property
    def item_column_kinds(self) -> dict[str, str]:
        """Kind of each of the items' columns, in their order.

        `text` is a string, `set` a list of different strings, `vector` a list of float32 of one length in all rows;
        each is null where an item has none. Folders of earlier versions do not tell: all their columns are text.
        """
        kinds = self.info.get("item_column_kinds", {})
        return {name: kinds.get(name, TEXT) for name in self.info["item_columns"]}

    def items_table(self) -> pa.Table:
        """index, item_id and the items' columns, by index; `item_column_kinds` says what they hold."""
        return self._items

    def triples(self) -> pa.Table | None:
        """The knowledge graph: head, relation and tail as strings, each triple once, sorted; None without one.

        A head or a tail that is an item id is that item, any other word an entity of its own.

        Raises:
          DataError: The file is missing or damaged.
        """
        return self._read(TRIPLES) if TRIPLES in self.info["files"] else None

    def item_ids(self) -> pa.Array:
        """Item ids as strings; position i - 1 is item i."""
        return self._items.column("item_id").combine_chunks()

    @cached_property
    def _items(self) -> pa.Table:
        return self._read(ITEMS)

    def _read(self, name: str) -> pa.Table:
        try:
            raw = (self.path / name).read_bytes()
            if hashlib.sha256(raw).hexdigest() != self.info["files"][name]["sha256"]:
                raise DataError(f"{self.path / name}: its SHA-256 is not the one in {INFO}; {AGAIN}")
            return pq.ParquetFile(pa.BufferReader(raw)).read()  # `read_table` imports pandas first
        except (OSError, pa.ArrowException) as error:
            cause = str(error).split("\n", 1)[0]
            raise DataError(f"{self.path / name}: not readable as Parquet ({cause}); {AGAIN}") from error

    def verify(self) -> None:
        """Reads every file; DataError where one is not what was written."""
        for name, facts in self.info["files"].items():
            if file_sha256(self.path / name) != facts["sha256"]:
                raise DataError(f"{self.path / name}: its SHA-256 is not the one in {INFO}; {AGAIN}")


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Opens a dataset folder and checks that every file is there in its size.

    Raises:
      DataError: No such folder, no dataset in it, another format, or a file missing or cut short.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {found}; expected a dataset folder, as `dynrec prepare` writes it")
    if not (folder / INFO).is_file():
        raise DataError(f"{folder}: has no {INFO}; expected a dataset folder, as `dynrec prepare` writes it")
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{folder / INFO}: not readable as JSON ({error}); {AGAIN}") from error
    version = info.get("format") if isinstance(info, dict) else None
    if version != FORMAT:
        raise DataError(f"{folder / INFO}: format {version!r}; this version reads format {FORMAT}; {AGAIN}")
    if lacking := KEYS - info.keys():
        raise DataError(f"{folder / INFO}: has no {', '.join(sorted(lacking))}; {AGAIN}")
    for name, facts in info["files"].items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file}: is missing; {AGAIN}")
        if (size := file.stat().st_size) != facts["bytes"]:
            raise DataError(f"{file}: {size} bytes; expected {facts['bytes']}; {AGAIN}")
    return Dataset(folder, info)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
