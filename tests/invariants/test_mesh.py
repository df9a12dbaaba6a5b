"""Same numbers on any mesh: one step on one device, and on eight in several splits, dropout included."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from dynrec_jax.models.bstm import make_bstm
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import rowwise_adagrad
from dynrec_jax.train.state import init_state
from dynrec_jax.train.step import StepSettings, compile_step

from .. import tiny

ITEMS = 300  # rows on all of eight devices
MESHES = {"full": [(8, 1, 1), (2, 2, 2), (1, 8, 1)], "sampled": [(1, 8, 1), (2, 2, 2)]}


def step(kind: str, sizes: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Metrics, parameters and tables after one step of plain gradient descent, and the parameters before.

    Plain descent, because its change is the gradient: Adam's first step is the gradient's sign.
    """
    c = tiny.config(
        loss__kind=kind,
        model__dropout=0.3,
        model__hops=int(kind == "full"),
        loss__block_items=20,
        loss__negatives=16,
    )
    model, mesh, tx, rows = make_bstm(c, ITEMS), tiny.mesh(*sizes), optax.sgd(1.0), rowwise_adagrad()
    state, shardings = init_state(model, tx, rows, mesh, seed=3)
    settings = StepSettings(seed=5, accumulation=1, clip_norm=0.0, negatives=16, logq=True)
    schedule = optax.constant_schedule(0.1)
    run = compile_step(mesh, shardings, model=model, tx=tx, row_tx=rows, schedule=schedule, settings=settings)
    rng = np.random.default_rng(0)
    windows = [
        (n, rng.integers(1, ITEMS + 1, length).tolist()) for n, length in enumerate([9, 4, 5, 7, 2, 9, 3], 1)
    ]
    w = windows
    batch = tiny.batch([[w[0]], [w[1], w[2]], [w[3], w[4]], [w[5]], [], [w[6]], [], []], 9)
    place = sharding(mesh, "batch", None)
    batch = jax.tree.map(lambda x: jax.device_put(x, place), batch)
    before = jax.tree.map(np.asarray, (state.params, state.tables))
    state, metrics = run(state, batch, None)
    return jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, (state.params, state.tables)), before


@pytest.mark.parametrize("kind", MESHES)
def test_a_step_is_the_same_on_any_mesh(kind: str):
    metrics, after, before = step(kind, (1, 1, 1))
    # The step does something everywhere; else the comparison below says nothing.
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.abs(new - old).max() > 1e-4
    for sizes in MESHES[kind]:
        other_metrics, other, same = step(kind, sizes)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(same), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=f"{sizes}: initial weights")
        for name in ("loss", "gradient_norm", "targets"):
            np.testing.assert_allclose(
                other_metrics[name], metrics[name], rtol=1e-5, err_msg=f"{sizes}: {name}"
            )
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(other), strict=True
        ):
            np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5, err_msg=f"{sizes}: {path}")
