"""Formats of what scoring writes: each turns a table into a file that begins and ends here."""

import json
from collections.abc import Callable
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


def _parquet(table: pa.Table, file: BinaryIO) -> None:
    pq.write_table(table, file, compression="zstd")


def _arrow(table: pa.Table, file: BinaryIO) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _json_lines(table: pa.Table, file: BinaryIO) -> None:
    for batch in table.to_batches(max_chunksize=1024):
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in batch.to_pylist())
        file.write("".join(f"{line}\n" for line in lines).encode())


# Name, which is the end of the files' names too -> what writes it.
FORMATS: dict[str, Callable[[pa.Table, BinaryIO], None]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "jsonl": _json_lines,
}
