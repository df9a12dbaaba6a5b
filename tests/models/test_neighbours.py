"""Shared targets, against the cross-entropy with the whole distribution written out; raised scores, against all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models.bstm import Rows
from dynrec_jax.models.neighbours import (
    FEW,
    IDS,
    LAST,
    LESS,
    TAUGHT,
    WEIGHTS,
    Near,
    last_items,
    raised,
    shrunk,
)
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


def test_the_last_items_come_newest_first():
    items = jnp.asarray([[4, 9, 2, 7, 0], [5, 6, 0, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    assert last_items(items).tolist() == [[7, 2, 9], [6, 5, 0], [0, 0, 0], [5, 4, 3]]
    assert last_items(items[:, :1]).tolist() == [[4, 0, 0], [5, 0, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("interests", [1, 3])
def test_a_list_is_that_of_all_scores_with_the_raised_ones(interests: int):
    """Short histories, repeated items, items that several of the last ones have as a neighbour, and seen ones."""
    model, _, tables = tiny.bstm(ITEMS, model__interests=interests, model__neighbours=0.7)
    abra, table = model.abra, tables["item_id"]
    rng = np.random.default_rng(1)
    last = rng.integers(1, ITEMS + 1, (40, LAST)).astype(np.int32)
    last[:5, 1:], last[5:9, 2:], last[9:14, 1] = 0, 0, last[9:14, 0]
    last[14] = 0  # of nobody
    seen = rng.integers(0, ITEMS + 1, (40, 4)).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(40, abra.width)).astype(np.float32))
    counts = near()
    near_all = Near(counts[IDS], counts[WEIGHTS], np.ones((ITEMS + 1, 1), np.int32))
    found = raised(near_all, jnp.asarray(last), abra.neighbours)
    ids, scores = abra.best(q, table, jnp.asarray(seen), 10, found)
    plain, _ = abra.best(q, table, jnp.asarray(seen), 10)

    expected = np.array(abra.logits(q, table), np.float64)[:, : ITEMS + 1]
    for user, items in enumerate(last):
        total = np.zeros(ITEMS + 1)
        for back, item in enumerate(items):
            if item:
                np.add.at(total, counts[IDS][item], LESS**back * counts[WEIGHTS][item])
        expected[user] += 0.7 * np.log(1 + total / FEW)
        expected[user, [0, *seen[user]]] = -np.inf
    order = np.argsort(-expected, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, axis=1), rtol=1e-5, atol=1e-6)
    assert (np.asarray(plain) != order).any(axis=1).sum() > 30
    np.testing.assert_array_equal(plain[14], order[14])


def test_rare_items_are_drawn_to_their_neighbours_and_others_are_not():
    rng = np.random.default_rng(5)
    items, most = 60, TAUGHT + 6  # more neighbours than are looked up
    ids = np.stack([rng.permutation(items)[:most] + 1 for _ in range(items + 1)]).astype(np.int32)
    ids[[0, 7]], ids[9, 2:] = 0, 0
    weights = np.where(ids > 0, rng.uniform(0.1, 1.0, ids.shape), 0.0).astype(np.float32)
    events = rng.integers(0, 50, (items + 1, 1)).astype(np.int32)
    events[[3, 4], 0] = 0, 10**9
    table = rng.normal(size=(items + 1, 8)).astype(np.float32)
    table[0] = 0
    made = np.asarray(shrunk(jnp.asarray(table), Near(*map(jnp.asarray, (ids, weights, events))), 3.0))
    for item, row in enumerate(made):
        near = [(i, w) for i, w in zip(ids[item, :TAUGHT], weights[item, :TAUGHT], strict=True) if i]
        expected = table[item].astype(np.float64)
        if near:
            mean = sum(w * table[i].astype(np.float64) for i, w in near) / sum(float(w) for _, w in near)
            expected = (events[item, 0] * expected + 3 * mean) / (events[item, 0] + 3)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(made[[0, 7]], table[[0, 7]])
    np.testing.assert_allclose(made[4], table[4], rtol=1e-6)
    assert np.abs(made[3] - table[3]).max() > 0.3
