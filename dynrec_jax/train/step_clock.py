"""How long steps take, and how much of the time since a run's first start counted."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

SPENT = "productive_seconds"
PERCENTS = (50, 90, 99)  # of the time that a step takes


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
    found = np.percentile(seconds, PERCENTS, method="inverted_cdf")
    return {f"step_seconds_p{percent}": float(value) for percent, value in zip(PERCENTS, found, strict=True)}
