"""Starts of a run, who of them may write, and how much of the time counted."""

import json
from pathlib import Path

import pytest

from dynrec_jax.errors import HeldRunError
from dynrec_jax.train import attempts
from dynrec_jax.train.attempts import StepClock, begin, check_current, percentiles


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1_000.0
        monkeypatch.setattr(attempts.time, "time", lambda: self.now)
        monkeypatch.setattr(attempts.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_newest_start_alone_may_write(tmp_path: Path):
    one = begin(tmp_path, 0, 2)
    check_current(tmp_path, one)
    two = begin(tmp_path, 40, 4)
    check_current(tmp_path, two)
    with pytest.raises(HeldRunError, match=f"{tmp_path}: this run was started again by process [0-9]+ of"):
        check_current(tmp_path, one)
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"], line["processes"]) for line in lines] == [(0, 0, 2), (1, 40, 4)]
    assert (two.number, two.first) == (1, one.first)


@pytest.mark.parametrize("torn", [b'{"attempt": 1, "beg', b"\n", b"[]\n", b"\xff\xfe"])
def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path, torn: bytes):
    one = begin(tmp_path, 0, 1)
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(torn)
    check_current(tmp_path, one)
    two = begin(tmp_path, 3, 1)
    check_current(tmp_path, two)
    assert (two.number, two.first) == (1, one.first)


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
