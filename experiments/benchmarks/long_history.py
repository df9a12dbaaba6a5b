"""Time and memory of reading one long history, forward and backward: the user encoder alone.

    python experiments/benchmarks/long_history.py [--length=8192] [--dtype=float32] [--out=FILE]

Two blocks ("prenorm", D 64, two heads) read one row, and the gradient of a sum over the vectors is taken in all
parameters. The row holds one history (`plain`), histories of mixed lengths and padding (`packed`), or one history with
a bias by the time between events (`timed`); each with nothing, with products and with nothing but the inputs of blocks
kept for the gradient. Each case has a process of its own. Of it are told: the compiler's temporary memory; how far
resident memory rose at its peak, compilation included, above that of the process with parameters and inputs; and the
median time of five runs. Writes JSON where --out is given.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynrec_jax.models.user_encoder import Moments, Sight, UserEncoder

DIM, HEADS, LAYERS, BUCKETS = 64, 2, 2, 32
KINDS, REMAT = ("plain", "packed", "timed"), ("none", "products", "block")
RUNS = 5
LENGTHS = (1000, 37, 2500, 3, 700)  # of packed histories, again and again; the last twentieth is padding


def moments(kind: str, length: int) -> Moments:
    """Where the events of the one row stand."""
    segments, positions = np.zeros((2, 1, length), np.int32)
    start, end = 0, length if kind != "packed" else length - length // 20
    sizes = itertools.cycle(LENGTHS if kind == "packed" else (length,))
    for number, size in enumerate(sizes, start=1):
        stop = min(start + size, end)
        segments[0, start:stop], positions[0, start:stop] = number, np.arange(stop - start)
        start = stop
        if start == end:
            break
    times = np.random.default_rng(0).integers(1, 100_000, (1, length)).cumsum(axis=1).astype(np.int32)
    return Moments(segments, positions, times)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def measure(kind: str, remat: str, length: int, dtype: str) -> dict[str, Any]:
    """One case, in this process."""
    encoder = UserEncoder(
        max_length=length,
        layers=LAYERS,
        heads=HEADS,
        block="prenorm",
        feedforward=4.0,
        dropout=0.0,
        dtype=jnp.dtype(dtype),
        sight=Sight(time=("bias",), time_buckets=BUCKETS) if kind == "timed" else Sight(),
        interests=1,
        remat=remat,
        scan_layers=False,
    )
    x_BxLxD = jax.random.normal(jax.random.key(0), (1, length, DIM))
    at = jax.tree.map(jnp.asarray, moments(kind, length))
    shapes = jax.eval_shape(lambda: nn.meta.unbox(encoder.init(jax.random.key(0), x_BxLxD, at)))["params"]
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes)

    def total(params: Any, x_BxLxD: jax.Array, at: Moments) -> jax.Array:
        return (encoder.apply({"params": params}, x_BxLxD, at) ** 2).sum()

    jax.block_until_ready(params)
    rest, began = resident(), time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(total)).lower(params, x_BxLxD, at).compile()
    compile_seconds, seconds = time.perf_counter() - began, []
    for _ in range(RUNS):
        began = time.perf_counter()
        value, gradient = jax.block_until_ready(compiled(params, x_BxLxD, at))
        seconds.append(time.perf_counter() - began)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, gradient))):
        raise FloatingPointError(f"{kind}, {remat}: a value or gradient is not finite")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "kind": kind,
        "remat": remat,
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "resident_growth_bytes": peak - rest,
        "seconds": statistics.median(seconds),
        "compile_seconds": compile_seconds,
    }


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8_192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--case", help="KIND,REMAT: this one alone, as JSON")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case.split(","), arguments.length, arguments.dtype)))
        return
    rows = []
    print(
        f"L {arguments.length:,}, {arguments.dtype}: temporary MiB, resident growth MiB, seconds (compilation)"
    )
    for kind, remat in itertools.product(KINDS, REMAT):
        command = [sys.executable, __file__, f"--case={kind},{remat}"]
        command += [f"--length={arguments.length}", f"--dtype={arguments.dtype}"]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(told.splitlines()[-1])
        rows.append(row)
        print(
            f"{kind:8}{remat:10}{row['temporary_bytes'] / 2**20:8,.0f}{row['resident_growth_bytes'] / 2**20:8,.0f}"
            f"{row['seconds']:8.2f} ({row['compile_seconds']:.1f})",
            flush=True,
        )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
