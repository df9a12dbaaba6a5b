"""What devices and host do in a few steps, recorded when somebody asks for it: `kill -USR1` to a process of the run.

The recording lies in `profile/` in the run folder, for TensorBoard or Perfetto.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from dynrec_jax.errors import one_line
from dynrec_jax.train.hooks import Metrics
from dynrec_jax.train.progress import Progress
from dynrec_jax.train.state import TrainState

STEPS = 5


class TraceHook:
    """Records the steps that come after a SIGUSR1; of several processes each records its own devices."""

    def __init__(self, folder: Path, process: int, progress: Progress):
        """`folder` is the run folder."""
        self._folder, self._process, self._progress = folder / "profile", process, progress
        self._asked = False
        self._until: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signal inside; where this is not the main thread, nobody can ask."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, lambda number, frame: self._ask())
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)
            self._end()

    def _ask(self) -> None:
        self._asked = True

    def __call__(self, step: int, state: TrainState, metrics: Metrics, last: bool) -> str | None:
        """Begins to record, or ends it once the steps are done."""
        if self._until is not None and (step >= self._until or last):
            jax.block_until_ready(metrics)
            self._end()
        if self._asked and not last and self._until is None:
            self._asked, self._until = False, step + STEPS
            place = self._folder / f"step{step + 1}-process{self._process}"
            try:
                jax.profiler.start_trace(str(place))
            except (OSError, RuntimeError, ValueError) as error:
                self._until = None
                self._progress.say(f"{place}: nothing can be recorded ({one_line(error)})")
            else:
                self._progress.say(f"recording steps {step + 1} to {step + STEPS} in {place}")
        return None

    def _end(self) -> None:
        if self._until is not None:
            self._until = None
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError, ValueError) as error:
                self._progress.say(f"{self._folder}: nothing was recorded ({one_line(error)})")
