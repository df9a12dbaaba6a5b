"""A step's work on the item table alone, lookup and update, as a program of its own: what scaling it costs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.rows import Clip, RowOptimizer, Touched, update_rows
from dynrec_jax.parallel.rules import constrain, sharding
from dynrec_jax.parallel.table import lookup, lookup_both

Array = jax.Array


def trace_rows(
    mesh: Mesh,
    table: Any,
    state: Any,
    shape: tuple[int, int],
    negatives: int,
    optimizer: RowOptimizer,
    clip_norm: float,
    exchange: Exchange | None,
) -> jax.stages.Traced:
    """Lookup of a batch and its negatives, and the update of all their rows, as a sampled loss needs them.

    Args:
      mesh: of the step.
      table: abstract, [R, D].
      state: the row optimizer's, abstract.
      shape: (B, L + 1) of a batch.
      negatives: K.
      optimizer: of rows.
      clip_norm: as the step's.
      exchange: as the step's.
    """

    def part(table: Array, state: Any, ids_BxL: Array, shared_K: Array) -> tuple[Array, Any, Array, Array]:
        rows_BxLxD, shared_KxD = lookup_both(table, ids_BxL, shared_K, exchange)
        shared_KxD = constrain(shared_KxD, None, None)  # all devices need all negatives
        # Something that stands for the gradients: of their shape, and not known before the lookup.
        touched = Touched(ids_BxL, 0.5 * rows_BxLxD, shared_K, 0.5 * shared_KxD)
        clip, rate = Clip(clip_norm, jnp.float32(1)), jnp.float32(1e-3)
        table, state, square = update_rows(
            table, state, touched, rate, clip, optimizer=optimizer, exchange=exchange
        )
        return table, state, square, shared_KxD

    where = jax.tree.map(lambda x: x.sharding, (table, state))
    with jax.set_mesh(mesh):
        run = jax.jit(
            part,
            in_shardings=(*where, sharding(mesh, "batch", None), sharding(mesh)),
            out_shardings=(*where, sharding(mesh), sharding(mesh)),
            donate_argnums=(0, 1),
        )
        return run.trace(table, state, _ids(*shape), _ids(negatives))


def trace_dense(
    mesh: Mesh, table: Any, shape: tuple[int, int], exchange: Exchange | None
) -> jax.stages.Traced:
    """Lookup of a batch, and its part of the table's gradient, as a full softmax needs them."""

    def part(table: Array, ids_BxL: Array) -> Array:
        rows_BxLxD, back = jax.vjp(lambda table: lookup(table, ids_BxL, exchange), table)
        return back(0.5 * rows_BxLxD)[0]

    with jax.set_mesh(mesh):
        run = jax.jit(
            part,
            in_shardings=(table.sharding, sharding(mesh, "batch", None)),
            out_shardings=table.sharding,
        )
        return run.trace(table, _ids(*shape))


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
