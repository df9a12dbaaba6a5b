"""Faults of the machine, in whatever words the engine or the file format library reports them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from dynrec_jax.errors import DataError, MachineError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# DuckDB and Arrow do not always keep the error number, but they keep the operating system's words.
DISK_FULL_TEXT = ("no space left", "disk quota exceeded", "file too large", "max_temp_directory_size")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that a file could not grow."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return isinstance(error, OSError | duckdb.Error) and any(t in str(error).lower() for t in DISK_FULL_TEXT)


@contextmanager
def machine_faults(out: Path) -> Iterator[None]:
    """Turns faults met while `out` is written into one line.

    Raises:
      MachineError: The disk is full, memory does not suffice, or reading or writing failed.
      DataError: A place may not be read or written.
    """
    try:
        yield
    except (OSError, duckdb.Error) as error:
        if is_disk_full(error):
            raise MachineError(
                f"{out}: the disk is full, nothing was kept; free some space and prepare again"
            ) from error
        if isinstance(error, PermissionError):
            raise DataError(
                f"{error.filename or out}: permission denied; choose a place that you may use"
            ) from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise MachineError(
                f"{out}: not enough memory to prepare, nothing was kept: {first_line(error)}"
            ) from error
        if isinstance(error, duckdb.IOException | OSError):
            raise MachineError(
                f"{out}: reading or writing failed, nothing was kept: {first_line(error)}"
            ) from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of an exception's text."""
    return str(error).strip().split("\n", 1)[0]
