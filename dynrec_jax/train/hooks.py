"""What happens every n steps: a hook is called after each step and once more after the last one.

The metrics that a hook gets are still being computed; the log reads those of the step before, so that the device
is never waited for. A hook returns a reason where the run should stop.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import ml_collections
import numpy as np

from dynrec_jax.errors import MachineError, NonFiniteError, one_line
from dynrec_jax.evaluate.evaluator import Evaluator
from dynrec_jax.parallel.pulse import Pulse
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.flops import Utilisation
from dynrec_jax.train.metrics_writer import MetricsWriter
from dynrec_jax.train.progress import Progress
from dynrec_jax.train.saving import FULL
from dynrec_jax.train.state import TrainState
from dynrec_jax.train.step_clock import PERCENTS, SPENT, StepClock

Metrics = dict[str, Any]
# Of the log: what differs between runs that are the same.
CLOCK = (
    *("histories_per_second", "utilisation", "goodput", SPENT),
    *(f"step_seconds_p{percent}" for percent in PERCENTS),
)
# (step, the metric where it was measured) -> why the run should end, if it should
Watch = Callable[[int, float | None], str | None]
PAUSES = (2.0, 5.0, 10.0)  # seconds before another try to write the last checkpoint


class Hook(Protocol):
    """Called after step number `step` (from 1); `last` when the run ends with this step."""

    def __call__(self, step: int, state: TrainState, metrics: Metrics, last: bool) -> str | None:
        """Returns why the run should stop, or None."""
        ...


class Interrupted(Exception):
    """The run is to stop at once: what is being measured is measured when it goes on."""


class NonFiniteLoss(NonFiniteError):
    """The loss or its gradient became NaN or infinite; the message names the step."""


def check_finite(step: int, metrics: Metrics) -> dict[str, float]:
    """The metrics of a step as numbers; raises NonFiniteLoss."""
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise NonFiniteLoss(
                f"step {step}: {name} is {values[name]}; lower train.learning_rate or set train.clip_norm, "
                "and start again from the last checkpoint"
            )
    return values


class LogHook:
    """Checks every step's metrics, writes every n-th, and moves the progress display.

    Rates are those since the line before, with whatever the run did besides: evaluations and checkpoints too.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        writer: MetricsWriter,
        progress: Progress,
        start: int,
        utilisation: Utilisation | None = None,
        clock: StepClock | None = None,
    ):
        """`utilisation` is None where the devices' peak is not known, `clock` where nobody asks how long steps take."""
        self._clock = clock
        self._every = config.logging.every
        self._batch = config.train.batch_size
        self._writer = writer
        self._progress = progress
        self._utilisation = utilisation
        self._since = (start, time.perf_counter())
        self._targets = self._attended = 0.0  # since then
        self._before: tuple[int, Metrics] | None = None

    def __call__(self, step: int, state: TrainState, metrics: Metrics, last: bool) -> str | None:
        """Reads the metrics of the step before; of this one too where it is the last."""
        if self._before is not None and self._before[0] < step:
            self._report(*self._before, last=False)
        if last:
            self._report(step, metrics, last=True)
        self._before = None if last else (step, metrics)
        return None

    def settle(self) -> None:
        """Writes what is known of the step just done, to the disk: it will be part of a checkpoint."""
        if self._before is not None:
            self._report(*self._before, last=False)
            self._before = None
        self._writer.sync()

    def _report(self, step: int, metrics: Metrics, last: bool) -> None:
        values = check_finite(step, metrics)
        self._targets += values["targets"]
        self._attended += values.pop("attended")
        if step % self._every and not last:
            return
        now = time.perf_counter()
        seconds = max(now - self._since[1], 1e-9)
        rate, share = (step - self._since[0]) * self._batch / seconds, None
        clock = {"histories_per_second": rate}
        if self._utilisation is not None:
            share = self._utilisation.share(self._targets, self._attended, seconds)
        if share is not None:
            clock["utilisation"] = share
        if self._clock is not None:
            clock.update(self._clock.told())
        self._since, self._targets, self._attended = (step, now), 0.0, 0.0
        self._writer.write(step, {**values, **clock})
        self._progress.update(step, values["loss"], rate, share)


class EvaluateHook:
    """Measures validation every n steps and after the last one, remembers the best, and stops early."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        evaluator: Evaluator | None,
        writer: MetricsWriter,
        standing: dict[str, Any],
        progress: Progress,
        pulse: Pulse | None = None,
        interrupt: Callable[[], bool] = lambda: False,
        clock: StepClock | None = None,
    ):
        """`interrupt` is asked between batches of users; where it says so, measuring ends, and is owed."""
        self._steps = config.train.steps
        self._pulse, self._clock = pulse or Pulse(), clock or StepClock(0.0)
        self._interrupt = interrupt
        if evaluator is not None:
            evaluator.before_batch(self._go_on)
        self.interrupted = False
        self._every = config.train.evaluate_every
        self._patience = config.train.patience
        self._metric = config.evaluation.metric
        self._evaluator = evaluator
        self._writer = writer
        self._progress = progress
        self.standing = standing
        self.value: float | None = None  # of the step just done, where it was measured

    def __call__(self, step: int, state: TrainState, metrics: Metrics, last: bool) -> str | None:
        """Sets `value` and `standing`; returns a reason once `patience` evaluations brought nothing better."""
        self.value = None
        if not self._due(step, last):
            return None
        check_finite(step, metrics)
        return self._measure(step, state)

    def owed(self, step: int, state: TrainState) -> str | None:
        """Measures what was interrupted where the run stopped, at this step; as a call does."""
        self.value = None
        return self._measure(step, state) if self._due(step, step == self._steps) else None

    def _due(self, step: int, last: bool) -> bool:
        due = last or (self._every > 0 and step % self._every == 0)
        return self._evaluator is not None and due and self.standing.get("evaluated") != step

    def _go_on(self) -> None:
        if self._interrupt():
            raise Interrupted

    def _measure(self, step: int, state: TrainState) -> str | None:
        assert self._evaluator is not None
        try:
            with self._pulse.at("evaluation"), self._clock.aside():
                measured = self._evaluator.metrics(**state.served)
        except Interrupted:
            self.interrupted, self._pulse.failed = True, None
            return None
        self.value = measured[self._metric]
        self.standing["evaluated"] = step
        better = self.standing.get("best") is None or self.value > self.standing["best"]
        if better:
            self.standing.update(best=self.value, best_step=step, worse=0)
        else:
            self.standing["worse"] = self.standing.get("worse", 0) + 1
        self._writer.write(step, {f"validation/{name}": value for name, value in measured.items()})
        self._progress.say(
            f"step {step}: validation {self._metric} {self.value:.4f}{' (best)' if better else ''}"
        )
        if self._patience and self.standing["worse"] >= self._patience:
            # Part of the checkpoint: started again, the run stays stopped.
            self.standing["stopped"] = (
                f"no better {self._metric} on validation in {self._patience} evaluations"
            )
            return str(self.standing["stopped"])
        return None


class WatchHook:
    """Tells somebody outside after each step what was measured there; a reason that comes back ends the run."""

    def __init__(self, watch: Watch, evaluation: EvaluateHook):
        self._watch = watch
        self._evaluation = evaluation

    def __call__(self, step: int, state: TrainState, metrics: Metrics, last: bool) -> str | None:
        """What the watch says; nothing is told of an end that it has asked for."""
        return self._watch(step, self._evaluation.value)


class CheckpointHook:
    """Saves every n steps, at each new best, and at the end; a full disk it waits out, and the run goes on."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        checkpoints: Checkpoints,
        evaluation: EvaluateHook,
        log: LogHook,
        pulse: Pulse | None = None,
        clock: StepClock | None = None,
        saved: Callable[[], None] = lambda: None,
    ):
        """`saved` is called when a checkpoint is on the disk."""
        self._pulse, self._clock, self._saved = pulse or Pulse(), clock or StepClock(0.0), saved
        self._every = config.train.checkpoint_every
        self._checkpoints = checkpoints
        self._evaluation = evaluation
        self._log = log
        self._measured: tuple[int, float | None] = (0, None)  # a step and what was measured there
        self._owed, self._why = False, ""  # whether the last save that ended failed, and why
        self._again_at: int | None = None

    def __call__(self, step: int, state: TrainState, metrics: Metrics, last: bool) -> str | None:
        """Saves state, progress and the metric in one commit.

        Raises:
          MachineError: it is the last step, and the disk is full and stays so.
        """
        self._look(step, last)
        standing = self._evaluation.standing
        if self._evaluation.value is not None:
            self._measured = (step, self._evaluation.value)
        best = self._evaluation.value is not None and standing.get("best_step") == step
        again = self._again_at is not None and step >= self._again_at
        if last or best or again or step % self._every == 0:
            check_finite(step, metrics)
            with self._busy():
                self._save(step, state, last)
        if last:
            with self._busy():
                self._finish(step, state)
        return None

    @contextmanager
    def _busy(self) -> Iterator[None]:
        with self._pulse.at("save"), self._clock.aside():
            yield

    def leave(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Has the state of this step on the disk, before the run stops here; raises as a call does."""
        check_finite(step, metrics)
        with self._busy():
            self._save(step, state, last=True)
            self._finish(step, state)

    @property
    def owes_metric(self) -> bool:
        """Whether measuring was interrupted: the run is not through, though all of its steps are."""
        return self._evaluation.interrupted

    def measured_later(self, step: int) -> None:
        """Has the checkpoint of a step that was left without its metric say what was measured now."""
        try:
            self._log.settle()
            self._checkpoints.amend(step, self._progress(step), self._evaluation.value)
        except (OSError, MachineError) as error:  # it is measured again when the run starts again from there
            self._checkpoints.say(f"step {step}: its metric could not be noted ({one_line(error)})")

    def _progress(self, step: int) -> dict[str, Any]:
        return {"step": step, "standing": self._evaluation.standing}

    def _save(self, step: int, state: TrainState, last: bool) -> None:
        """Starts to save; a value is claimed for the step alone at which it was measured."""
        self._again_at = None
        measured, value = self._measured
        self._checkpoints.save(
            state, step, self._progress(step), value if measured == step else None, before=self._log.settle
        )
        self._look(step, last)

    def _finish(self, step: int, state: TrainState) -> None:
        """Returns when the last state is on the disk."""
        self._checkpoints.wait()
        self._look(step, last=True)
        for seconds in PAUSES:
            if not self._owed:
                return
            time.sleep(seconds)
            self._save(step, state, last=True)
            self._checkpoints.wait()
            self._look(step, last=True)
        if self._owed:
            kept = self._checkpoints.latest()
            raise MachineError(
                f"{self._checkpoints.folder}: the last checkpoint, of step {step}, cannot be written: "
                f"{self._why}, and the same command goes on from {'the start' if kept is None else f'step {kept}'}"
            )

    def _look(self, step: int, last: bool) -> None:
        """Takes note of saves that have ended, and tells the user of a full disk and of its end."""
        for saved, full in self._checkpoints.poll():
            if full is not None:
                self._owed, self._why = True, f"{full}; mend the disk"
                if any(words in full for words in FULL):
                    self._why = "the disk is full; free some space"
                self._again_at = step + max(1, self._every // 10)
                kept = self._checkpoints.latest()
                self._checkpoints.say(
                    f"the checkpoint of step {saved} could not be written ({full}); "
                    f"{'there is none yet' if kept is None else f'the one of step {kept} is kept'}"
                    f"{'' if last else f'; trying again at step {self._again_at}'}"
                )
                continue
            self._saved()
            if self._owed:
                self._owed, self._again_at = False, None
                self._checkpoints.say(f"step {saved}: saved; checkpoints can be written again")
