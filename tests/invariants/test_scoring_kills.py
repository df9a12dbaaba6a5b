"""Scoring that is killed at any moment, by two workers on one folder: every user once, and what was good stays."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
import pytest

from dynrec_jax.files import LOCK
from dynrec_jax.score.parts import MANIFEST, RECORDS

from ..commands import digest, small_run

ROOT = Path(__file__).parents[2]
# Writes the parts of a job that are not there, without computing anything: a process for each line that it is given,
# forked so that none has to begin from nothing. One that fails leaves a file that says so.
WRITERS = """
import os, signal, sys, traceback
from pathlib import Path
import numpy as np, pyarrow as pa
from dynrec_jax.score.parts import Parts
number = 40
def table(part):
    ids = pa.array([f"u{part:02d}-{i}" for i in range(50)])
    return pa.table({"user_id": ids, "scores": np.random.default_rng(part).random(50)})
def write(out):
    parts = Parts(out, {"format": 2}, number)
    there = parts.done([50] * number)
    for part in range(number):
        if part not in there:
            parts.write(part, table(part))
    parts.finish()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits: who has ended is gone
for line in sys.stdin:
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    try:
        write(Path(line.strip()))
    except BaseException:
        Path(line.strip() + ".fault").write_text(traceback.format_exc())
    os._exit(0)
"""
# The command itself, in parts of two users.
SCORER = """
import sys
import numpy as np
from dynrec_jax.cli import main
from dynrec_jax.score import queries
queries.groups = lambda stored: [range(i, min(i + 2, stored.users)) for i in range(0, stored.users, 2)]
sys.exit(main(sys.argv[1:]))
"""


class Worker(Protocol):
    """A process that scores."""

    def running(self) -> bool: ...

    def kill(self) -> None: ...


class Forked:
    """One of `WRITERS`."""

    def __init__(self, pid: int, out: Path):
        self._pid, self._out = pid, out

    def running(self) -> bool:
        fault = self._out.with_name(f"{self._out.name}.fault")
        assert not fault.exists(), fault.read_text()
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


class Started:
    """A command."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process

    def running(self) -> bool:
        status = self._process.poll()
        assert status in (None, 0, -signal.SIGKILL)
        return status is None

    def kill(self) -> None:
        self._process.kill()


def start(program: str, *arguments: str, **more: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        **more,
    )


def number_of_files(out: Path) -> int:
    return len(list(out.iterdir())) if out.exists() else 0


def good_parts(out: Path) -> dict[str, bytes]:
    """The parts that readers of Parquet see, each with the rows and the digest that were written before it."""
    known = {}
    if (out / RECORDS).exists():
        lines = [
            line for line in (out / RECORDS).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
        ]
        known = {record["part"]: record for record in map(json.loads, lines)}
    found = {}
    for path in sorted(out.glob("*.parquet")) if out.exists() else []:
        content = path.read_bytes()
        assert pq.read_metadata(path).num_rows == known[path.name]["rows"]
        assert hashlib.sha256(content).hexdigest() == known[path.name]["sha256"]
        found[path.name] = content
    return found


def killed_again_and_again(begin: Callable[[Path], Worker], out: Path, kills: int, seed: int) -> Counter[str]:
    """Two workers at a time, each killed at a random moment, until there were enough; then one that may end."""
    rng, count = random.Random(seed), Counter[str]()
    before: dict[str, bytes] = {}
    files = 0
    while count["kills"] < kills:
        deadline = time.monotonic() + 120
        workers = [begin(out) for _ in range(2)]
        # From the first write on: what comes before it changes nothing.
        while all(worker.running() for worker in workers) and number_of_files(out) <= files:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        ended = 0
        for worker in rng.sample(workers, 2):
            if worker.running():
                worker.kill()
                count["kills"] += 1
                count["inside a part"] += any(path.name.startswith(".part") for path in out.iterdir())
            else:
                ended += 1
            while worker.running():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
        now = good_parts(out)
        assert before.items() <= now.items()  # good parts are never replaced
        before, files = now, number_of_files(out)
        if ended == 2:  # the job is done: begin another
            for path in out.iterdir():
                path.unlink()
            before, files = {}, 0
    last = begin(out)
    while last.running():
        time.sleep(0.01)
    return count


def expect_whole(out: Path, clean: Path) -> None:
    """Byte for byte what an undisturbed job leaves, and every user once."""
    found = {name: value for name, value in digest(out).items() if name != LOCK}
    assert found == {name: value for name, value in digest(clean).items() if name != LOCK}
    users = pq.read_table(out).column("user_id").to_pylist()
    assert max(Counter(users).values()) == 1
    assert json.loads((out / MANIFEST).read_text())["parts"] == len(list(out.glob("*.parquet")))


def test_fifty_kills_of_two_writers(tmp_path: Path):
    # In memory where there is such a place: what is not on the disk when a process is killed is not lost.
    memory = tempfile.mkdtemp(dir="/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    folder = Path(memory) if memory else tmp_path
    try:
        kill_writers(folder)
    finally:
        if memory:
            shutil.rmtree(memory)


def kill_writers(tmp_path: Path) -> None:
    with start(WRITERS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:

        def begin(out: Path) -> Worker:
            writers.stdin.write(f"{out}\n")
            writers.stdin.flush()
            return Forked(int(writers.stdout.readline()), out)

        clean = begin(tmp_path / "clean")
        while clean.running():
            time.sleep(0.01)
        count = killed_again_and_again(begin, tmp_path / "out", 50, seed=0)
        writers.stdin.close()
    expect_whole(tmp_path / "out", tmp_path / "clean")
    assert count["inside a part"]


@pytest.mark.slow
def test_two_hundred_kills_of_two_scoring_commands(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    made = small_run(tmp_path_factory)
    arguments = ["score", f"--workdir={made.workdir}", "--k=5", "--filter_seen"]

    def begin(out: Path) -> Worker:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return Started(start(SCORER, *arguments, f"--out={out}", **quiet))

    clean = begin(tmp_path / "clean")
    while clean.running():
        time.sleep(0.1)
    assert len(list((tmp_path / "clean").glob("*.parquet"))) == 30
    count = killed_again_and_again(begin, tmp_path / "out", 200, seed=1)
    expect_whole(tmp_path / "out", tmp_path / "clean")
    assert count["inside a part"]
