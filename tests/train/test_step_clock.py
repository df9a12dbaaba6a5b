"""How long steps took, and how much of the time counted."""

import pytest

from dynrec_jax.train import step_clock
from dynrec_jax.train.step_clock import StepClock, percentiles


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1_000.0
        monkeypatch.setattr(step_clock.time, "time", lambda: self.now)
        monkeypatch.setattr(step_clock.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_goodput_is_the_share_of_steps_in_the_time_since_the_first_start(clock: Clock):
    steps = StepClock(
        first=900.0, spent=30.0
    )  # 100 s ago; steps of earlier starts, up to the checkpoint, took 30
    for seconds in (50.0, 2.0, 4.0):  # the first is compiled in
        steps.begins()
        clock.now += seconds
        with steps.aside():
            clock.now += 10.0  # an evaluation, say
        steps.ends()
    told = steps.told()
    assert told.pop("productive_seconds") == steps.spent == 36.0
    assert told == {
        "step_seconds_p50": 2.0,
        "step_seconds_p90": 4.0,
        "step_seconds_p99": 4.0,
        "goodput": 36 / 186,
    }
    assert steps.told() == {"goodput": 36 / 186, "productive_seconds": 36.0}, "no step since"


def test_percentiles_are_those_of_the_nearest_rank():
    seconds = [float(n) for n in range(100, 0, -1)]
    assert percentiles(seconds) == {
        "step_seconds_p50": 50.0,
        "step_seconds_p90": 90.0,
        "step_seconds_p99": 99.0,
    }
    assert set(percentiles([3.0]).values()) == {3.0}
