"""Hooks: what a checkpoint holds is in the log before it, and a full disk is waited out."""

import contextlib
import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.errors import MachineError
from dynrec_jax.train import hooks, metrics_writer
from dynrec_jax.train.checkpoint import Outcome
from dynrec_jax.train.flops import Cost, Utilisation
from dynrec_jax.train.hooks import CheckpointHook, EvaluateHook, LogHook
from dynrec_jax.train.metrics_writer import MetricsWriter
from dynrec_jax.train.progress import Progress
from dynrec_jax.train.state import TrainState

from .. import tiny

FULL = "No space left on device"


class Recorder:
    """Stands in for checkpoints: a save of a step in `refused` ends with a full disk, `late` steps after it began."""

    folder = Path("checkpoints")

    def __init__(self, log: Path, refused: Sequence[int] = (), late: int = 0):
        self.log, self.refused, self.late = log, refused, late
        self.began: list[tuple[int, float | None]] = []
        self.held: list[int] = []  # lines of the log when a save began
        self.saved: list[int] = []
        self.said: list[str] = []
        self.ending: list[Outcome] = []
        self.polls = 0

    def save(self, _: Any, step: int, __: Any, value: float | None, before: Callable[[], None]) -> bool:
        if step in self.saved:
            return False
        try:
            before()
        except OSError:
            self.ending.append(Outcome(step, FULL))
            return False
        self.began.append((step, value))
        self.held.append(self.log.read_text().count('"loss"'))
        self.polls = 0
        self.ending.append(Outcome(step, FULL if step in self.refused else None))
        return True

    def poll(self) -> list[Outcome]:
        if self.ending and self.polls < self.late:
            self.polls += 1
            return []
        return self.wait()

    def wait(self) -> list[Outcome]:
        ended, self.ending = self.ending, []
        self.saved += [step for step, full in ended if full is None]
        self.polls = 0
        return ended

    def latest(self) -> int | None:
        return max(self.saved, default=None)

    def say(self, text: str) -> None:
        self.said.append(text)


class Scripted:
    """An evaluator that finds the same value each time."""

    def metrics(self, **_: Any) -> dict[str, float]:
        return {"ndcg@10": 0.5}

    def before_batch(self, work: Any) -> None:
        """It has no batches."""


def run(folder: Path, steps: int, evaluator: Any = None, recorder: Any = None, **changes: Any) -> Recorder:
    """`steps` steps of a run without a model, all hooks called as the loop calls them."""
    config = tiny.config(logging__every=1, **{"train__evaluate_every": 0, **changes})
    writer = MetricsWriter(folder, 0)
    progress = Progress("test", steps)
    log = LogHook(config, writer, progress, 0)
    recorder = recorder or Recorder(folder / "metrics.jsonl")
    evaluation = EvaluateHook(config, evaluator, writer, {}, progress)
    save = CheckpointHook(config, recorder, evaluation, log)
    state = TrainState(None, None, None, None, None)  # nobody looks into it
    with contextlib.closing(writer):
        for step in range(1, steps + 1):
            metrics = {"loss": 1.0, "gradient_norm": 1.0, "targets": 8.0, "attended": 20.0}
            for hook in (log, evaluation, save):
                hook(step, state, metrics, step == steps)
    return recorder


@pytest.mark.parametrize("known", [True, False])
def test_a_line_of_the_log_has_the_share_of_the_peak_since_the_line_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
):
    clock = iter([100.0, 110.0, 114.0])  # at the start, and at the lines of steps 2 and 3
    monkeypatch.setattr(hooks, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    told: list[Any] = []
    progress = types.SimpleNamespace(update=lambda *values: told.append(values))
    counts = Utilisation(Cost(target=3.0, pair=5.0), peak=20.0) if known else None
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        log = LogHook(tiny.config(logging__every=2), writer, progress, 0, counts)  # type: ignore[arg-type]
        state = TrainState(None, None, None, None, None)
        for step, (targets, attended) in enumerate([(10.0, 20.0), (5.0, 7.0), (4.0, 6.0)], 1):
            metrics = {"loss": 1.0, "gradient_norm": 1.0, "targets": targets, "attended": attended}
            log(step, state, metrics, last=step == 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert [line["histories_per_second"] for line in lines] == [2 * 8 / 10, 8 / 4]
    shares = [(3 * 15 + 5 * 27) / 10 / 20, (3 * 4 + 5 * 6) / 4 / 20] if known else [None, None]
    assert [line.get("utilisation") for line in lines] == shares
    assert told == [(2, 1.0, 1.6, shares[0]), (3, 1.0, 2.0, shares[1])]
    assert all(("utilisation" in line) == known and "attended" not in line for line in lines)
    assert set(lines[0]) - set(hooks.CLOCK) == {"step", "loss", "gradient_norm", "targets"}


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that take no time; the seconds that they would have taken."""
    paused: list[float] = []
    monkeypatch.setattr(hooks.time, "sleep", paused.append)
    return paused


def test_the_step_of_a_checkpoint_is_logged_before_it_is_saved(tmp_path: Path):
    """A run killed right after a save goes on behind that step, and would never log it."""
    recorder = run(tmp_path, 4, train__checkpoint_every=2)
    assert recorder.held == [2, 4]
    assert recorder.log.read_text().count('"loss"') == 4  # each step once


def test_after_a_full_disk_a_later_step_is_saved_soon(tmp_path: Path):
    recorder = Recorder(tmp_path / "metrics.jsonl", refused=(20, 22), late=0)
    run(tmp_path, 40, recorder=recorder, train__checkpoint_every=20)
    assert [step for step, _ in recorder.began] == [20, 22, 24, 40]
    assert recorder.said == [
        f"the checkpoint of step 20 could not be written ({FULL}); there is none yet; trying again at step 22",
        f"the checkpoint of step 22 could not be written ({FULL}); there is none yet; trying again at step 24",
        "step 24: saved; checkpoints can be written again",
    ]


def test_a_save_that_fails_in_the_background_is_noticed_at_a_later_step(tmp_path: Path):
    recorder = Recorder(tmp_path / "metrics.jsonl", refused=(20,), late=3)
    recorder.saved = [10]
    run(tmp_path, 39, recorder=recorder, train__checkpoint_every=20)
    assert [step for step, _ in recorder.began] == [20, 25, 39], (
        "noticed at 23, and every tenth of 20 it is tried"
    )
    assert "the one of step 10 is kept; trying again at step 25" in recorder.said[0]
    assert recorder.said[1:] == ["step 25: saved; checkpoints can be written again"]


def test_a_value_is_claimed_for_its_own_step_alone(tmp_path: Path, no_pause: list[float]):
    """The best, at step 5, is refused twice; the checkpoint that takes its place was not measured."""
    recorder = Recorder(tmp_path / "metrics.jsonl", refused=(5,))
    changes = {"train__checkpoint_every": 20, "train__evaluate_every": 5, "train__patience": 0}
    run(tmp_path, 9, Scripted(), recorder, **changes)
    assert recorder.began == [(5, 0.5), (7, None), (9, 0.5)]

    recorder = Recorder(tmp_path / "metrics.jsonl")
    recorder.refused = refused = [9]
    refused_once = recorder.wait

    def wait() -> list[Outcome]:
        ended = refused_once()
        if no_pause:
            refused.clear()
        return ended

    recorder.wait = wait  # type: ignore[method-assign]
    run(tmp_path, 9, Scripted(), recorder, **{**changes, "train__evaluate_every": 0})
    assert recorder.began[0] == (9, 0.5)
    assert set(recorder.began) == {(9, 0.5)}, "tried again at the same step, the value is that step's"
    assert recorder.saved == [9]


def test_the_last_checkpoint_is_tried_for_a_while_and_then_the_run_fails(
    tmp_path: Path, no_pause: list[float]
):
    recorder = Recorder(tmp_path / "metrics.jsonl", refused=(9,))
    recorder.saved = [6]
    with pytest.raises(MachineError, match=r"step 9, cannot be written: .*goes on from step 6") as caught:
        run(tmp_path, 9, recorder=recorder, train__checkpoint_every=100)
    assert "\n" not in str(caught.value)
    assert [step for step, _ in recorder.began] == [9] * (1 + len(hooks.PAUSES))
    assert no_pause == list(hooks.PAUSES)
    assert recorder.said[0].endswith("the one of step 6 is kept")


class Disk:
    """A file that takes `room` bytes, as a full disk does: in part, and then not at all."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(28, FULL)
        taken = self.file.write(content[: self.room])
        self.room -= taken
        return int(taken)

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def test_a_log_that_meets_a_full_disk_is_whole_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The lines wait in memory, and no checkpoint is written that the log does not reach up to."""
    run(tmp_path, 8, train__checkpoint_every=2)
    whole = without_clock(tmp_path)
    disks: list[Disk] = []

    def small(path: Path, mode: str, buffering: int) -> Disk:
        disks.append(Disk(open(path, mode, buffering=buffering), 150))  # noqa: SIM115
        return disks[0]

    monkeypatch.setattr(metrics_writer, "open", small, raising=False)
    folder = tmp_path / "other"
    folder.mkdir()
    recorder = Recorder(folder / "metrics.jsonl")
    say = recorder.say

    def make_room(text: str) -> None:
        say(text)
        if len(recorder.said) == 3:
            disks[0].room = 10_000

    recorder.say = make_room  # type: ignore[method-assign]
    run(folder, 8, recorder=recorder, train__checkpoint_every=2)
    assert [text.split(";")[0] for text in recorder.said] == [
        *(f"the checkpoint of step {step} could not be written ({FULL})" for step in (2, 3, 4)),
        "step 5: saved",
    ]
    assert [step for step, _ in recorder.began] == [5, 6, 8]
    assert recorder.held == [5, 6, 8]
    assert without_clock(folder) == whole


def without_clock(folder: Path) -> list[str]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line.split('"histories_per_second"')[0] for line in lines]
