"""One step of plain gradient descent on a mesh: what changes is the gradient. Also run as a program, in processes."""

import sys
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dynrec_jax.batch import Batch
from dynrec_jax.models.bstm import make_bstm
from dynrec_jax.parallel.mesh import feed, make_mesh, place_rows
from dynrec_jax.parallel.processes import join
from dynrec_jax.parallel.rows import rowwise_adagrad
from dynrec_jax.train.state import init_state
from dynrec_jax.train.step import CompiledStep, StepSettings

from .. import tiny

ITEMS = 300  # rows on all of eight devices
SCALARS = ("loss", "gradient_norm", "targets")


def step(kind: str, mesh: Mesh, process: int = 0) -> dict[str, np.ndarray]:
    """Scalars of the step, and every weight before ("before/…") and after it ("after/…").

    Plain descent, because its change is the gradient: Adam's first step is the gradient's sign. Dropout is on.
    """
    c = tiny.config(
        loss__kind=kind,
        model__dropout=0.3,
        model__hops=int(kind == "full"),
        loss__block_items=20,
        loss__negatives=16,
    )
    model, tx, rows = make_bstm(c, ITEMS), optax.sgd(1.0), rowwise_adagrad()
    state, shardings = init_state(model, tx, rows, mesh, seed=3)
    settings = StepSettings(seed=5, accumulation=1, clip_norm=0.0, negatives=16, logq=True)
    schedule = optax.constant_schedule(0.1)
    run = CompiledStep(mesh, shardings, model=model, tx=tx, row_tx=rows, schedule=schedule, settings=settings)
    rng = np.random.default_rng(0)
    w = [
        (n, rng.integers(1, ITEMS + 1, length).tolist()) for n, length in enumerate([9, 4, 5, 7, 2, 9, 3], 1)
    ]
    own = feed(mesh, process)
    batch = tiny.batch([[w[0]], [w[1], w[2]], [w[3], w[4]], [w[5]], [], [w[6]], [], []], 9)
    part = slice(own.part * 8 // own.parts, (own.part + 1) * 8 // own.parts)
    batch = Batch(*(place_rows(mesh, np.asarray(values)[part]) for values in batch))
    before = _named("before", (state.params, state.tables))
    state, metrics = run(state, batch, None)
    scalars = {name: np.asarray(metrics[name]) for name in SCALARS}
    return {**scalars, **before, **_named("after", (state.params, state.tables))}


def _named(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    whole = multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else tree
    return {
        prefix + jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
    }


def main(kind: str, sizes: list[int], out: str) -> None:
    """Writes what `step` gives, by process 0."""
    processes = join()
    processes.start_jax()
    found = step(kind, make_mesh(*sizes), processes.index)
    if processes.first:
        np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2].split("x")], sys.argv[3])
