"""Step after step, with what is to be done before and after each, to the end or to where a run is to stop."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dynrec_jax.errors import Preempted
from dynrec_jax.parallel.pulse import Pulse
from dynrec_jax.train.hooks import CheckpointHook, Hook, Metrics
from dynrec_jax.train.progress import Progress
from dynrec_jax.train.state import TrainState
from dynrec_jax.train.step import Inputs
from dynrec_jax.train.step_clock import StepClock

StepFunction = Callable[[TrainState, Inputs], tuple[TrainState, Metrics]]
StopHere = Callable[[], bool]


def never() -> bool:
    """No run has to stop."""
    return False


class Pace(NamedTuple):
    """What goes with the steps of a run.

    Attributes:
      pulse: says what is done.
      clock: measures how long it takes.
      stop_here: is asked after each step whether the run stops there.
      saving: has its state on the disk then.
    """

    pulse: Pulse
    clock: StepClock
    stop_here: StopHere
    saving: CheckpointHook


def run(
    state: TrainState,
    step_fn: StepFunction,
    stream: Iterator[Inputs],
    before: Callable[[int, TrainState], TrainState],
    hooks: Sequence[Hook],
    steps: range,
    progress: Progress,
    pace: Pace,
) -> int:
    """Runs the steps and, `before` and after each, what is to be done; returns how many steps the run has done.

    Raises:
      Preempted: it was to stop, and what it had done is on the disk.
    """
    pulse, clock = pace.pulse, pace.clock
    for number in steps:
        clock.begins()
        with pulse.at("data"):
            inputs = next(stream)
        done = number + 1
        last = done == steps.stop
        with pulse.at("step"):
            state, metrics = step_fn(before(number, state), inputs)
            reasons = [hook(done, state, metrics, last) for hook in hooks]
        pulse.step = done
        clock.ends()
        reason = next((reason for reason in reasons if reason), None)
        if reason and not last:
            progress.say(f"stopped after step {done}: {reason}")
            for hook in hooks:
                hook(done, state, metrics, True)
            return done
        if pace.stop_here() and (not last or pace.saving.owes_metric):
            pace.saving.leave(done, state, metrics)
            raise stopped(done)
    return steps.stop


def stopped(step: int) -> Preempted:
    """What a run ends with that was told to stop after a step."""
    return Preempted(
        f"stopped by SIGTERM; step {step} is on the disk, and the same command goes on from there"
    )
