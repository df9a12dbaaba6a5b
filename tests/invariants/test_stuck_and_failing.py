"""One process of a run is stopped, gets stuck or fails, wherever that is: all end in time, and it is named."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.data.dataset import Dataset

from .. import commands
from . import faulty

ROOT = Path(__file__).resolve().parents[2]
WATCHDOG = 12.0  # above what a machine that is busy with other tests makes of a step
LATER = 10.0  # after the watchdog's time
RUN: dict[str, Any] = {
    "train__steps": 12,
    "train__batch_size": 8,
    "train__checkpoint_every": 5,
    "train__evaluate_every": 6,
    "logging__every": 1,
}
PHASES = ("data", "step", "evaluation", "save", "commit", "restore", "log")
NAMED = {"commit": "save", "log": "step"}  # as a run calls what it does then


def start(
    config: Path, workdir: Path, count: int, phase: str, kind: str, process: int
) -> list[subprocess.Popen[str]]:
    """A run of `count` processes, of which one has a fault."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    shared = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    if count > 1:
        shared.update(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count))
    module = [sys.executable, "-m", "tests.invariants.faulty", phase, kind, str(process), "train"]
    command = [*module, f"--config={config}", f"--workdir={workdir}", f"--watchdog={WATCHDOG}"]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=shared if count == 1 else {**shared, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


@pytest.fixture
def config(tmp_path: Path, tiny_dataset: Dataset) -> Path:
    return commands.experiment(tmp_path / "experiment.py", tiny_dataset.path, **RUN)


def meet(config: Path, workdir: Path, phase: str, kind: str, process: int) -> None:
    """All end in time after the fault; the process and the phase are named."""
    if phase == "restore":  # there has to be something to restore
        for each in start(config, workdir, 2, "step", "raise", 2):
            said = each.communicate(timeout=300)[0]
            assert each.returncode == 0, said
    processes = start(config, workdir, 2, phase, kind, process)
    try:
        other = processes[1 - process]
        said = other.communicate(timeout=300)[0]
        ended = time.time()
        if kind == "stop":  # only a signal ends it, as a launcher would send it
            processes[process].send_signal(signal.SIGKILL)
        faulty_said = processes[process].communicate(timeout=LATER + WATCHDOG)[0]
    finally:
        for each in processes:
            each.kill()
            each.wait()
    began = re.search(r"fault: ([0-9.]+)", faulty_said)
    assert began, faulty_said
    told = f"{said}\n----\n{faulty_said}"
    name = NAMED.get(phase, phase)
    if kind == "raise":
        assert processes[process].returncode == 1, told
        # Without process 0, JAX may be the first to end the other.
        assert other.returncode in ((1,) if process else (1, -signal.SIGABRT)), told
        assert ended - float(began[1]) < LATER, told
        assert "RuntimeError: the fault" in faulty_said
        assert re.search(
            rf"process {process}( of 2 failed in {name} after step [0-9]+)?: .*the fault", said
        ), told
    else:
        assert other.returncode == 1, told
        assert ended - float(began[1]) < WATCHDOG + LATER, told
        assert re.search(rf"process {process} of 2 .*in {name} after step [0-9]+", said), told
        assert "most recent call first" in said


CASES = [
    (phase, kind, process)
    for phase in PHASES
    for kind in ("raise", "stop", "spin")
    for process in (0, 1)
    # Process 0 alone commits and logs; to save and to restore may take ten times as long.
    if not (phase in ("commit", "log") and process)
    and not (phase in ("save", "commit", "restore") and kind == "spin")
]


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "kind", "process"), CASES)
def test_all_end_in_time_and_the_one_is_named(
    config: Path, tmp_path: Path, phase: str, kind: str, process: int
):
    meet(config, tmp_path / "run", phase, kind, process)


@pytest.mark.slow
def test_a_long_run_with_a_slow_compilation_is_no_alarm(tmp_path: Path, tiny_dataset: Dataset):
    changes = {"train__steps": 10_000, "train__evaluate_every": 1_000, "train__checkpoint_every": 1_000}
    config = commands.experiment(tmp_path / "experiment.py", tiny_dataset.path, **{**RUN, **changes})
    (process,) = start(config, tmp_path / "run", 1, "compile", "slow", 0)
    said = process.communicate(timeout=1_200)[0]
    assert process.returncode == 0, said
    assert "fault: " in said
    assert faulty.SLOW > 2 * WATCHDOG
    assert "trained to step 10000" in said
