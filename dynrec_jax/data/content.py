"""Hashes of logical rows: the same whatever engine, Parquet writer or batch size wrote them."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.compute as pc


class ColumnHash:
    """A hash of one column's values that does not know how they were cut into batches or chunks."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(4)]

    def update(self, column: pa.Array | pa.ChunkedArray) -> None:
        """Adds values: strings, integers, or lists of strings, integers or float32, each of which may be null."""
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            null, length, value, leaf = self._parts
            null.update(pc.is_null(chunk).cast(pa.uint8()).to_numpy().tobytes())
            if pa.types.is_list(chunk.type):
                length.update(
                    pc.fill_null(pc.list_value_length(chunk), 0).cast(pa.int64()).to_numpy().tobytes()
                )
                leaves = pc.list_flatten(chunk)
                if pa.types.is_string(leaves.type):
                    self._strings(leaves, leaf)
                else:
                    kind = pa.float32() if pa.types.is_floating(leaves.type) else pa.int64()
                    leaf.update(leaves.cast(kind).to_numpy().tobytes())
            elif pa.types.is_string(chunk.type):
                self._strings(pc.fill_null(chunk, ""), length)
            else:
                value.update(pc.fill_null(chunk, 0).cast(pa.int64()).to_numpy().tobytes())

    def _strings(self, texts: pa.Array, length: hashlib._Hash) -> None:
        """Adds strings, and their lengths to the part that is given."""
        length.update(pc.binary_length(texts).cast(pa.int64()).to_numpy().tobytes())
        self._parts[2].update("".join(texts.to_pylist()).encode())

    def digest(self) -> bytes:
        """Digest of all values so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).digest()


class TableHash:
    """A hash of a table's logical rows: column names, types' kinds and values, in order of rows."""

    def __init__(self, names: list[str]) -> None:
        self._columns = {name: ColumnHash() for name in names}

    def update(self, batch: pa.Table | pa.RecordBatch) -> None:
        """Adds rows."""
        for name, column in self._columns.items():
            column.update(batch.column(name))

    def hexdigest(self) -> str:
        """Digest of all rows so far."""
        whole = hashlib.sha256()
        for name, column in self._columns.items():
            whole.update(hashlib.sha256(name.encode()).digest() + column.digest())
        return whole.hexdigest()


def content_hash(shards: list[str], items: str, event_types: list[str], triples: str | None = None) -> str:
    """Hash of a dataset.

    Args:
      shards: Hashes of the shards in order (so their number counts too).
      items: Hash of the items.
      event_types: Names of event types.
      triples: Hash of the triples; None where there are none.
    """
    logical: dict[str, object] = {"shards": shards, "items": items, "event_types": event_types}
    if triples is not None:
        logical["triples"] = triples
    return hashlib.sha256(json.dumps(logical, sort_keys=True).encode()).hexdigest()
