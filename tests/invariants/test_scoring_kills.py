"""Scoring that is killed at any moment, by two workers on one folder: every user once, and what was good stays."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dynrec_jax.files import LOCK
from dynrec_jax.score.parts import MANIFEST, RECORDS

from ..commands import digest, small_run

ROOT = Path(__file__).parents[2]
# Writes the parts of a job that are not there, without computing anything.
WRITER = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from dynrec_jax.score.parts import Parts
number = 40
parts = Parts(Path(sys.argv[1]), {"format": 2}, number)
def table(part):
    ids = pa.array([f"u{part:02d}-{i}" for i in range(50)])
    return pa.table({"user_id": ids, "scores": np.random.default_rng(part).random(50)})
there = parts.done([50] * number)
for part in range(number):
    if part not in there:
        parts.write(part, table(part))
parts.finish()
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


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


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


def killed_again_and_again(
    program: str, arguments: list[str], out: Path, kills: int, seed: int
) -> Counter[str]:
    """Two workers at a time, each killed at a random moment, until there were enough; then one that may end."""
    rng, count = random.Random(seed), Counter[str]()
    before: dict[str, bytes] = {}
    whole = 0.0
    while count["kills"] < kills:
        began = time.monotonic()
        workers = [start(program, *arguments) for _ in range(2)]
        # From the first write on: what comes before it changes nothing.
        while all(worker.poll() is None for worker in workers) and len(digest(out)) <= whole:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        for worker in rng.sample(workers, 2):
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL)
                count["kills"] += 1
                count["inside a part"] += any(path.name.startswith(".part") for path in out.iterdir())
            else:
                assert worker.returncode == 0
            worker.wait()
            time.sleep(rng.uniform(0, 0.02))
        now = good_parts(out)
        assert before.items() <= now.items()  # good parts are never replaced
        before, whole = now, len(digest(out))
        count["rounds"] += 1
        if all(worker.returncode == 0 for worker in workers):  # the job is done: begin another
            for path in out.iterdir():
                path.unlink()
            before, whole = {}, 0
        assert time.monotonic() - began < 120
    last = start(program, *arguments)
    assert last.wait() == 0
    return count


def expect_whole(out: Path, clean: Path) -> None:
    """Byte for byte what an undisturbed job leaves, and every user once."""
    found = {name: value for name, value in digest(out).items() if name != LOCK}
    assert found == {name: value for name, value in digest(clean).items() if name != LOCK}
    users = pq.read_table(out).column("user_id").to_pylist()
    assert max(Counter(users).values()) == 1
    assert json.loads((out / MANIFEST).read_text())["parts"] == len(list(out.glob("*.parquet")))


def test_fifty_kills_of_two_writers(tmp_path: Path):
    assert start(WRITER, str(tmp_path / "clean")).wait() == 0
    count = killed_again_and_again(WRITER, [str(tmp_path / "out")], tmp_path / "out", 50, seed=0)
    expect_whole(tmp_path / "out", tmp_path / "clean")
    assert count["inside a part"]


@pytest.mark.slow
def test_two_hundred_kills_of_two_scoring_commands(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    made = small_run(tmp_path_factory)
    arguments = ["score", f"--workdir={made.workdir}", "--k=5", "--filter_seen"]
    assert start(SCORER, *arguments, f"--out={tmp_path / 'clean'}").wait() == 0
    assert len(list((tmp_path / "clean").glob("*.parquet"))) == 30
    count = killed_again_and_again(
        SCORER, [*arguments, f"--out={tmp_path / 'out'}"], tmp_path / "out", 200, seed=1
    )
    expect_whole(tmp_path / "out", tmp_path / "clean")
    assert count["inside a part"]
