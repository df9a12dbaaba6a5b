"""The starts of a run: who writes in its folder now, and how much of the time since the first one counted."""

import json
import os
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dynrec_jax.errors import HeldRunError
from dynrec_jax.files import sync

FILE = "attempts.jsonl"
SPENT = "productive_seconds"
PERCENTS = (50, 90, 99)  # of the time that a step takes


class Attempt(NamedTuple):
    """One start of a run.

    Attributes:
      number: how many came before it.
      token: tells it from all others.
      first: when the run was started first, in seconds since 1970.
    """

    number: int
    token: str
    first: float


def begin(folder: Path, step: int, processes: int) -> Attempt:
    """Notes a start in a run folder; from now on no earlier one may write checkpoints there.

    Args:
      folder: the run folder.
      step: of the newest checkpoint there.
      processes: how many there are.
    """
    path, now = folder / FILE, time.time()
    earlier = _read(path)
    attempt = Attempt(len(earlier), secrets.token_hex(8), float(earlier[0]["began"]) if earlier else now)
    line = {
        "attempt": attempt.number,
        "began": now,
        "step": step,
        "processes": processes,
        "machine": platform.node(),
        "pid": os.getpid(),
        "token": attempt.token,
    }
    with path.open("ab") as file:
        # A line that a full disk has cut off ends here.
        file.write((b"" if _ends_well(path) else b"\n") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(folder)
    return attempt


def check_current(folder: Path, attempt: Attempt) -> None:
    """Raises HeldRunError where the run was started again elsewhere, by somebody to whom this one seemed dead."""
    newest = (_read(folder / FILE) or [{}])[-1]
    if newest.get("token") != attempt.token:
        by = (
            f" by process {newest['pid']} of {newest['machine']}"
            if {"pid", "machine"} <= newest.keys()
            else ""
        )
        raise HeldRunError(
            f"{folder}: this run was started again{by}, and goes on there; this process has written nothing since, and "
            "ends"
        )


def tokens(text: str) -> list[str]:
    """The tokens of the starts that a file's text lists, the first start's first."""
    return [str(line["token"]) for line in _lines(text)]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return _lines(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return []


def _lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            read = json.loads(line)
            float(read["began"]), str(read["token"])
        except (ValueError, KeyError, TypeError):
            continue
        found.append(read)
    return found


def _ends_well(path: Path) -> bool:
    return path.stat().st_size == 0 or path.read_bytes().endswith(b"\n")


class StepClock:
    """How long steps take, and what share of the time since a run's first start went into steps that counted.

    A step's time is that from its input on to the next step's, without what is done aside: evaluations, checkpoints.
    The first step of a start, in which it is compiled, counts for nothing, and neither do steps that were done and
    lost. What counted stands in the log, whose lines go back with a run.
    """

    def __init__(self, first: float, spent: float = 0.0):
        """`first` is when the run was started first, `spent` what steps have taken until now, both in seconds."""
        self.spent = spent
        self._first, self._aside = first, 0.0
        self._began: float | None = None
        self._compiled = False
        self._seconds: list[float] = []

    def begins(self) -> None:
        """A step begins here."""
        self._began, self._aside = time.perf_counter(), 0.0

    def ends(self) -> None:
        """It is done, and so is all that came after it."""
        if self._began is None:
            return
        seconds = time.perf_counter() - self._began - self._aside
        if self._compiled:
            self.spent += seconds
            self._seconds.append(seconds)
        self._compiled = True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is no part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - began

    def told(self) -> dict[str, float]:
        """Percentiles of the steps since the last call, in seconds; and since the run's first start, what counted."""
        seconds, self._seconds = self._seconds, []
        share = {SPENT: self.spent, "goodput": self.spent / max(time.time() - self._first, 1e-9)}
        return share if not seconds else {**percentiles(seconds), **share}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """`step_seconds_p50`, `_p90` and `_p99`: the smallest value that so many percent of all do not exceed."""
    ordered = sorted(seconds)
    return {
        f"step_seconds_p{percent}": ordered[max(-(-percent * len(ordered) // 100), 1) - 1]
        for percent in PERCENTS
    }
