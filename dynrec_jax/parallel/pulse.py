"""What a process is doing, for those who watch it: a phase, a step, and signs of life."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

# Where JAX waits for XLA to compile, as the stack of a thread shows it: nothing comes back from there for minutes.
COMPILER = "jax/_src/compiler.py"


class Seen(NamedTuple):
    """What a process is doing at a moment.

    Attributes:
      phase: what it does: "start", "restore", "data", "step", "evaluation", "save".
      step: how many steps it has done.
      beats: signs of life since its start.
      waits: whether it waits for the other processes.
      compiles: whether it waits for a compiler.
    """

    phase: str = "start"
    step: int = 0
    beats: int = 0
    waits: bool = False
    compiles: bool = False

    def told(self) -> str:
        """In words."""
        doing = "compiling, in" if self.compiles else "in"
        return f"{doing} {self.phase} after step {self.step}"


class Pulse:
    """Written by the thread that does the work, read by the one that watches.

    Attributes:
      phase: as `Seen` has it, and so have `step`, `beats` and `waits`.
      failed: the phase in which an error came up, if one has.
    """

    def __init__(self) -> None:
        """As `starts` leaves it."""
        self.beats = 0
        self.starts()

    def starts(self) -> None:
        """Work begins, in the thread that calls this."""
        self.phase, self.step, self.waits = "start", 0, False
        self.failed: str | None = None
        self._thread = threading.get_ident()

    def beat(self) -> None:
        """A sign of life: work goes on."""
        self.beats += 1

    @contextlib.contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """Names what is done inside."""
        before, self.phase = self.phase, phase
        self.beat()
        try:
            yield
        except BaseException:
            self.failed = self.failed or phase
            raise
        finally:
            self.phase = before
            self.beat()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Says that what is done inside is waiting for others."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
            self.beat()

    def seen(self) -> Seen:
        """What the process is doing now; for another thread."""
        return Seen(self.phase, self.step, self.beats, self.waits, self._compiles())

    def _compiles(self) -> bool:
        frame: Any = sys._current_frames().get(self._thread)
        while frame is not None:
            if frame.f_code.co_filename.endswith(COMPILER):
                return True
            frame = frame.f_back
        return False
