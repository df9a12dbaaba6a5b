"""Metrics over time: JSON lines, and whatever else follows a run."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from dynrec_jax.files import write_whole
from dynrec_jax.train.trackers import Trackers

FULL = {errno.ENOSPC, errno.EDQUOT}


class MetricsWriter:
    """Appends to `metrics.jsonl`: one object a line, with `step` and scalars.

    Opened at a step, it drops the lines of later steps: what a killed run had reported beyond its checkpoint
    happens again. A last line that was cut off is dropped too. What a full disk does not take is kept, and written
    when it does.
    """

    def __init__(self, folder: Path, start: int, trackers: Trackers | None = None):
        """`trackers` get the same numbers, and are closed with this."""
        path = folder / "metrics.jsonl"
        self._lines = _rewind(path, start)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._left = b""
        self._trackers = trackers

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of scalars; it is in the file when this returns, unless the disk is full."""
        self._left += json.dumps({"step": step, **values}).encode() + b"\n"
        self._try()
        if self._trackers is not None:
            self._trackers.write(step, values)

    def last(self, name: str) -> float:
        """The last value of a scalar in the lines that were there; 0 where none has it."""
        return next((float(line[name]) for line in reversed(self._lines) if name in line), 0.0)

    def sync(self) -> None:
        """Returns when what was written is on the disk; raises OSError where it is full."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files. Lines that a full disk has not taken are of steps that no checkpoint holds."""
        self._try()
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()

    def _try(self) -> None:
        try:
            self._flush()
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _flush(self) -> None:
        while self._left:
            self._left = self._left[self._file.write(self._left) :]


class SilentWriter(MetricsWriter):
    """Writes nothing: of several processes, one writes."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def last(self, name: str) -> float:
        """Nothing is known here."""
        return 0.0

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _rewind(path: Path, start: int) -> list[dict[str, Any]]:
    """The lines that stay."""
    if not path.exists():
        return []
    kept, values = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            read = json.loads(line)
            if read["step"] <= start:
                kept.append(line + "\n")
                values.append(read)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))
    return values
