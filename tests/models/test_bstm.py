"""The joint loss against a naive one: each window alone, each direction by itself, the catalogue dense."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import Batch
from dynrec_jax.models.bstm import Bstm, Rows
from dynrec_jax.models.user_encoder import Moments
from dynrec_jax.negatives import Negatives

from .. import tiny

ITEMS = 20
WINDOWS = {1: [3, 8, 8, 1, 20], 2: [5, 2], 3: [7], 4: [11, 12, 13, 3]}  # window 3 has no target
PAIRS = sum(len(window) - 1 for window in WINDOWS.values())
W = list(WINDOWS.items())
PACKED = tiny.batch([[W[3], W[0]], [W[2], W[1]], [], []], 9)
ALONE = tiny.batch([[window] for window in W], 9)
NEGATIVES = Negatives(jnp.array([3, 9, 20, 9], jnp.int32), jnp.array([0.1, -0.4, 0.3, -0.4]))


def loss_function(model: Bstm) -> Callable[..., Any]:
    """From (params, table, batch) to (loss, gradients); dropout is on where the model has any."""

    def loss(params: Any, table: Any, batch: Batch) -> Any:
        if model.sampled:
            rows = Rows({"item_id": table[batch.items]}, negatives={"item_id": table[NEGATIVES.ids]})
            return model.loss(params, rows, batch, NEGATIVES, jax.random.key(2))
        return model.loss(
            params,
            Rows({"item_id": table[batch.items]}, catalogue={"item_id": table}),
            batch,
            None,
            jax.random.key(2),
        )

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def naive_loss(model: Bstm, params: Any, table: Any, weights: tuple[float, float]) -> float:
    """Backward is done as forward over the reversed window, with the other direction vector."""
    swapped = {**params, "user": {**params["user"], "direction": params["user"]["direction"][::-1]}}
    encode = jax.jit(
        lambda params, items, segments: model.user_vectors(
            params, table[items], Moments(segments, jnp.arange(8, dtype=jnp.int32)[None]), "forward"
        )
    )
    v = np.asarray(table, np.float64)[1 : ITEMS + 1]
    scale = 1 / (0.5 * np.sqrt(8 + 8))
    total = 0.0
    for window in WINDOWS.values():
        for direction, weight in enumerate(weights):
            events = window[:: 1 - 2 * direction]
            items = np.zeros((1, 8), np.int32)
            items[0, : len(events) - 1] = events[:-1]
            u = np.asarray(
                encode([params, swapped][direction], items, (items != 0).astype(np.int32)), np.float64
            )
            for t, target in enumerate(events[1:]):
                logits = scale * v @ u[0, t]
                total += weight * (np.log(np.exp(logits).sum()) - logits[target - 1])
    return total


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)])
def test_the_loss_is_the_naive_one_in_both_directions(weights: tuple[float, float]):
    model, params, tables = tiny.bstm(
        ITEMS, model__forward_weight=weights[0], model__backward_weight=weights[1]
    )
    table = tables["item_id"]
    (total, targets), _ = loss_function(model)(params, table, PACKED)
    assert int(targets) == PAIRS
    np.testing.assert_allclose(total, naive_loss(model, params, table, weights), rtol=3e-6)


@pytest.mark.parametrize("kind", ["full", "sampled", "gbce"])
def test_packing_changes_neither_loss_nor_gradients_with_dropout_on(kind: str):
    model, params, tables = tiny.bstm(ITEMS, loss__kind=kind, model__dropout=0.3)
    run = loss_function(model)
    (packed, count), packed_gradients = run(params, tables["item_id"], PACKED)
    (alone, count_alone), alone_gradients = run(params, tables["item_id"], ALONE)
    assert int(count) == int(count_alone) == PAIRS
    np.testing.assert_allclose(packed, alone, rtol=2e-6)
    leaves = jax.tree_util.tree_leaves_with_path(packed_gradients)
    for (path, one), other in zip(leaves, jax.tree.leaves(alone_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=str(path))
        assert np.abs(np.asarray(one)).max() > 1e-3, f"{path}: the gradient must be there to be compared"


def test_the_loss_is_a_sum_over_windows():
    model, params, tables = tiny.bstm(ITEMS)
    run = loss_function(model)
    parts = [run(params, tables["item_id"], tiny.batch([[], [window], [], []], 9))[0][0] for window in W]
    whole = run(params, tables["item_id"], PACKED)[0][0]
    np.testing.assert_allclose(whole, sum(float(part) for part in parts), rtol=2e-6)


def test_weight_0_is_no_traversal():
    """The direction vector of a traversal that is left out gets no gradient; the other one does."""
    for weights, rows in (
        ((1.0, 0.0), [True, False]),
        ((0.0, 1.0), [False, True]),
    ):
        model, params, tables = tiny.bstm(
            ITEMS, model__forward_weight=weights[0], model__backward_weight=weights[1]
        )
        _, (gradient, _) = loss_function(model)(params, tables["item_id"], PACKED)
        assert np.asarray(gradient["user"]["direction"]).any(axis=1).tolist() == rows


def test_gbce_is_calibrated_by_the_config():
    """α = 4/19. At t = 0 the target counts fully, at t = 1 as α: what the two differ by is a sum of -log σ alone."""
    values, targets = {}, 0.0
    for calibration in (0.0, 0.5, 1.0):
        model, params, tables = tiny.bstm(ITEMS, loss__kind="gbce", loss__calibration=calibration)
        rows = Rows(
            {"item_id": tables["item_id"][PACKED.items]},
            negatives={"item_id": tables["item_id"][NEGATIVES.ids]},
        )
        run = jax.jit(functools.partial(model.loss, params, rows, PACKED, NEGATIVES))
        values[calibration], targets = run(jax.random.key(2))
    assert values[0.0] > values[0.5] > values[1.0] > 0
    np.testing.assert_allclose(values[0.5], (values[0.0] + values[1.0]) / 2, rtol=1e-5)
    # Rows start short: all scores are near 0, each log σ near log 2, of the target and the four negatives.
    np.testing.assert_allclose(values[0.0], 1.5 * targets * np.log(2), rtol=0.3)


def test_a_sampled_loss_without_negatives_is_refused():
    model, params, tables = tiny.bstm(ITEMS, loss__kind="sampled")
    rows = Rows({"item_id": tables["item_id"][PACKED.items]})
    with pytest.raises(ValueError, match=r"needs rows\.negatives"):
        jax.eval_shape(lambda: model.loss(params, rows, PACKED, None, jax.random.key(0)))


def test_init_gives_named_rows_for_items_alone():
    _, _, tables = tiny.bstm(ITEMS)
    table = np.asarray(tables["item_id"])
    assert not table[0].any()
    assert not table[ITEMS + 1 :].any()
    lengths = np.linalg.norm(table[1 : ITEMS + 1], axis=1)
    assert 0.8 < lengths.mean() < 1.2
