"""What a dataset folder must hold, computed from plain rows in plain Python."""

import hashlib
import json
import struct
from pathlib import Path

import pyarrow.parquet as pq

Event = tuple[str, str, int | None, str | None]


def histories(path: Path) -> dict[str, list[tuple[str, int | None, int | None]]]:
    """User to [(item id, time, event index)], read with Parquet alone, whatever the shards."""
    ids = pq.read_table(path / "items" / "part-00000-of-00001.parquet", partitioning=None)
    names = dict(zip(ids["index"].to_pylist(), ids["item_id"].to_pylist(), strict=True))
    found = {}
    for part in sorted((path / "interactions").iterdir()):
        for row in pq.read_table(part, partitioning=None).to_pylist():
            size = len(row["items"])
            times, events = row["times"] or [None] * size, row["events"] or [None] * size
            assert len(times) == len(events) == size
            assert row["user_id"] not in found
            found[row["user_id"]] = [
                (names[i], t, e) for i, t, e in zip(row["items"], times, events, strict=True)
            ]
    return found


def shard(user: str, shards: int) -> int:
    return int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big") % shards


def cold(items: int, share: float) -> set[int]:
    """Items that are kept out of training: SplitMix64 of their number and a constant, below the share of 2^64."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    constant = mixed(int.from_bytes(b"cold", "big"))
    return {item for item in range(1, items + 1) if mixed(item ^ constant) / 2**64 < share}


def core(events: list[tuple[str, str]], k: int) -> list[tuple[str, str]]:
    """The k-core of (user, item) events, one weak user or item at a time."""
    while True:
        weak = next(
            (
                (side, name)
                for side in (0, 1)
                for name in sorted({event[side] for event in events})
                if sum(event[side] == name for event in events) < k
            ),
            None,
        )
        if weak is None:
            return events
        events = [event for event in events if event[weak[0]] != weak[1]]


def content(
    shards: list[list[tuple]],
    items: list[tuple],
    event_types: list[str],
    columns: tuple[str, ...] = (),
    **more: str,
) -> str:
    """The content hash from plain rows: (user, items, times, events) by shard and (index, item_id, *columns)."""
    logical = {
        "event_types": event_types,
        "items": table_hash(["index", "item_id", *columns], items),
        "shards": [table_hash(["user_id", "items", "times", "events"], rows) for rows in shards],
        **more,
    }
    return hashlib.sha256(json.dumps(logical, sort_keys=True).encode()).hexdigest()


def table_hash(names: list[str], rows: list[tuple]) -> str:
    whole = b""
    for i, name in enumerate(names):
        nulls, lengths, values, leaves = (b"",) * 4
        for value in (row[i] for row in rows):
            nulls += bytes([value is None])
            if isinstance(value, str):
                lengths += len(value.encode()).to_bytes(8, "little")
                values += value.encode()
            elif isinstance(value, list):
                lengths += len(value).to_bytes(8, "little")
                for leaf in value:
                    if isinstance(leaf, str):
                        leaves += len(leaf.encode()).to_bytes(8, "little")
                        values += leaf.encode()
                    elif isinstance(leaf, float):
                        leaves += struct.pack("<f", leaf)
                    else:
                        leaves += leaf.to_bytes(8, "little", signed=True)
            elif value is None:
                lengths += bytes(8)
            else:
                values += value.to_bytes(8, "little", signed=True)
        parts = [hashlib.sha256(part).digest() for part in (nulls, lengths, values, leaves)]
        whole += hashlib.sha256(name.encode()).digest() + hashlib.sha256(b"".join(parts)).digest()
    return hashlib.sha256(whole).hexdigest()
