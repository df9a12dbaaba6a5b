"""Several processes of one run, started by `launch/local.sh`: killed, stopped, and gone on with by more of them.

Real processes, devices of their own, and signals at random moments. Whatever happens, a run ends as one that nobody
disturbed: bit for bit on the same mesh, with the same batches and to tolerance on another.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dynrec_jax.data.dataset import Dataset

from .. import commands
from . import runs

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
KILLS = 5
STOP_SECONDS = 10.0  # from SIGTERM until the state is on the disk
RUN: dict[str, Any] = {
    "model__dropout": 0.2,
    "data__windows": "random",
    "data__max_length": 6,
    "train__steps": STEPS,
    "train__batch_size": 16,
    "train__checkpoint_every": 5,
    "train__evaluate_every": 20,
    "logging__every": 1,
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(sys.prefix) / "dynrec.stamp").exists(),
        reason="this environment was not made by launch/environment.sh, which launch/local.sh uses",
    ),
]


class Local:
    """A run that `launch/local.sh` has begun; of `number` processes of 8 / `number` devices each, or of `devices`."""

    all: ClassVar[list["Local"]] = []

    def __init__(self, config: Path, workdir: Path, number: int, devices: int = 0):
        self.workdir, self.log = workdir, runs.log_of(workdir)
        environment = {
            **os.environ,
            "DYNREC_VENV": sys.prefix,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices or 8 // number),
            "DYNREC_RESTARTS": "6",  # a kill may come before the first new checkpoint
        }
        command = ["bash", str(ROOT / "launch" / "local.sh"), str(number), "train"]
        Local.all.append(self)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--config={config}", f"--workdir={workdir}", "--watchdog=60"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def children(self) -> list[int]:
        """Its processes that live now; those with a program of their own, and no pauses of the shell."""
        pid = self.process.pid
        found = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [each for each in found if b"train" in Path(f"/proc/{each}/cmdline").read_bytes()]

    def attempts(self) -> list[dict[str, Any]]:
        path = self.workdir / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self) -> int:
        """The last that is in the log."""
        there = (self.workdir / "metrics.jsonl").exists()
        return max((line["step"] for line in (runs.lines(self.workdir) if there else [])), default=0)

    def wait_for_attempt(self, number: int) -> None:
        self.wait_until(lambda: len(self.attempts()) >= number)

    def wait_until(self, done: Any, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def finish(self, seconds: float = 600.0) -> int:
        return self.process.wait(seconds)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    """Kills what a test that failed leaves behind."""
    yield
    for local in Local.all:
        if local.process.poll() is None:
            os.killpg(local.process.pid, signal.SIGKILL)
            local.process.wait()
    Local.all.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_dataset: Dataset) -> Path:
    return commands.experiment(folder / "experiment.py", tiny_dataset.path, **RUN)


@pytest.fixture(scope="module")
def whole(folder: Path, config: Path) -> Callable[[int], Path]:
    """Runs that nobody disturbed, by the number of processes."""
    made: dict[int, Path] = {}

    def run(number: int) -> Path:
        if number not in made:
            local = Local(config, folder / f"whole{number}", number)
            assert local.finish() == 0, local.said()
            made[number] = local.workdir
        return made[number]

    return run


def assert_same_run(workdir: Path, whole: Path, told: str) -> None:
    def key(line: dict[str, Any]) -> tuple[int, bool]:
        return line["step"], "loss" in line

    assert sorted(runs.lines(workdir), key=key) == sorted(runs.lines(whole), key=key), told
    runs.assert_same_arrays(*(each / "checkpoints" / str(STEPS) for each in (workdir, whole)), told)


@pytest.mark.parametrize("number", [2, 4])
def test_killed_five_times_a_run_ends_as_if_nothing_had_been(
    folder: Path, config: Path, whole: Any, number: int
):
    expected, draw = whole(number), random.Random(number)
    local = Local(config, folder / f"killed{number}", number)
    told = []
    for kill in range(1, KILLS + 1):
        local.wait_for_attempt(kill)
        if kill % 2:  # while it starts or compiles; or else behind a checkpoint of this start
            time.sleep(draw.uniform(0, 4))
        else:
            start = local.attempts()[-1]["step"]
            local.wait_until(lambda start=start: max(runs.saved(local.workdir), default=0) > start)
            time.sleep(draw.uniform(0, 1))
        victims = local.children()
        if not victims:
            break
        victim = draw.choice(victims)
        os.kill(victim, signal.SIGKILL)
        told.append(f"kill {kill}: process {victims.index(victim)} of {len(victims)}")
    assert local.finish() == 0, local.said()
    sys.stdout.write(f"seed {number}; {told}; went on from {[each['step'] for each in local.attempts()]}\n")
    assert len(told) == KILLS
    assert len(local.attempts()) == KILLS + 1
    assert len({each["step"] for each in local.attempts()}) > KILLS // 2
    assert_same_run(local.workdir, expected, "\n".join(told))


def test_told_to_stop_a_run_has_its_last_step_on_the_disk_and_trains_none_twice(
    folder: Path, config: Path, whole: Any
):
    expected, draw, seconds, stops = whole(2), random.Random(7), [], []
    workdir = folder / "stopped"
    for stop in range(3):
        local = Local(config, workdir, 2)
        local.wait_for_attempt(stop + 1)
        first = local.attempts()[-1]["step"]
        local.wait_until(lambda first=first, local=local: local.step() > first + 1)
        time.sleep(draw.uniform(0, 1))
        began = time.monotonic()
        # One of the processes alone, or the script, as a cluster would.
        if stop == 0:
            os.kill(local.children()[1], signal.SIGTERM)
            local.wait_for_attempt(2)  # the script goes on by itself
            local.process.terminate()
        else:
            local.process.terminate()
        status = local.finish()
        seconds.append(time.monotonic() - began)
        assert status == 75, local.said()
        stops.append(max(runs.saved(workdir)))
        assert max(line["step"] for line in runs.lines(workdir)) == stops[-1]
    local = Local(config, workdir, 2)
    assert local.finish() == 0, local.said()
    starts = [each["step"] for each in local.attempts()]
    sys.stdout.write(f"stopped within {max(seconds[1:]):.1f} s; starts at {starts}\n")
    assert max(seconds[1:]) < STOP_SECONDS
    assert starts[-1] == stops[-1]
    assert_same_run(workdir, expected, local.said())


def test_more_processes_go_on_with_the_same_batches(folder: Path, config: Path, whole: Any):
    expected = whole(2)
    local = Local(config, folder / "grown", 2)
    local.wait_until(lambda: bool(runs.saved(local.workdir)))
    local.process.terminate()
    assert local.finish() == 75, local.said()
    stopped = max(runs.saved(local.workdir))
    local = Local(config, local.workdir, 4, devices=1)  # another mesh as well: 4 devices in place of 8
    assert local.finish() == 0, local.said()
    assert [(each["step"], each["processes"]) for each in local.attempts()] == [(0, 2), (stopped, 4)]
    lines = {line["step"]: line for line in runs.lines(local.workdir) if "loss" in line}
    others = {line["step"]: line for line in runs.lines(expected) if "loss" in line}
    assert set(lines) == set(range(1, STEPS + 1))
    for step, line in lines.items():
        assert line["targets"] == others[step]["targets"], step
        np.testing.assert_allclose(line["loss"], others[step]["loss"], rtol=1e-4, err_msg=str(step))
