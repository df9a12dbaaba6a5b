"""What it costs to seal a checkpoint when it is saved, and to prove it when it is read, beside Orbax alone.

    python experiments/benchmarks/checkpoint.py [--gigabytes=1.0] [--rounds=5] [--folder=DIR] [--out=FILE]

A state of an item table, its row optimizer's moments and dense weights. The files are read from the operating
system's cache, which favours nobody but makes Orbax quickest. Medians of several rounds; JSON where --out is given.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dynrec_jax.parallel.digest import digests
from dynrec_jax.train import arrays, manifest
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.state import TrainState

WIDTH, DENSE = 64, 1_000_000
Seconds = dict[str, list[float]]


def make_state(gigabytes: float) -> TrainState:
    """A table, two moments of the same shape, and dense weights with Adam's moments."""
    rows = int(gigabytes * 1e9 / 4 - 3 * DENSE) // (3 * WIDTH)
    keys = jax.random.split(jax.random.key(0), 4)
    table, first, second = (jax.random.normal(key, (rows, WIDTH)) for key in keys[:3])
    params = {"kernel": jax.random.normal(keys[3], (DENSE // 1000, 1000))}
    row_state = {"item_id": {"mean": first * 1e-3, "square": second**2 * 1e-6}}
    state = TrainState(jnp.int32(1), params, {"item_id": table}, optax.adam(0.1).init(params), row_state)
    return jax.block_until_ready(state)


def trees(state: TrainState) -> dict[str, Any]:
    """The state as it lies on the disk."""
    return {
        "model": {"params": state.params, "tables": state.tables},
        "optimizer": {"opt_state": state.opt_state, "row_state": state.row_state},
    }


def measure(state: TrainState, folder: Path, rounds: int) -> Seconds:
    """Seconds of each part in each round; the first round, which compiles, is left out."""
    found: Seconds = {}

    @contextlib.contextmanager
    def clock(what: str, keep: bool) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if keep:
            found.setdefault(what, []).append(time.perf_counter() - began)

    for number in range(rounds + 1):
        keep = number > 0
        checkpoints = Checkpoints(folder / "ours", keep_last=1)
        with clock("save: until training goes on", keep):
            checkpoints.save(state, number + 1, {}, None)
        with clock("save: the rest, in the background", keep):
            checkpoints.wait()
        checkpoints.close()
        orbax = folder / "orbax"
        arrays.make_folders(orbax, trees(state))
        with clock("Orbax's save: until training goes on", keep):
            wait = arrays.start_to_write(orbax, trees(state))
        with clock("Orbax's save: the rest", keep):
            wait()
            arrays.merge(orbax, trees(state))
        shutil.rmtree(orbax)
        checkpoint = folder / "ours" / str(number + 1)
        with clock("Orbax's restore", keep):
            restored = {name: arrays.read(checkpoint / name, tree) for name, tree in trees(state).items()}
            jax.block_until_ready(restored)
        with clock("check: manifest, sizes, small files", keep):
            assert not manifest.cheap_check(checkpoint, manifest.read(checkpoint))
        with clock("check: digests", keep):
            digests(jax.tree.leaves(restored))
        del restored
        checkpoints = Checkpoints(folder / "ours", keep_last=1)
        with clock("our restore, verified", keep):
            jax.block_until_ready(checkpoints.resume(state))
        checkpoints.close()
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    state = make_state(arguments.gigabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        seconds = measure(state, Path(folder), arguments.rounds)
    median = {what: statistics.median(times) for what, times in seconds.items()}
    print(f"{size / 1e9:.2f} GB on {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    for what, times in seconds.items():
        print(f"{what:40s} {median[what]:8.3f} s   ({min(times):.3f} to {max(times):.3f})")
    check = median["check: manifest, sizes, small files"] + median["check: digests"]
    share = check / median["Orbax's restore"]
    print(f"the check takes {share:.1%} of Orbax's restore")
    if arguments.out:
        result = {"bytes": size, "seconds": seconds, "median": median, "check_of_restore": share}
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
