"""Item tables: `float[R, D]`, one row an item, and which row that is.

Neither the number of rows nor an item's row depends on the mesh, so that a checkpoint opens on any other. In a small
table the row of item i is row i. A large one lies over many devices in contiguous pieces, and popular items, whose
numbers may be neighbours, must not all have the same owner: there item i lies in strip `i mod STRIPS`, and the strips
follow each other in the order of their reversed bits, so that over any power of two of devices the owner goes by
`i mod devices`. Row 0 is padding; rows of no item are zero and never used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROWS_MULTIPLE = 256  # tables divide over any power of two of devices up to so many
STRIPED_FROM = 2**16  # rows; smaller tables keep the order of the items
STRIP_BITS = 12
STRIPS = 2**STRIP_BITS


def rows_for(items: int) -> int:
    """Rows of a table for N items and the padding row, rounded up to `ROWS_MULTIPLE`, or `STRIPS` of a large one."""
    rows = -(-(items + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return rows if rows < STRIPED_FROM else -(-rows // STRIPS) * STRIPS


def rows_of(ids: Any, rows: int) -> Any:
    """The row of each item index, int32 of any shape, NumPy's or JAX's, in a table of so many rows."""
    if rows < STRIPED_FROM:
        return ids
    return _reversed(ids & (STRIPS - 1)) * (rows // STRIPS) + (ids >> STRIP_BITS)


def ids_of(row: Any, rows: int) -> Any:
    """The item index of each row: undoes `rows_of`."""
    if rows < STRIPED_FROM:
        return row
    strip = rows // STRIPS
    return (row % strip << STRIP_BITS) + _reversed(row // strip)


def _reversed(strip: Any) -> Any:
    """The strip's number with its bits in the opposite order."""
    mirrored = strip & 0
    for _ in range(STRIP_BITS):
        mirrored = (mirrored << 1) | (strip & 1)
        strip = strip >> 1
    return mirrored


def lookup(table_RxD: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of item indices (any shape): `[..., D]`. They must lie in 0 .. R-1; padding gives row 0."""
    with jax.named_scope("lookup"):
        return jnp.take(table_RxD, rows_of(ids, table_RxD.shape[0]), axis=0, mode="clip")


def merge(ids_M: jax.Array, gradients_MxD: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Sums gradients of the same row, so that an optimizer sees each touched row once.

    Returns:
      ids int32[M] without repeats and their summed gradients [M, D]; places left over, and padding, carry the
      id `rows`, which updates drop.
    """
    order = jnp.argsort(ids_M)
    ids_M, gradients_MxD = ids_M[order], gradients_MxD[order]
    first_M = jnp.concatenate([jnp.ones((1,), bool), ids_M[1:] != ids_M[:-1]])
    segment_M = jnp.cumsum(first_M) - 1
    count = ids_M.shape[0]
    summed_MxD = jax.ops.segment_sum(gradients_MxD, segment_M, num_segments=count, indices_are_sorted=True)
    merged_M = jnp.full((count,), rows, jnp.int32).at[segment_M].set(ids_M.astype(jnp.int32))
    return jnp.where(merged_M == 0, rows, merged_M), summed_MxD * (merged_M != 0)[:, None]


class RowOptimizer(NamedTuple):
    """An optimizer that moves touched rows alone.

    Attributes:
      init: table [R, D] -> state.
      update: (table, state, ids, gradients, learning rate) -> (table, state), with `ids` as `merge` gives them.
        Rows that are not named neither move nor decay.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rowwise_adagrad(epsilon: float = 1e-8) -> RowOptimizer:
    """Adagrad with one accumulator a row: the mean of its squared gradients (Duchi et al. 2011, per row)."""

    def init(table_RxD: jax.Array) -> jax.Array:
        return jnp.zeros((table_RxD.shape[0],), jnp.float32)

    def update(table: jax.Array, state: jax.Array, ids: jax.Array, grads: jax.Array, rate: jax.Array) -> Any:
        state = state.at[ids].add(jnp.mean(jnp.square(grads), axis=-1), mode="drop")
        seen = state.at[ids].get(mode="fill", fill_value=1.0)
        table = table.at[ids].add(-rate * grads / (jnp.sqrt(seen) + epsilon)[:, None], mode="drop")
        return table, state

    return RowOptimizer(init, update)


class AdamRows(NamedTuple):
    """First and second moments [R, D] and the number of updates of each row [R]."""

    mean: jax.Array
    square: jax.Array
    updates: jax.Array


def lazy_adam(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> RowOptimizer:
    """Adam (Kingma & Ba 2015) on touched rows; moments and bias correction count a row's own updates."""

    def init(table_RxD: jax.Array) -> AdamRows:
        zeros = jnp.zeros(table_RxD.shape, jnp.float32)
        return AdamRows(zeros, zeros, jnp.zeros((table_RxD.shape[0],), jnp.int32))

    def update(table: jax.Array, state: AdamRows, ids: jax.Array, grads: jax.Array, rate: jax.Array) -> Any:
        mean = beta1 * state.mean.at[ids].get(mode="fill", fill_value=0.0) + (1 - beta1) * grads
        square = beta2 * state.square.at[ids].get(mode="fill", fill_value=0.0) + (1 - beta2) * grads**2
        count = state.updates.at[ids].get(mode="fill", fill_value=0) + 1
        t = count.astype(jnp.float32)[:, None]
        step = (mean / (1 - beta1**t)) / (jnp.sqrt(square / (1 - beta2**t)) + epsilon)
        table = table.at[ids].add((-rate * step).astype(table.dtype), mode="drop")
        state = AdamRows(
            state.mean.at[ids].set(mean, mode="drop"),
            state.square.at[ids].set(square, mode="drop"),
            state.updates.at[ids].set(count, mode="drop"),
        )
        return table, state

    return RowOptimizer(init, update)
