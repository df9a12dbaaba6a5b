"""Merging of gradients, and the optimizers that move touched rows alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynrec_jax.parallel.exchange import merge as merge_rows
from dynrec_jax.parallel.rows import RowOptimizer, lazy_adam, rowwise_adagrad, told_apart

ROWS, DIM = 12, 4
OPTIMIZERS = {"adam": lazy_adam(0.9, 0.98), "adagrad": rowwise_adagrad()}


def gradients(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def start(optimizer: RowOptimizer) -> tuple[jax.Array, object]:
    table = jnp.asarray(gradients(99, ROWS))
    return table, optimizer.init(table)


def merge(ids: jax.Array, g: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Padding is none, as a step says it."""
    row_M, g_MxD = merge_rows(jnp.where(ids == 0, rows, ids), g, rows)
    return told_apart(row_M, rows), g_MxD


@pytest.mark.parametrize(
    "ids",
    [[5, 2, 5, 0, 2, 2, 11], [0, 0, 0], [7], [1, 2, 3], [4, 4, 4, 4]],
    ids=["mixed", "pad", "one", "own", "same"],
)
def test_merge_sums_by_row_and_drops_padding(ids: list[int]):
    g = np.round(8 * gradients(1, len(ids)))  # whole numbers: their sums are exact in any order
    merged, summed = (np.asarray(x) for x in merge(jnp.asarray(ids), jnp.asarray(g), ROWS))
    expected = np.zeros((ROWS, DIM))
    np.add.at(expected, ids, g)
    kept = merged < ROWS
    assert sorted(merged[kept]) == sorted(set(ids) - {0}), "each touched row once, and never padding"
    assert (np.diff(merged) > 0).all(), "ascending, and no number twice: optimizers tell the devices so"
    np.testing.assert_array_equal(summed[kept], expected[merged[kept]])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_are_not_named_stay_bit_for_bit(name: str):
    optimizer = OPTIMIZERS[name]
    table, state = start(optimizer)
    before = np.asarray(table)
    update = jax.jit(optimizer.update)
    for seed in range(3):
        ids, g = merge(jnp.asarray([9, 3, 0, 3]), jnp.asarray(gradients(seed, 4)), ROWS)
        table, state = update(table, state, ids, g, jnp.float32(0.1))
    moved = (np.asarray(table) != before).any(axis=1)
    assert np.nonzero(moved)[0].tolist() == [3, 9]
    for leaf in jax.tree.leaves(state):
        touched = np.asarray(leaf).reshape(ROWS, -1).any(axis=1)
        assert np.nonzero(touched)[0].tolist() == [3, 9]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_moves_by_its_own_history_whatever_others_do(name: str):
    """Row 3 is named every second time among others: it moves as if it were alone."""
    optimizer = OPTIMIZERS[name]
    update = jax.jit(optimizer.update)
    together, alone = start(optimizer), start(optimizer)
    for seed in range(4):
        g = gradients(seed, 2)
        ids = [5, 3] if seed % 2 else [5, 0]
        together = update(*together, *merge(jnp.asarray(ids), jnp.asarray(g), ROWS), jnp.float32(0.1))
        if seed % 2:
            alone = update(*alone, *merge(jnp.asarray([0, 3]), jnp.asarray(g), ROWS), jnp.float32(0.1))
    np.testing.assert_array_equal(together[0][3], alone[0][3])


def test_rowwise_adagrad_is_its_formula():
    table, state = start(OPTIMIZERS["adagrad"])
    update = jax.jit(OPTIMIZERS["adagrad"].update)
    expected, total = np.asarray(table, np.float64), np.zeros(ROWS)
    for seed in range(4):
        ids, g = [2, 7, 2, 0, 5 + seed], gradients(seed, 5)
        table, state = update(table, state, *merge(jnp.asarray(ids), jnp.asarray(g), ROWS), jnp.float32(0.3))
        summed = np.zeros((ROWS, DIM))
        np.add.at(summed, ids, g)
        summed[0] = 0.0
        total += (summed**2).mean(axis=1)
        expected -= 0.3 * summed / (np.sqrt(total) + 1e-8)[:, None]
    np.testing.assert_allclose(table, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(state, total, rtol=1e-6)


def test_lazy_adam_is_adam_where_every_row_is_touched():
    """Optax's Adam of the whole table; the ids come in another order each time, one of them twice."""
    table, state = start(OPTIMIZERS["adam"])
    update = jax.jit(OPTIMIZERS["adam"].update)
    adam = optax.adam(0.05, b1=0.9, b2=0.98)
    expected, adam_state = table[1:], adam.init(table[1:])
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(np.arange(1, ROWS))
        ids, g = np.concatenate([order, order[:1]]), gradients(seed, ROWS)
        table, state = update(table, state, *merge(jnp.asarray(ids), jnp.asarray(g), ROWS), jnp.float32(0.05))
        summed = np.zeros((ROWS, DIM), np.float32)
        np.add.at(summed, ids, g)
        updates, adam_state = adam.update(jnp.asarray(summed[1:]), adam_state)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(table[1:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padding_never_moves(name: str):
    optimizer = OPTIMIZERS[name]
    table, state = start(optimizer)
    ids, g = merge(jnp.asarray([0, 0, 4]), jnp.asarray(1e3 * gradients(0, 3)), ROWS)
    after, _ = optimizer.update(table, state, ids, g, jnp.float32(1.0))
    np.testing.assert_array_equal(after[0], table[0])
    assert (np.asarray(after[4]) != np.asarray(table[4])).any()
