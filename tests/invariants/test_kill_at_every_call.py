"""A save that is killed at any write, sync or rename leaves the step before it, or its own, and nothing else.

Every call by which a save changes the disk is met in turn, by SIGKILL, from the first until the save passes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from dynrec_jax.train.checkpoint import Checkpoints

from .killed_saves import FIRST, KEPT, save, state_of

ROOT = Path(__file__).resolve().parents[2]
Killed = Callable[[Path, int], int]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    """(folder, n) -> how a save ended that is killed at its n-th call; for 0, how many calls there are."""
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

        def ask(run: Path, at: int) -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([str(run), at]) + "\n")
            process.stdin.flush()
            return int(json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_there_is_the_step_before_or_the_step_and_nothing_else(killed: Killed, tmp_path: Path, every: int):
    base = tmp_path / "base"
    save(str(base), FIRST)

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(base, tmp_path / "run")
        return tmp_path / "run"

    calls = killed(fresh(), 0)
    assert calls > 40, "it writes, syncs and renames files of several trees"
    found: list[int] = []
    for at in range(1, calls + 2, every):
        run = fresh()
        status = killed(run, at)
        # Threads come to their calls in an order of their own, and one more or less is made.
        assert status == (-9 if at <= calls - 2 else status)
        checkpoints = Checkpoints(run / "checkpoints", KEPT, say=pytest.fail)
        resumed = checkpoints.resume(state_of(0))
        checkpoints.close()
        assert resumed is not None
        state, progress = resumed
        after = int(state.step)
        assert after in (FIRST, FIRST + 1)
        assert progress["step"] == after
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(after)), strict=True):
            np.testing.assert_array_equal(x, y)
        there = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert there in (["1"], ["1", "2"], ["2"]), f"call {at} left something behind: {there}"
        assert not (run / "damaged").exists()
        found.append(after)
    sys.stdout.write(
        f"{len(found)} kills at calls 1 to {calls}, every {every}: {found.count(FIRST)} left the step before\n"
    )
    assert found == sorted(found), "once it is there, it stays"
    assert found[0] == FIRST
    assert every > 1 or found[-1] == FIRST + 1
