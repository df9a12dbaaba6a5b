"""Lists for many users out of a catalogue of a million items: how fast, in how much memory, and killed on the way.

    python experiments/benchmarks/million.py [--items=1000000] [--users=200000] [--events=20] [--k=100] [--kills=2]
        [--folder=FOLDER] [--out=FILE]

Makes a log in which every item is taken, a dataset folder of it, and a run (D 64, sampled softmax) that is stopped at
its second checkpoint: what the lists are worth does not matter here. `dynrec score --filter_seen` then writes all lists
once undisturbed and once killed by SIGKILL at random moments and started again, and both folders are compared byte by
byte. Memory is the most that a process ever held, as the operating system counts it. What is in FOLDER already is used
again.
"""

import argparse
import datetime
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
from pathlib import Path
from typing import Any

import numpy as np

SASREC = Path(__file__).resolve().parents[1] / "sasrec.py"
CONFIG = {
    "loss.kind": "sampled",
    "model.dim": 64,
    "data.max_length": 20,
    "train.steps": 1000,
    "train.evaluate_every": 0,
    "train.checkpoint_every": 1,
}


def dynrec(verb: str, *flags: str) -> list[str]:
    """A command as users call it."""
    return [str(Path(sys.executable).with_name("dynrec")), verb, *flags]


def make(folder: Path, users: int, items: int, events: int) -> Path:
    """A run over a catalogue of which every item was taken; returns its folder."""
    dataset, run = folder / "dataset", folder / "run"
    if not dataset.exists():
        rng = np.random.default_rng(0)
        taken = np.concatenate([np.arange(1, items + 1), rng.integers(1, items + 1, users * events - items)])
        rng.shuffle(taken)
        with (folder / "log.txt").open("w") as file:
            for user, own in enumerate(taken.reshape(users, events)):
                file.write(f"u{user} {' '.join(map(str, own))}\n")
        subprocess.run(
            dynrec("prepare", f"--source=sequences:{folder / 'log.txt'}", f"--out={dataset}"),
            check=True,
            stdout=subprocess.DEVNULL,
        )
    checkpoint = run / "checkpoints" / "2"
    if not checkpoint.exists():
        flags = [f"--config={SASREC}", f"--workdir={run}", f"--config.dataset={dataset}"]
        flags += [f"--config.{key}={value}" for key, value in CONFIG.items()]
        with (folder / "train.log").open("w") as log:
            training = subprocess.Popen(dynrec("train", *flags), stdout=log, stderr=log)
        while training.poll() is None and not checkpoint.exists():
            time.sleep(0.2)
        training.kill()
        training.wait()
        if not checkpoint.exists():
            raise SystemExit(f"dynrec train: {(folder / 'train.log').read_text().strip().splitlines()[-1:]}")
    return run


def score(run: Path, out: Path, k: int, after: float | None = None) -> dict[str, float]:
    """Scores everybody, or as far as it comes in `after` seconds; its seconds and the most that it held, in GB."""
    flags = [f"--workdir={run}", f"--out={out}", f"--k={k}", "--filter_seen", "--step=2"]
    began = time.perf_counter()
    process = subprocess.Popen(dynrec("score", *flags), stdout=subprocess.DEVNULL)
    if after is not None:
        time.sleep(after)
        os.kill(process.pid, signal.SIGKILL)  # not by Popen, which would take the process's end from wait4
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if after is None and process.returncode:
        raise SystemExit(f"dynrec score ended with {process.returncode}")
    return {"seconds": time.perf_counter() - began, "memory": usage.ru_maxrss * 1024 / 1e9}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the lock."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != ".lock"
    }


def measure(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    run = make(folder, flags.users, flags.items, flags.events)
    whole, killed = folder / "whole", folder / "killed"
    for out in (whole, killed):
        shutil.rmtree(out, ignore_errors=True)
    alone = score(run, whole, flags.k)
    rng = random.Random(flags.seed)
    parts, memory = [], [alone["memory"]]
    for _ in range(flags.kills):
        done = score(run, killed, flags.k, after=rng.uniform(0.2, 0.5) * alone["seconds"])
        parts.append(len(list(killed.glob("part-*"))))
        memory.append(done["memory"])
    memory.append(score(run, killed, flags.k)["memory"])
    return {
        "users": flags.users,
        "items": flags.items,
        "k": flags.k,
        "seconds": alone["seconds"],
        "users a second": flags.users / alone["seconds"],
        "memory": max(memory),
        "parts when killed": parts,
        "parts": len(list(whole.glob("part-*"))),
        "identical": digests(whole) == digests(killed) and len(digests(whole)) > 2,
        "cores": len(os.sched_getaffinity(0)),
        "date": str(datetime.date.today()),
    }


def main() -> None:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("items", 1_000_000), ("users", 200_000), ("events", 20), ("k", 100), ("kills", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    if flags.users * flags.events < flags.items:
        parser.error("--users times --events: expected as many events as --items, so that each is taken")
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, flags)
    text = json.dumps(found, indent=2)
    print(text)
    if flags.out:
        flags.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
