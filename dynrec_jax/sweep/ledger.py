"""Who does which trial: what a ledger is, and what it tells of trials."""

from typing import NamedTuple, Protocol

from dynrec_jax.sweep.definition import Sweep
from dynrec_jax.sweep.space import Point

COMPLETE, PRUNED, FAILED, RUNNING, WAITING = "complete", "pruned", "failed", "running", "waiting"
ENDS = (COMPLETE, PRUNED, FAILED)
MOST_DEATHS = 8  # of a trial's workers without a new checkpoint, before it has failed
KILLER = "its worker ended {} times without a new checkpoint: killed, perhaps for memory, or crashed"
UNMEASURED = "nothing was measured on validation; its metrics.jsonl should say why"


class Task(NamedTuple):
    """A trial that this worker holds.

    Attributes:
      number: from 0.
      point: what it changes in the config.
      attempt: which worker's it is, from 1.
      folder: its run folder, below the sweep's.
      source: the folder of a worker that may still write there, to be copied first; empty where there is none.
      given_up: the step at which an earlier worker was told to give it up; None where it goes on.
      best_step: of what was reported, the step of the largest; None where nothing was.
    """

    number: int
    point: Point
    attempt: int
    folder: str
    source: str = ""
    given_up: int | None = None
    best_step: int | None = None


class Row(NamedTuple):
    """A trial as it stands.

    Attributes:
      number: from 0.
      state: complete, pruned, failed, running or waiting.
      point: what it changes in the config.
      value: of the sweep's metric: the best so far.
      step: steps that it has reported; of one that has ended, where its best was.
      metrics: on validation, at its best step.
      seconds: of work, all attempts together.
      attempts: workers that had it.
      reason: why it failed or was given up.
      folder: its run folder, below the sweep's.
    """

    number: int
    state: str
    point: Point
    value: float | None = None
    step: int | None = None
    metrics: dict[str, float] = {}  # noqa: RUF012 # never changed
    seconds: float = 0.0
    attempts: int = 0
    reason: str = ""
    folder: str = ""


class Lost(Exception):
    """Another worker has the trial."""


class Ledger(Protocol):
    """What a worker asks of the place where trials are recorded.

    Attributes:
      sweep: what is tried.
    """

    sweep: Sweep

    def claim(self) -> Task | None:
        """A trial to work on; None where there is none now."""
        ...

    def done(self) -> bool:
        """Whether every trial has ended."""
        ...

    def beat(self, task: Task, seconds: float) -> None:
        """A sign of life, after so many seconds of work; raises Lost."""
        ...

    def report(self, task: Task, step: int, value: float, last: bool = False) -> bool:
        """Records the metric at a step; returns whether the trial is to be given up, unless it is its last one.

        Raises:
          Lost: another worker has it.
        """
        ...

    def finish(
        self, task: Task, state: str, step: int | None, metrics: dict[str, float], reason: str = ""
    ) -> None:
        """Records how the trial has ended; raises Lost."""
        ...

    def release(self, task: Task) -> None:
        """Gives the trial back, to be gone on with by anybody."""
        ...

    def rows(self) -> list[Row]:
        """All trials as they stand."""
        ...


def folder_name(number: int, attempt: int = 1) -> str:
    """The run folder of a trial, below the sweep's."""
    return f"trials/{number:04d}" + ("" if attempt == 1 else f"-{attempt}")
