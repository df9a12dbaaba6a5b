"""A save that is killed at any write, sync or rename leaves the step before it, or its own, and nothing else.

Every call by which a save changes the disk is met in turn, from the first until the save passes: by SIGKILL, or by an
error of the disk, after which the run goes on or ends with one line.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dynrec_jax.train.checkpoint import Checkpoints

from .killed_saves import FIRST, KEPT, save, state_of

ROOT = Path(__file__).resolve().parents[2]
Met = Callable[[Path, int, int], dict[str, Any]]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ESTALE)


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Met]:
    """(folder, n, error) -> how a save ended that is met at its n-th call; see `killed_saves.py`."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler, for what ends a save at a call")
    folder = tmp_path_factory.mktemp("killed")
    library = folder / "kill_at.so"
    source = Path(__file__).with_name("kill_at.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "tests.invariants.killed_saves"]
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(run: Path, at: int, by: int = 0) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([str(run), at, by]) + "\n")
            process.stdin.flush()
            return dict(json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """A run folder with one checkpoint, each time anew."""
    base, run = tmp_path / "base", tmp_path / "run"
    assert save(str(base), FIRST) == [None]

    def copy() -> Path:
        shutil.rmtree(run, ignore_errors=True)
        return Path(shutil.copytree(base, run))

    return copy


def resumed(run: Path, told: str) -> int:
    """The step from which a run goes on; all of it is as it was saved, and nothing else is there any more."""
    checkpoints = Checkpoints(run / "checkpoints", KEPT, say=pytest.fail)
    found = checkpoints.resume(state_of(0))
    checkpoints.close()
    assert found is not None, told
    state, progress = found
    step = int(state.step)
    assert step in (FIRST, FIRST + 1), told
    assert progress["step"] == step, told
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step)), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=told)
    there = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert there in (["1"], ["1", "2"], ["2"]), f"{told} left something behind: {there}"
    assert not (run / "damaged").exists(), told
    return step


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_there_is_the_step_before_or_the_step_and_nothing_else(
    met: Met, fresh: Callable[[], Path], every: int
):
    calls = met(fresh(), 0, 0)["calls"]
    assert calls > 40, "it writes, syncs and renames files of several trees"
    found = []
    for at in range(1, calls + 2, every):
        run = fresh()
        ended = met(run, at, 0)
        # Threads come to their calls in an order of their own, and one more or less is made.
        assert ended["status"] == -signal.SIGKILL or (at > calls - 2 and ended["told"] == [None]), at
        found.append(resumed(run, f"killed at call {at}"))
    sys.stdout.write(
        f"{len(found)} kills at calls 1 to {calls}, every {every}: {found.count(FIRST)} left the step before\n"
    )
    assert found[0] == FIRST
    assert every > 1 or found[-1] == FIRST + 1


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("every", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_of_the_disk_costs_no_checkpoint(
    met: Met, fresh: Callable[[], Path], every: int, error: int
):
    calls = met(fresh(), 0, 0)["calls"]
    again = ended_run = 0
    for at in range(3, calls + 1, every):
        run = fresh()
        ended = met(run, at, error)
        told = f"{os.strerror(error)} at call {at}: {ended}"
        assert ended["status"] == 0, told
        first, last = ended["told"][0], ended["told"][-1]
        step = resumed(run, told)
        if first is not None and first.startswith("MachineError"):
            ended_run += 1
            assert error == errno.EACCES, told  # the others may pass
        elif first is None:
            assert step == FIRST + 1, told  # while an old checkpoint was removed, say
        else:
            again += 1
            assert last is None, told
            assert step == FIRST + 1, told
    sys.stdout.write(
        f"{os.strerror(error)} at calls 3 to {calls}, every {every}: {again} tried again, {ended_run} ended\n"
    )
