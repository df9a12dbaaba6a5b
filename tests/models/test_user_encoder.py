"""The user encoder: which way it looks, and that packing and direction are what they are said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models.attention import Direction, attention
from dynrec_jax.models.user_encoder import Moments, moments

from .. import tiny

WINDOW = [4, 9, 2, 7, 7]


def test_the_mask_looks_one_way_within_a_window():
    batch = tiny.batch([[(2, [1, 1, 1]), (5, [1, 1])]], 6)
    equal_1x1x6x1, own_1x1x6x6 = jnp.zeros((1, 1, 6, 1)), jnp.eye(6)[None, None]

    def looked_at(direction: Direction) -> np.ndarray:
        reach = batch.positions if direction == "forward" else batch.remaining
        weights = attention(equal_1x1x6x1, equal_1x1x6x1, own_1x1x6x6, reach, direction)
        return (np.asarray(weights)[0, 0] > 0).astype(int)

    forward = looked_at("forward")
    assert forward[:5].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
    ]
    assert not forward[:5, 5].any(), "padding is looked at by no event"
    assert looked_at("backward").tolist() == forward.T.tolist()


def test_moments_of_rows_with_one_history():
    at = moments(jnp.asarray([[5, 6, 0], [0, 0, 0]]))
    assert np.asarray(at.segments).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert np.asarray(at.positions).tolist() == [[0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("block", ["prenorm", "seed"])
def test_packed_histories_give_the_vectors_they_give_alone(block: str):
    model, params, tables = tiny.bstm(20, model__block=block, model__dropout=0.4)
    packed = tiny.batch([[(2, [3, 1]), (1, WINDOW)], []], 8)
    alone = tiny.batch([[(1, WINDOW)], [(2, [3, 1])]], 8)

    @jax.jit
    def vectors(items, segments, positions):
        rows = tables["item_id"][items]
        return model.user_vectors(params, rows, Moments(segments, positions), "forward", jax.random.key(1))

    a = np.asarray(vectors(packed.items, packed.segments, packed.positions))
    b = np.asarray(vectors(alone.items, alone.segments, alone.positions))
    np.testing.assert_allclose(a[0, 2:7], b[0, :5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a[0, :2], b[1, :2], rtol=1e-5, atol=1e-6)


def test_backward_is_forward_over_the_reversed_history_but_for_the_direction_vector():
    model, params, tables = tiny.bstm(20)
    items, reverse = jnp.asarray([WINDOW]), jnp.asarray([WINDOW[::-1]])
    segments, up = jnp.ones((1, 5), jnp.int32), jnp.arange(5, dtype=jnp.int32)[None]
    swapped = jax.tree.map(lambda x: x, params)
    swapped["user"]["direction"] = params["user"]["direction"][::-1]

    @jax.jit
    def both():
        rows, rows_reverse = tables["item_id"][items], tables["item_id"][reverse]
        backward = model.user_vectors(params, rows, Moments(segments, up[:, ::-1]), "backward")
        forward = model.user_vectors(swapped, rows_reverse, Moments(segments, up), "forward")
        plain = model.user_vectors(params, rows_reverse, Moments(segments, up), "forward")
        return backward[:, ::-1], forward, plain

    backward, forward, plain = (np.asarray(x) for x in both())
    np.testing.assert_allclose(backward, forward, rtol=1e-5, atol=1e-6)
    assert np.abs(forward - plain).max() > 1e-3, "the direction vector tells the traversals apart"


def test_the_order_of_a_history_matters():
    model, params, tables = tiny.bstm(20)
    items = jnp.asarray([[4, 9, 2, 7], [9, 4, 2, 7]])
    u = np.asarray(jax.jit(lambda: model.last_vector(params, tables["item_id"][items], items))())
    assert np.abs(u[0] - u[1]).max() > 1e-3


def test_the_last_vector_is_that_of_the_last_event():
    model, params, tables = tiny.bstm(20)
    items = jnp.asarray([[4, 9, 2, 0], [4, 9, 2, 7], [0, 0, 0, 0]])

    @jax.jit
    def run():
        rows = tables["item_id"][items]
        return model.last_vector(params, rows, items), model.user_vectors(params, rows, moments(items))

    last, every = (np.asarray(x) for x in run())
    # Two routes: the last block makes one vector of each history here, and all of them there.
    # Some of the last bits: values are about 1.
    np.testing.assert_allclose(last[0], every[0, 2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(last[1], every[1, 3], rtol=0, atol=1e-6)
    assert not last[2].any(), "an empty history says nothing"
