"""A training step with sampled negatives at catalogues of 10⁵, 10⁶ and 10⁷ items: its time and its memory.

    JAX_PLATFORMS=cpu python experiments/benchmarks/catalogue.py [--items=100000,1000000] [--rounds=15] [--out=FILE]

All sizes are measured in turns, in one process, so that what the machine does beside it meets them alike; the time is
the median of a step. Memory is measured by a process of its own for each size: the most that it holds in its steps
beyond what it held before them, which is the table and its optimizer's state.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dynrec_jax.batch import Batch
from dynrec_jax.config import default_config
from dynrec_jax.models.model import MODELS
from dynrec_jax.parallel.capacity import zipf
from dynrec_jax.parallel.mesh import make_mesh
from dynrec_jax.train.loop import setup
from dynrec_jax.train.step import Inputs

ITEMS = (100_000, 1_000_000, 10_000_000)
LENGTH, BATCH = 50, 64
STEPS = 4  # of a turn


def settings() -> ml_collections.ConfigDict:
    """D 64, two layers, 512 uniform negatives, lazy Adam of rows."""
    c = default_config()
    c.data.max_length = LENGTH
    c.model.positions, c.model.backward_weight = "absolute", 0.5
    c.loss.kind = "sampled"
    c.train.batch_size = BATCH
    return c


def batch(items: int, seed: int) -> Batch:
    """Full histories of Zipf ids."""
    shape = (BATCH, LENGTH + 1)
    place = np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), shape)
    number = np.broadcast_to(np.arange(1, BATCH + 1, dtype=np.int32)[:, None], shape)
    ids = zipf(np.random.default_rng(seed), items, shape).astype(np.int32)
    nothing = np.zeros(shape, np.int32)
    return Batch(ids, nothing, nothing, number, place, LENGTH - place)


class Run:
    """A state of its own for a size of the catalogue, and steps of it."""

    def __init__(self, items: int):
        """Compiles the step and takes the first."""
        config = settings()
        model = MODELS[config.model.name](config, items)
        made = setup(config, model, make_mesh(devices=jax.devices()[:1]))
        self.state, self._step = made.fresh(), made.step
        self._batches = [batch(items, seed) for seed in range(8)]
        self._number = 0
        jax.block_until_ready(self.state)

    def step(self) -> float:
        """Seconds of the next one."""
        began = time.perf_counter()
        self.state, metrics = self._step(self.state, Inputs(self._batches[self._number % 8]))
        jax.block_until_ready((self.state, metrics))
        self._number += 1
        return time.perf_counter() - began


def resident() -> int:
    """Bytes that this process holds."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def memory(items: int, queue: Any) -> None:
    """In a process of its own: table and state, and what steps hold beside them."""
    Run(1_000)  # what JAX and a first compilation take is there before anything is measured
    before = resident()
    run = Run(items)
    held = resident()
    with Path("/proc/self/clear_refs").open("w", encoding="ascii") as file:
        file.write("5")  # the most that was held counts from here
    for _ in range(STEPS):
        run.step()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            most = int(line.split()[1]) * 1024
    state = sum(x.nbytes for x in jax.tree.leaves(run.state))
    queue.put({"state": state, "before_steps": held - before, "in_steps": most - held})


def measured_memory(items: int) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=memory, args=(items, queue))
    process.start()
    found: dict[str, int] = queue.get()
    process.join()
    return found


def main() -> None:
    """Prints a line for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default=",".join(map(str, ITEMS)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.items.split(",")]
    held = {size: measured_memory(size) for size in sizes}
    runs = {size: Run(size) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for run in runs.values():
        run.step()
    for _ in range(arguments.rounds):
        for size, run in runs.items():
            seconds[size] += [run.step() for _ in range(STEPS)]
    rows = []
    for size in sizes:
        median = statistics.median(seconds[size])
        ratio = median / statistics.median(seconds[sizes[0]])
        rows.append({"items": size, "milliseconds": 1e3 * median, "ratio": ratio, **held[size]})
        mib = {name: round(number / 2**20) for name, number in held[size].items()}
        print(
            f"{size:>12,} items: {1e3 * median:7.1f} ms a step, {ratio:.3f} of the smallest; "
            f"MiB: state {mib['state']:,}, before steps {mib['before_steps']:,}, more in steps {mib['in_steps']:,}",
            flush=True,
        )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
