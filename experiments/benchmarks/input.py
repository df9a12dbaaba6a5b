"""How many histories of length 200 the input pipeline assembles in a second on one core.

    python experiments/benchmarks/input.py [--out=FILE]

Users of 200 to 400 events, written and memory-mapped as a real dataset is; draws, windows and packing as in
training. Time is CPU time of one thread, the median of several rounds. Writes JSON where --out is given.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from dynrec_jax.config import default_config
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.pipeline import BatchSource, make_splits
from dynrec_jax.data.prepare import PrepareOptions, prepare

USERS, ITEMS, LENGTH, BATCH, STEPS, ROUNDS = 4_000, 5_000, 200, 128, 100, 7


def write_log(path: Path) -> None:
    """A file of sequences, each longer than a window."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for user in range(USERS):
            items = random.integers(0, ITEMS, random.integers(LENGTH + 4, 2 * LENGTH))
            file.write(f"u{user} {' '.join(map(str, items))}\n")


def measure(folder: Path, windows: str) -> list[float]:
    """Histories a second of CPU time, for each round."""
    config = default_config()
    config.data.max_length, config.data.windows = LENGTH, windows
    config.train.batch_size, config.train.steps = BATCH, STEPS * ROUNDS
    histories = Histories(prepare_once(folder), folder / "cache")
    source = BatchSource(histories, make_splits(histories, config), config)
    rates = []
    for number in range(ROUNDS):
        began = time.thread_time()
        for step in range(number * STEPS, (number + 1) * STEPS):
            source[step]
        rates.append(STEPS * BATCH / (time.thread_time() - began))
    return rates


def prepare_once(folder: Path):
    """The dataset folder."""
    from dynrec_jax.data.dataset import open_dataset

    if not (folder / "dataset").exists():
        write_log(folder / "sequences.txt")
        prepare(PrepareOptions(source=f"sequences:{folder}/sequences.txt", out=folder / "dataset"))
    return open_dataset(folder / "dataset")


def main() -> None:
    """Prints a line for each kind of window."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for windows in ("last", "random"):
            rates = measure(Path(folder), windows)
            result[windows] = {"median": statistics.median(rates), "low": min(rates), "high": max(rates)}
            told = " ".join(f"{name} {value:,.0f}" for name, value in result[windows].items())
            print(f"windows={windows}: histories of {LENGTH} events a second a core: {told}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
