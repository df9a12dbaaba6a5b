"""Several vectors of a user: each target trains the nearest one, and what is served is the best one's score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.errors import ConfigError
from dynrec_jax.models.bstm import Rows
from dynrec_jax.models.user_encoder import moments

from .. import tiny

ITEMS, K = 30, 3
HISTORIES = np.array([[3, 7, 1, 9, 0, 0, 0, 0], [4, 4, 12, 5, 6, 7, 8, 2]], np.int32)


def made(**changes):
    model, params, tables = tiny.bstm(ITEMS, model__interests=K, **changes)
    return model, tiny.shaken(params), tables


@pytest.mark.parametrize("normalise", [False, True])
def test_an_item_scores_what_the_interest_gives_that_likes_it_best(normalise: bool):
    model, params, tables = made(model__normalise=normalise)
    seen = jnp.asarray([[3, 7], [0, 12]])

    @jax.jit
    def run():
        table = model.ready(tables["item_id"])
        history = History(jnp.asarray(HISTORIES))
        rows = tables["item_id"][HISTORIES]
        u = model.last_vector(params, rows, history)
        every = model.user_vectors(params, rows, moments(history))
        return u, every, table, model.recommend(params, rows, history, table, seen, 10)

    u, every, table, answer = jax.tree.map(np.asarray, run())
    assert u.shape == (2, K * 8)
    np.testing.assert_allclose(u, every[[0, 1], [3, 7]], rtol=1e-5, atol=1e-5)
    each = u.reshape(2, K, 8).astype(np.float64)
    if normalise:
        each /= np.linalg.norm(each, axis=-1, keepdims=True)
    scores = (each @ table[1 : ITEMS + 1].T.astype(np.float64)).max(axis=1) * model.abra.scale
    scores[0, [2, 6]] = scores[1, 11] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    assert np.array_equal(answer.ids, order + 1)
    np.testing.assert_allclose(answer.scores, np.take_along_axis(scores, order, axis=1), rtol=1e-5, atol=1e-5)
    assert len({*np.argmax(each @ table[1 : ITEMS + 1].T, axis=1).ravel().tolist()}) == K, (
        "each is the best of some"
    )


def test_equal_scores_rank_by_the_lowest_item_over_all_interests():
    model, _, _ = made()
    table = jnp.ones((model.abra.items + 8 - ITEMS % 8, 8))[: ITEMS + 2]
    table = jnp.ones((32, 8))
    ids, scores = jax.jit(lambda: model.abra.best(jnp.ones((1, K * 8)), table, jnp.asarray([[1, 2]]), 5))()
    assert ids.tolist() == [[3, 4, 5, 6, 7]]
    assert len(set(scores[0].tolist())) == 1
    ids, scores = jax.jit(lambda: model.abra.best(jnp.ones((1, K * 8)), table, jnp.arange(1, 29)[None], 5))()
    assert ids.tolist() == [[29, 30, 0, 0, 0]]
    assert np.isneginf(scores[0, 2:]).all()


def test_a_target_trains_the_interest_that_scores_it_highest_alone():
    model, params, tables = made(model__backward_weight=0.0)
    batch = tiny.batch([[(1, [3, 7])]], 9)
    rows = Rows(items={"item_id": tables["item_id"][batch.items]}, catalogue={"item_id": tables["item_id"]})

    @jax.jit
    def run():
        gradient = jax.grad(lambda p: model.loss(p, rows, batch, None, jax.random.key(0))[0])(params)
        u = model.last_vector(params, tables["item_id"][jnp.asarray([[3]])], History(jnp.asarray([[3]])))
        return gradient["user"]["interests"]["kernel"], u, tables["item_id"][7]

    kernel_DxIxD, u, target = (np.asarray(x) for x in run())
    best = int((u.reshape(K, 8) @ target).argmax())
    moved = [bool(kernel_DxIxD[:, i].any()) for i in range(K)]
    assert moved == [i == best for i in range(K)]


def test_interests_are_neither_refined_nor_summed():
    with pytest.raises(ConfigError, match="neither refined nor summed"):
        tiny.config(model__interests=2, model__hops=1)
