"""One worker of a sweep: it claims a trial, trains it, and tells how it ended, until there is nothing left to do.

Trials run in this process one after the other, which saves each the start of JAX; what they print goes to a log of
their own. A worker that is told to end gives its trial back, to be gone on with from the last checkpoint.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from dynrec_jax.errors import MACHINE, HeldRunError, MachineError, NonFiniteError, UserError, one_line
from dynrec_jax.sweep.definition import Sweep, told
from dynrec_jax.sweep.ledger import COMPLETE, FAILED, PRUNED, Ledger, Lost, Task

IDLE_SECONDS = 1.0  # between looks for work, where others still have some
LOOK_SECONDS = 1.0  # between looks at whether to end
PRUNED_REASON = "pruned"

# (config, run folder, watch) -> how the run stands
Train = Callable[[ml_collections.ConfigDict, Path, Callable[[int, float | None], str | None]], dict[str, Any]]


class Ended(BaseException):
    """This worker was told to end."""


class Worker:
    """Does trials until all have ended."""

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        workdir: Path,
        train: Train,
        beat_seconds: float,
        say: Callable[[str], None],
        parent: int | None = None,
    ):
        """`train` does a trial, `say` writes to its log; without the process `parent` this one ends too."""
        self._say = say
        self._sweep, self._ledger, self._workdir, self._train = sweep, ledger, workdir, train
        self._beat_seconds, self._parent = beat_seconds, parent
        self._ending = threading.Event()

    def end(self) -> None:
        """Has the worker end at the next step."""
        self._ending.set()

    def run(self) -> None:
        """Works until every trial has ended, or the worker is told to end.

        Raises:
          MachineError: a full disk, or a database that is gone; the trial is given back.
        """
        while not self._must_end():
            task = self._ledger.claim()
            if task is not None:
                self._do(task)
            elif self._ledger.done():
                return
            else:
                self._ending.wait(IDLE_SECONDS)

    def _must_end(self) -> bool:
        return self._ending.is_set() or (self._parent is not None and os.getppid() != self._parent)

    def _do(self, task: Task) -> None:
        began = time.monotonic()
        sign = Sign(self._ledger, task, began, self._beat_seconds, self._say)
        log = self._workdir / "logs" / f"{task.number:04d}.log"
        with contextlib.ExitStack() as opened:
            opened.enter_context(_output_to(log))
            opened.enter_context(sign)
            self._say(
                f"trial {task.number}: {told(task.point)}; attempt {task.attempt}, in {task.folder}, "
                f"process {os.getpid()}"
            )
            try:
                self._end_of(task, sign)
            except Lost as lost:
                self._say(str(lost))
            except HeldRunError as error:
                # By a worker that does not answer: the next attempt sees that, and takes a folder of its own.
                self._say(one_line(error))
                sign.stop()
                self._ledger.release(task)
                self._ending.wait(IDLE_SECONDS)
            except (Ended, KeyboardInterrupt):
                sign.stop()
                self._ledger.release(task)
                self._say(f"trial {task.number}: given back; it goes on from its last checkpoint")
                self._ending.set()
            except MachineError as error:  # of the machine, not of the trial: others would meet it too
                self._say(one_line(error))
                sign.stop()
                self._ledger.release(task)
                raise
            _forget_programs()

    def _end_of(self, task: Task, sign: "Sign") -> None:
        """Trains, and records how it ended."""
        config, folder = self._sweep.config_of(task.point), self._workdir / task.folder
        if task.source and not folder.exists():
            from dynrec_jax import workdir as workdirs

            workdirs.copy_of(self._workdir / task.source, folder)
        if task.given_up is not None:
            metrics = {} if task.best_step is None else measured(folder, task.best_step)
            self._finish(task, sign, PRUNED, task.best_step, metrics, self._verdict(task.given_up))
            return
        pruned = False

        def watch(step: int, value: float | None) -> str | None:
            nonlocal pruned
            if self._must_end():
                raise Ended
            if sign.lost:
                raise Lost(f"trial {task.number}: another worker has taken it over")
            if value is None or pruned:
                return None
            pruned = self._ledger.report(task, step, value, step >= config.train.steps)
            return PRUNED_REASON if pruned else None

        try:
            standing = self._train(config, folder, watch)
        except (Lost, MachineError, HeldRunError):
            raise
        except (UserError, NonFiniteError) as error:
            self._say(one_line(error))
            self._finish(task, sign, FAILED, None, {}, one_line(error))
            return
        except Exception as error:
            if isinstance(error, OSError) and error.errno in MACHINE:
                raise MachineError(one_line(error)) from error
            traceback.print_exc()
            sys.stderr.flush()
            reason = f"{type(error).__name__}: {one_line(error)}"[:500] + f" (logs/{task.number:04d}.log)"
            self._finish(task, sign, FAILED, None, {}, reason)
            return
        best = standing.get("best_step")
        metrics = {} if best is None else measured(folder, best)
        # A run that has ended by itself at the same step is as complete as it can be.
        pruned = pruned and not standing.get("stopped")
        state, reason = (PRUNED, self._verdict(standing["step"])) if pruned else (COMPLETE, "")
        self._finish(task, sign, state, best, metrics, reason)

    def _verdict(self, step: int) -> str:
        return f"{self._sweep.what.pruner}: behind the others at step {step}"

    def _finish(
        self, task: Task, sign: "Sign", state: str, step: int | None, metrics: dict[str, float], reason: str
    ) -> None:
        sign.show()
        self._ledger.finish(task, state, step, metrics, reason)


class Sign:
    """Signs of life of a trial's worker, every few seconds, in a thread.

    Attributes:
      lost: whether another worker has the trial by now.
    """

    def __init__(self, ledger: Ledger, task: Task, began: float, every: float, say: Callable[[str], None]):
        self.lost = False
        self._say = say
        self._ledger, self._task, self._began, self._every = ledger, task, began, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="sign of life", daemon=True)

    def __enter__(self) -> "Sign":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns when no more signs are shown."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def show(self) -> None:
        """One, now; raises Lost."""
        self._ledger.beat(self._task, time.monotonic() - self._began)

    def _show(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self.show()
            except Lost:
                self.lost = True
                return
            except (
                Exception
            ) as error:  # the work goes on; whether it is still ours is told when it is recorded
                self._say(f"no sign of life could be shown: {one_line(error)}")


def measured(folder: Path, step: int) -> dict[str, float]:
    """What a run's `metrics.jsonl` says of validation at a step."""
    found: dict[str, float] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if values.get("step") == step:
                prefix = "validation/"
                found |= {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    return found


def end_on_signals(worker: Worker) -> None:
    """Has SIGTERM and SIGINT end the worker, between two steps."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.end())


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Whatever this process writes to its standard output and error goes to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _forget_programs() -> None:
    """Compiled programs of other shapes would pile up from trial to trial; on the disk they are kept."""
    if "jax" in sys.modules:
        import jax

        jax.clear_caches()
