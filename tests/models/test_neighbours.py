"""Shared targets, against the cross-entropy with the whole distribution written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynrec_jax.models.bstm import Rows
from dynrec_jax.models.neighbours import IDS, LAST, LESS, WEIGHTS
from dynrec_jax.models.user_encoder import Moments

from .. import tiny

ITEMS, MOST, SHARE = 20, 3, 0.3
WINDOWS = {1: [3, 8, 6, 1, 20], 2: [5, 2], 3: [7], 4: [11, 12, 13, 3]}
W = list(WINDOWS.items())
BATCH = tiny.batch([[W[3], W[0]], [W[2], W[1]]], 9)


def near() -> dict[str, np.ndarray]:
    """Up to three neighbours of each item, by row; items 5, 11 and 12 have none, and item 3 one."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, ITEMS + 1, (ITEMS + 1, MOST)).astype(np.int32)
    ids[3, 1:], ids[[0, 5, 11, 12]] = 0, 0
    return {IDS: ids, WEIGHTS: np.where(ids > 0, rng.uniform(0.1, 2.0, ids.shape), 0.0).astype(np.float32)}


def distribution(history: list[int], target: int) -> np.ndarray:
    """q [N + 1] of what comes after a history."""
    found, q = near(), np.zeros(ITEMS + 1)
    for back, item in enumerate(history[::-1][:LAST]):
        np.add.at(q, found[IDS][item], LESS**back * found[WEIGHTS][item])
    q = SHARE * q / q.sum() if q.sum() else q
    q[target] += 1 - q.sum()
    return q


def loss(model: Any, params: Any, table: Any) -> Any:
    known = {name: jnp.asarray(array) for name, array in near().items()}
    items = {"item_id": table[BATCH.items], **{name: array[BATCH.items] for name, array in known.items()}}
    rows = Rows(items, catalogue={"item_id": table, **known})
    return model.loss(params, rows, BATCH, None, jax.random.key(2))


def test_the_loss_is_the_cross_entropy_against_the_shared_targets():
    for changes in ({"model__normalise": True}, {"model__backward_weight": 0.0}, {"model__interests": 2}):
        model, params, tables = tiny.bstm(
            ITEMS, loss__neighbours=SHARE, **{"model__backward_weight": 0.4, **changes}
        )
        plain, _, _ = tiny.bstm(ITEMS, **{"model__backward_weight": 0.4, **changes})
        table = tables["item_id"]
        v = np.asarray(model.ready(table), np.float64)[: ITEMS + 1]
        expected = float(loss(plain, params, table)[0])
        for window in WINDOWS.values():
            items = np.zeros((1, 8), np.int32)
            items[0, : len(window)] = window
            at = Moments((items != 0).astype(np.int32), jnp.arange(8, dtype=jnp.int32)[None])
            u = model.user_vectors(params, table[items], at)[0]
            for t, target in enumerate(window[1:]):
                q_D = (
                    u[t]
                    if model.abra.interests == 1
                    else model.abra.nearest(u[t], model.ready(table[target]))
                )
                scores = v @ np.asarray(model.abra.unit(q_D), np.float64) * model.abra.scale
                # The normaliser is the same in both; what differs is where the target's part goes.
                expected += scores[target] - distribution(window[: t + 1], target) @ scores
        np.testing.assert_allclose(float(loss(model, params, table)[0]), expected, rtol=3e-6)


def test_histories_in_one_row_do_not_share():
    """The last items of a history that begins behind another one's end are its own alone."""
    assert (
        distribution([5], 2)[2] == 1.0
    )  # item 5 has no neighbours, so that its row's other history would be felt
    assert distribution([3], 8)[8] < 1.0
