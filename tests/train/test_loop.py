"""The loop: it runs to the end, goes on after a crash as if nothing had been, and stops where it should."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.errors import HeldRunError, Preempted
from dynrec_jax.models.model import make_bstm
from dynrec_jax.parallel.mesh import Feed
from dynrec_jax.train import attempts, loop
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.hooks import CLOCK, NonFiniteLoss
from dynrec_jax.train.manifest import Manifest
from dynrec_jax.train.verified import Reader

from .. import tiny

# Windows and dropout are drawn anew each step: what a resumed run gets wrong would show.
RUN: dict[str, Any] = {
    "model__dropout": 0.2,
    "data__windows": "random",
    "data__max_length": 6,
    "train__checkpoint_every": 3,
    "train__evaluate_every": 6,
    "logging__every": 1,
    "evaluation__batch_size": 64,
}
Step = loop.StepFunction
setup = loop.setup


@functools.cache
def compiled() -> tuple[Any, Any, Step]:
    """What `setup` makes; the runs of this file share it, and with it one compilation."""
    made = setup(tiny.config(**RUN), make_bstm(tiny.config(**RUN), 25), tiny.mesh(1, 1, 1))
    return jax.tree.map(np.array, made.fresh()), made.template, made.step


@pytest.fixture
def train(histories: Histories, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`loop.train` in a folder; `step` may wrap the compiled step, changes are to `RUN`."""

    def run(
        folder: Path,
        step: Callable[[Step], Step] = lambda step: step,
        stop_here: Callable[[], bool] = loop.never,
        **changes: Any,
    ) -> dict[str, Any]:
        host, template, real = compiled()

        def fresh(given: Any) -> Any:
            return jax.tree.map(lambda x, like: jax.device_put(jnp.array(x), like.sharding), host, template)

        monkeypatch.setattr(loop, "setup", lambda *_: loop.Setup(template, fresh, step(real)))
        config, mesh = tiny.config(**{**RUN, **changes}), tiny.mesh(1, 1, 1)
        return loop.train(config, histories, folder, mesh, stop_here=stop_here)

    return run


def logged(folder: Path) -> list[dict[str, float]]:
    """All lines of metrics, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def final_state(folder: Path) -> Any:
    checkpoints = Checkpoints(folder / "checkpoints")
    _, template, _ = compiled()
    state, progress = checkpoints.restore(template, 12)
    checkpoints.close()
    return jax.tree.map(np.asarray, state), progress


def kill_at(number: int) -> Callable[[Step], Step]:
    """The power fails in the call after `number` steps."""

    def wrap(step: Step) -> Step:
        calls = iter(range(number + 1))

        def run(*arguments: Any) -> Any:
            if next(calls) == number:
                raise KeyboardInterrupt
            return step(*arguments)

        return run

    return wrap


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_killed_and_started_again_a_run_is_bit_identical_to_one_that_was_not(train, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    standing = train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(broken, kill_at(7))
    assert saved(broken)[-1] == 6, "killed in step 8, and every third step is saved"
    assert train(broken) == standing

    losses = [line["loss"] for line in logged(whole) if "loss" in line]
    assert len(losses) == 12
    assert len(set(losses)) == 12
    assert np.mean(losses[-4:]) < np.mean(losses[:4]), "it learns"
    assert logged(broken) == logged(whole)
    (one, progress), (other, other_progress) = final_state(whole), final_state(broken)
    assert progress == other_progress
    assert int(one.step) == 12
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(x, y), path

    # Started once more, a finished run does nothing.
    before = (whole / "metrics.jsonl").read_text()
    assert train(whole, kill_at(0)) == standing
    assert (whole / "metrics.jsonl").read_text() == before


def values_of(folder: Path) -> dict[int, float | None]:
    """What the checkpoints say was measured of them."""
    found = Reader(folder / "checkpoints").scan().items()
    return {step: manifest.value for step, manifest in found if isinstance(manifest, Manifest)}


class AfterAsked:
    """Has a run stop when it asks for the n-th time, and from then on."""

    def __init__(self, number: int):
        self.asked, self._number = 0, number

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked >= self._number


def test_stopped_anywhere_and_started_again_a_run_trains_no_step_twice(train, tmp_path: Path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    never = AfterAsked(1_000)
    standing = train(whole, stop_here=never)
    assert never.asked > 12, "after each step, and between the batches of an evaluation"

    trained: list[int] = []

    def counted(step: Step) -> Step:
        def run(*arguments: Any) -> Any:
            trained.append(1)
            return step(*arguments)

        return run

    left, told, unmeasured = [], [], False
    for _ in range(40):
        try:
            # The second time that it asks: an evaluation that was interrupted comes through at the next start.
            assert train(stopped, counted, AfterAsked(2)) == standing
            break
        except Preempted as error:
            left.append(saved(stopped)[-1])
            told.append(str(error))
            unmeasured |= left[-1] == 6 and values_of(stopped)[6] is None
    assert len(trained) == 12
    assert all(f"step {step} is on the disk" in line for step, line in zip(left, told, strict=True))
    assert unmeasured, "the evaluation of step 6 was interrupted"
    assert sorted(map(json.dumps, logged(stopped))) == sorted(map(json.dumps, logged(whole)))
    assert (stopped / "attempts.jsonl").read_text().count("\n") == len(left) + 1
    (one, progress), (other, other_progress) = final_state(whole), final_state(stopped)
    assert progress == other_progress
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(x, y), path
    values, others = values_of(whole), values_of(stopped)
    assert values[6] == others[6] == standing["best"]
    assert values[12] == others[12]


def test_who_was_taken_for_dead_writes_no_checkpoint(train, tmp_path: Path):
    def elsewhere(step: Step) -> Step:
        def run(*arguments: Any) -> Any:
            attempts.begin(tmp_path, 0, 1)
            return step(*arguments)

        return run

    with pytest.raises(HeldRunError, match="was started again by process"):
        train(tmp_path, elsewhere)
    assert saved(tmp_path) == []


class Scripted:
    """An evaluator whose metric is given."""

    def __init__(self, *values: float):
        self._values = iter(values)

    def metrics(self, params: Any, tables: Any) -> dict[str, float]:
        return {"ndcg@10": next(self._values)}

    def before_batch(self, work: Any) -> None:
        """It has no batches."""


def test_the_run_stops_when_validation_gets_no_better_and_stays_stopped(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"train__evaluate_every": 2, "train__patience": 2, "train__keep_last": 1}
    monkeypatch.setattr(loop, "_evaluator", lambda *_: Scripted(0.1, 0.3, 0.3, 0.2))
    standing = train(tmp_path, **changes)
    assert standing["step"] == 8
    assert (standing["best"], standing["best_step"]) == (0.3, 4)
    assert saved(tmp_path) == [4, 8], "the best, and where it stopped"
    validated = {line["step"]: line["validation/ndcg@10"] for line in logged(tmp_path) if "loss" not in line}
    assert validated == {2: 0.1, 4: 0.3, 6: 0.3, 8: 0.2}
    assert max(line["step"] for line in logged(tmp_path)) == 8

    monkeypatch.setattr(loop, "_evaluator", lambda *_: Scripted())
    assert train(tmp_path, kill_at(0), **changes)["step"] == 8


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_non_finite_loss_ends_the_run_and_names_the_step(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(loop, "_evaluator", lambda *_: None)

    def spoil(step: Step) -> Step:
        calls = iter(range(1, 13))

        def run(*arguments: Any) -> Any:
            state, metrics = step(*arguments)
            return state, {**metrics, name: jnp.float32(np.nan)} if next(calls) == 6 else metrics

        return run

    with pytest.raises(NonFiniteLoss, match=f"step 6: {name} is nan"):
        train(tmp_path, spoil)
    assert saved(tmp_path) == [3], "a state that gave no number is never kept"
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4, 5]


def test_logging_every_few_steps_still_logs_the_last(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "_evaluator", lambda *_: Scripted(0.5))
    standing = train(tmp_path, logging__every=5, train__evaluate_every=0)
    assert [line["step"] for line in logged(tmp_path) if "loss" in line] == [5, 10, 12]
    assert standing == {"step": 12, "best": 0.5, "best_step": 12, "evaluated": 12, "worse": 0}


def test_the_popularity_sampler_gets_the_running_training_counts(histories: Histories):
    config = tiny.config(loss__kind="sampled", loss__sampler="popularity")
    splits = loop.make_splits(histories, config)
    running_R = np.asarray(loop.training_counts(config, histories, splits, tiny.mesh(1, 1, 1), Feed()))
    counts = np.zeros(26, int)
    for user, end in enumerate(splits.train_end):
        for item in histories.windows(np.array([user]), np.array([end]), 64).items[0]:
            counts[item] += item > 0
    counts[1:] = np.maximum(counts[1:], 1)  # an item without a training event can be drawn too
    np.testing.assert_array_equal(np.diff(running_R[:26], prepend=0), counts)
    assert (running_R[26:] == counts.sum()).all()
    assert loop.training_counts(tiny.config(), histories, splits, tiny.mesh(1, 1, 1), Feed()) is None


def test_a_signal_has_some_steps_recorded(train, tmp_path: Path):
    def asking(step: Step) -> Step:
        calls = iter(range(100))

        def run(*arguments: Any) -> Any:
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step(*arguments)

        return run

    before = signal.getsignal(signal.SIGUSR1)
    train(tmp_path, asking, train__evaluate_every=0)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step5-process0"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
