"""How a run shows itself: a live bar on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LOG_SECONDS = 15.0  # between lines where there is no terminal


class Progress:
    """Progress over a number of steps, with a loss, a throughput and the time that is left."""

    def __init__(self, what: str, total: int, start: int = 0, unit: str = "histories/s", quiet: bool = False):
        """`quiet` shows nothing: of several processes, one speaks."""
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._what, self._total, self._start, self._unit = what, total, start, unit
        self._began = time.perf_counter()
        self._said = 0.0
        self._bars: Bars | None = None
        if self.console.is_terminal and not quiet:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bars.add_task(what, total=total, completed=start, note="")

    def __enter__(self) -> "Progress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def goes_on(self, start: int) -> None:
        """Says that so many steps had been done before."""
        self._start = start
        if self._bars is not None:
            self._bars.update(self._task, completed=start)

    def update(
        self, done: int, loss: float | None = None, rate: float | None = None, share: float | None = None
    ) -> None:
        """Tells how far the work is; a log file gets a line every few seconds. `share` is of the devices' peak."""
        note = " ".join(
            part
            for part in (
                "" if loss is None else f"loss {loss:.4f}",
                "" if rate is None else f"{rate:,.0f} {self._unit}",
                "" if share is None else f"{share:.0%} of peak",
            )
            if part
        )
        if self._bars is not None:
            self._bars.update(self._task, completed=done, note=note)
            return
        now = time.perf_counter()
        if now - self._said < LOG_SECONDS and done < self._total:
            return
        self._said = now
        spent = now - self._began
        left = spent / max(done - self._start, 1) * (self._total - done)
        self.say(f"{self._what} {done}/{self._total} {note} elapsed {_clock(spent)} left {_clock(left)}")

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        self.console.print(text, markup=False, soft_wrap=True)
        if self._bars is None:
            sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
