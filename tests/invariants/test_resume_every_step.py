"""A run goes on from any of its steps as if it had never stopped: in a new process, bit for bit."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.pipeline import BatchSource, batches, make_splits

from .. import commands, tiny
from . import runs

STEPS = 50
RUN: dict[str, Any] = {
    "loss__kind": "sampled",  # the optimizer of rows has a state of its own, and negatives are drawn anew each step
    "loss__sampler": "popularity",
    "model__dropout": 0.2,
    "data__windows": "random",
    "data__max_length": 6,
    # Both cuts behind the last event: nobody is asked for anything, so no time is spent on evaluation.
    "evaluation__split": "global_time",
    "evaluation__holdout": 0.0,
    "train__evaluate_every": 0,
    "train__steps": STEPS,
    "train__checkpoint_every": 1,
    "train__keep_last": STEPS,
    "train__average": 0.9,  # beside the weights that go on
    "logging__every": 1,
}


def as_of(step: int, whole: Path, at: Path) -> None:
    """A run folder as it was after a step, but for the log, which is whole; its checkpoints are hard links."""
    at.mkdir()
    for path in whole.iterdir():
        if path.is_file():
            shutil.copy(path, at)
    for number in range(1, step + 1):
        place = Path("checkpoints", str(number))
        shutil.copytree(whole / place, at / place, copy_function=os.link)


def written(workdir: Path, until: int) -> list[str]:
    """Lines of metrics up to a step as they stand in the file, with what the clock said."""
    return (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:until]


@pytest.mark.parametrize(
    "steps", [(30,), pytest.param(range(1, STEPS), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_run_goes_on_from_any_step_in_a_new_process(
    timed_dataset: Dataset, tmp_path: Path, steps: Sequence[int]
):
    config = commands.experiment(tmp_path / "experiment.py", timed_dataset.path, **RUN)
    whole = tmp_path / "whole"
    with runs.serving(tmp_path / "compiled") as server:
        server.train(config, whole).finish()
        assert runs.saved(whole) == list(range(1, STEPS + 1))
        losses = [line["loss"] for line in runs.lines(whole)]
        assert len(set(losses)) == STEPS
        for step in steps:
            resumed = tmp_path / f"from{step}"
            as_of(step, whole, resumed)
            server.train(config, resumed, train__checkpoint_every=1000).finish()
            told = f"from step {step}"
            # Lines that bear the whole run's clock were not computed again: it did start from there.
            assert written(resumed, step) == written(whole, step), told
            assert written(resumed, step + 1) != written(whole, step + 1), told
            assert runs.lines(resumed) == runs.lines(whole), told
            assert runs.saved(resumed) == [*range(1, step + 1), STEPS], told
            last = Path("checkpoints", str(STEPS))
            runs.assert_same_arrays(resumed / last, whole / last, told)
            shutil.rmtree(resumed)


@pytest.mark.parametrize("windows", ["last", "random"])
@pytest.mark.parametrize("batch_size", [2, 8], ids=["fewer than shards", "more than shards"])
def test_the_batches_from_any_step_on_are_the_rest_of_the_whole_stream(
    histories: Histories, windows: str, batch_size: int
):
    config = tiny.config(
        data__windows=windows, data__max_length=5, train__batch_size=batch_size, train__steps=STEPS
    )

    def stream(start: int) -> list[Any]:
        source = BatchSource(histories, make_splits(histories, config), config)
        return list(batches(source, start, prefetch=2))

    whole = stream(0)
    assert len({batch.items.tobytes() for batch in whole}) > STEPS // 2
    for start in range(1, STEPS):
        rest = stream(start)
        assert len(rest) == STEPS - start
        for number, (one, other) in enumerate(zip(whole[start:], rest, strict=True), start):
            for name, array, same in zip(one._fields, one, other, strict=True):
                np.testing.assert_array_equal(array, same, err_msg=f"from {start}, step {number}: {name}")
