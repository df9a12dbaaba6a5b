"""The engine that preparation runs on: DuckDB, embedded, out of core, behind Ibis.

What only DuckDB has is in this file; the preparation itself is Ibis expressions.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend

STREAM = "incoming"
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def half_of_memory() -> str:
    """Half of the memory of the machine, or of the container that it is, as DuckDB writes sizes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no control groups, or "max"
        memory = min(memory, int(CONTAINER_LIMIT.read_text()))
    return f"{memory // 2**21}MiB"


@contextmanager
def engine(folder: Path, memory: str | None = None) -> Iterator[Backend]:
    """Opens a DuckDB whose database file and spilled blocks lie in `folder`, and closes it.

    Args:
      folder: An existing folder; the caller removes it.
      memory: What DuckDB may hold in memory before it spills, such as `2GiB`; None is half of the machine's.
    """
    with warnings.catch_warnings():
        # Ibis 12 calls what DuckDB 2 has renamed.
        warnings.filterwarnings("ignore", "fetch_arrow_table", DeprecationWarning)
        connection = ibis.duckdb.connect(
            folder / "prepare.duckdb",
            temp_directory=str(folder / "spill"),
            memory_limit=memory or half_of_memory(),
            autoinstall_known_extensions=False,
            autoload_known_extensions=False,
        )
        # The bars are ours; DuckDB's would be drawn over them.
        connection.raw_sql("SET enable_progress_bar = false")
        try:
            yield connection
        finally:
            connection.disconnect()


def load(con: Backend, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> ir.Table:
    """Streams record batches into a new table; an exception of `batches` comes out as it was raised."""
    raised: list[Exception] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            # DuckDB would wrap it in text of its own, traceback included.
            raised.append(error)
            raise

    con.con.register(STREAM, pa.RecordBatchReader.from_batches(schema, watched()))
    try:
        return con.create_table(name, con.table(STREAM))
    except duckdb.Error:
        if raised:
            raise raised[0] from None
        raise
    finally:
        con.con.unregister(STREAM)


def drop(con: Backend, name: str) -> None:
    """Drops a table; the engine uses its blocks again."""
    # Ibis' own `drop_table` loses the name with some versions of its SQL writer.
    con.raw_sql(f'DROP TABLE "{name}"')


def stream(con: Backend, table: ir.Table, rows: int = 100_000) -> pa.RecordBatchReader:
    """Record batches of a relation, never the whole of it in memory."""
    # Ibis' own `to_pyarrow_batches` calls a method that DuckDB 2 no longer has.
    return con.con.sql(con.compile(table)).to_arrow_reader(rows)
