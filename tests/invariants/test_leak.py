"""Time never leaks: what a traversal has not read yet has no influence at all, not even a small one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models.bstm import Bstm
from dynrec_jax.models.user_encoder import Direction, Moments

from .. import tiny

ITEMS = 20
# Two histories and a place of padding in one row of L = 8.
ROW = tiny.batch([[(1, [3, 7, 1, 9]), (2, [4, 4, 12])]], 8)
WINDOWS = (range(0, 4), range(4, 7))
CASES = [(block, hops) for block in ("prenorm", "seed") for hops in (0, 1)]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def make(block: str, hops: int) -> tuple[Callable[[Direction, Any], Any], Any]:
    """A function from (direction, vectors of the row's items) to what is scored at each place; and the vectors."""
    model, params, tables = tiny.bstm(ITEMS, model__block=block, model__hops=hops, model__layers=2)
    table_RxD = model.catalogue(params, tables)

    def queries(direction: Direction, rows_1xLxD: Any) -> Any:
        positions = ROW.positions if direction == "forward" else ROW.remaining
        u_1xLxD = model.user_vectors(params, rows_1xLxD, Moments(ROW.segments, positions), direction)
        return model.abra.query(u_1xLxD[0], table_RxD)

    return queries, table_RxD[ROW.items]


def may_see(direction: Direction) -> np.ndarray:
    """bool[L, L], written out by hand: place t (row) may depend on place s (column)."""
    allowed = np.zeros((8, 8), bool)
    for window in WINDOWS:
        for t in window:
            for s in window:
                allowed[t, s] = s <= t if direction == "forward" else s >= t
    return allowed


@pytest.mark.parametrize(("block", "hops"), CASES)
def test_the_gradient_with_respect_to_what_is_not_read_is_exactly_zero(block: str, hops: int):
    queries, rows_1xLxD = make(block, hops)
    jacobians = jax.jit(lambda x: [jax.jacrev(lambda y, d=d: queries(d, y))(x) for d in DIRECTIONS])(
        rows_1xLxD
    )
    for direction, jacobian in zip(DIRECTIONS, jacobians, strict=True):
        depends_LxL = (np.asarray(jacobian)[:, :, 0] != 0).any(axis=(1, 3))
        real = np.arange(8) < 7
        assert np.array_equal(depends_LxL[real], may_see(direction)[real]), direction
        # Padding may look at itself or at nothing; no history looks at it.
        assert not depends_LxL[:7, 7].any()


@pytest.mark.parametrize(("block", "hops"), CASES)
def test_other_later_items_leave_earlier_outputs_bit_identical(block: str, hops: int):
    queries, rows_1xLxD = make(block, hops)
    run = jax.jit(lambda x: [queries(d, x) for d in DIRECTIONS])
    before = run(rows_1xLxD)
    for t in range(7):
        # All that place t may not see in either direction is replaced, once for each direction.
        for at, direction in enumerate(DIRECTIONS):
            hidden_L = ~may_see(direction)[t]
            noise = 100.0 * jax.random.normal(jax.random.key(t), rows_1xLxD.shape)
            changed = jnp.where(hidden_L[None, :, None], noise, rows_1xLxD)
            after = np.asarray(run(changed)[at])
            assert np.array_equal(after[t], np.asarray(before[at])[t]), (direction, t)
            assert not np.array_equal(after, np.asarray(before[at])), "the change must be felt somewhere"


def lists(model: Bstm, params: Any, tables: Any, histories: np.ndarray) -> Any:
    """Recommendations after histories, int32[B, L]."""
    table_RxD = model.catalogue(params, tables)
    seen = jnp.zeros((len(histories), 1), jnp.int32)
    return model.recommend(params, table_RxD[histories], jnp.asarray(histories), table_RxD, seen, 5)


@pytest.mark.parametrize("block", ["prenorm", "seed"])
def test_padding_behind_a_history_is_not_read(block: str):
    """A history in a wider row gives the same vector: padding on the right is no event."""
    model, params, tables = tiny.bstm(ITEMS, model__block=block)
    narrow = np.array([[5, 2, 8, 0, 0]])
    wide = np.array([[5, 2, 8, 0, 0, 0, 0, 0]])
    run = jax.jit(lambda h: lists(model, params, tables, h).scores)
    np.testing.assert_allclose(run(narrow), run(wide), rtol=1e-6)
