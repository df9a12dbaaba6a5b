"""Killed at any moment and started again with the same command, a run ends as if nothing had been: bit for bit.

Real processes and SIGKILL: at random moments of a run, and at random moments inside a save. A killed run is started
again until it is through, then the next one begins. All of a run's numbers must equal those of a run that nobody
killed: each line of metrics, parameters and optimizer state.
"""

import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynrec_jax.data.dataset import Dataset
from dynrec_jax.files import is_temporary

from .. import commands
from . import runs

STEPS = 8
SAVES = 2  # a kill inside a save waits for one of the first few after the start
RUN: dict[str, Any] = {
    "loss__sampler": "popularity",
    "model__dropout": 0.2,
    "data__windows": "random",
    "data__max_length": 6,
    "evaluation__batch_size": 64,
    "evaluation__ks": (1, 5, 10, 20),
    "train__steps": STEPS,
    "train__checkpoint_every": 2,
    "train__evaluate_every": 4,
    "logging__every": 1,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runs.Server]:
    with runs.serving(tmp_path_factory.mktemp("compiled")) as server:
        yield server


class Kill(NamedTuple):
    """When to kill: `delay` seconds after the start, or after that many saves have begun, where `saves` is not 0."""

    saves: int
    delay: float


class Outcome(NamedTuple):
    """What a kill met.

    Attributes:
      run: number of the run.
      kill: the moment.
      saved: checkpoints that were whole when the process was started.
      status: exit status; 0 where the run was through before the kill came.
      inside: whether it surely met a save: one had begun, and was not whole.
    """

    run: int
    kill: Kill
    saved: list[int]
    status: int
    inside: bool


def kills(seed: int, length: float) -> Iterator[Kill]:
    """Moments in runs of `length` seconds, every other one inside a save or soon after it."""
    draw = random.Random(seed)
    while True:
        yield Kill(0, draw.uniform(0, length))
        yield Kill(draw.randint(1, SAVES), draw.uniform(0, length / 20))


def unfinished(workdir: Path) -> set[str]:
    """Checkpoints that are being written, or were when the run was killed."""
    return {path.name for path in workdir.glob("checkpoints/*tmp*")}


def meet(command: runs.Command, workdir: Path, before: set[str], kill: Kill) -> int:
    """Waits for the moment and kills; returns the exit status, also where the run is through before.

    `before` names the saves that an earlier process of this run left unfinished.
    """
    begun, now = 0, before
    while begun < kill.saves:
        if (status := command.status()) is not None:
            return status
        seen, now = now, unfinished(workdir)
        begun += len(now - seen)
        time.sleep(0.001)
    time.sleep(kill.delay)
    return command.kill()


def endure(
    server: runs.Server, config: Path, folder: Path, moments: Iterator[Kill], number: int
) -> list[Outcome]:
    """Run after run in `folder`, each started again after a kill, until there were `number` kills; all end well."""
    outcomes: list[Outcome] = []
    run = killed = 0
    while killed < number:
        workdir, kill = folder / str(run), next(moments)
        saved, before = runs.saved(workdir), unfinished(workdir)
        command = server.train(config, workdir)
        status = meet(command, workdir, before, kill)
        inside = kill.saves > 0 and bool(unfinished(workdir))
        outcomes.append(Outcome(run, kill, saved, status, inside))
        assert status in (0, -signal.SIGKILL), f"{outcomes}\n{command.said()}"
        killed += status != 0
        run += status == 0
    if outcomes[-1].status:
        server.train(config, folder / str(run)).finish()
    return outcomes


def assert_same_run(workdir: Path, whole: Path, told: str) -> None:
    """Every number of two finished runs is the same, and the first left nothing behind."""
    assert runs.lines(workdir) == runs.lines(whole), told
    assert set(runs.saved(whole)) <= set(runs.saved(workdir)), told
    for step in runs.saved(whole):
        runs.assert_same_arrays(workdir / "checkpoints" / str(step), whole / "checkpoints" / str(step), told)
    assert not unfinished(workdir), told
    assert not [path for path in workdir.rglob("*") if is_temporary(path)], told
    assert not (workdir / "damaged").exists(), f"{told}\na kill must not look like damage"
    said = runs.log_of(workdir).read_text(encoding="utf-8")
    assert "Traceback" not in said, f"{told}\n{said}"


@pytest.mark.parametrize(
    ("loss", "number"),
    [
        ("full", 4),
        pytest.param("full", 100, marks=pytest.mark.slow),
        pytest.param("sampled", 100, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_that_is_started_again_ends_as_if_nothing_had_been(
    server: runs.Server, tiny_dataset: Dataset, tmp_path: Path, loss: str, number: int
):
    config = commands.experiment(tmp_path / "experiment.py", tiny_dataset.path, loss__kind=loss, **RUN)
    whole, again, folder = tmp_path / "whole", tmp_path / "again", tmp_path / "killed"
    server.train(config, whole).finish()
    losses = [line["loss"] for line in runs.lines(whole) if "loss" in line]
    assert len(set(losses)) == STEPS
    began = time.monotonic()
    server.train(config, again).finish()
    length = time.monotonic() - began  # of a run whose functions are compiled already
    assert_same_run(again, whole, "a second run, nothing killed")

    folder.mkdir()
    outcomes = endure(server, config, folder, kills(number, length), number)
    told = "\n".join(map(str, [f"{number} kills, seed {number}, runs of {length:.1f} s", *outcomes]))
    sys.stdout.write(told)  # with the seed: `pytest -rA` shows it
    for workdir in sorted(path for path in folder.iterdir() if path.is_dir()):
        assert_same_run(workdir, whole, f"{workdir.name}\n{told}")
    # Kills that came in time for nothing would show nothing.
    assert sum(each.inside for each in outcomes) >= number // 5, told
    assert sum(bool(each.saved) for each in outcomes) >= number // 5, told
