"""The log-sum-exp of scores over the whole catalogue, streamed: positions × catalogue never exists in memory.

It goes over the positions in blocks of Q and, for each, over the catalogue in blocks of C rows, with a running maximum
and sum as flash attention does (Dao et al. 2022; Milakov & Gimelshein 2018). The gradients are computed in the same
pass: a block's probabilities are at hand then, and the weight of each position is known.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dynrec_jax.parallel.blocks import (
    SLICE_AXES,
    TWIN_AXES,
    Blocks,
    Devices,
    in_loop,
    join_positions,
    normaliser,
    on_devices,
    products,
    scores,
    split_positions,
    tiles,
)
from dynrec_jax.parallel.rules import BATCH, ROWS, WHOLE
from dynrec_jax.parallel.table import STRIPED_FROM

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def logsumexp_sum(u_PxD: Array, weight_P: Array, count: Array, table_RxD: Array, blocks: Blocks) -> Array:
    """`Σ_p weight_p · log Σ_i exp(scale · u_p·v_i)` over the items i = 1 .. N.

    Args:
      u_PxD: position vectors, all finite, over the devices as the rows of a batch are. Of each device's, those from
        its `count` on have weight 0, and whole blocks of them cost nothing.
      weight_P: weight of each position; not differentiated.
      count: int32[n], how many positions each of the n devices has; int32[1] on a single one.
      table_RxD: the catalogue, rows over the devices of a slice.
      blocks: sizes of the blocks, the catalogue's size, the scale, and the type of products.

    Returns:
      A scalar, differentiable in `u_PxD` and `table_RxD`.
    """
    specs = (BATCH, BATCH, BATCH, ROWS)
    return on_devices(functools.partial(_value, blocks), specs, WHOLE, u_PxD, weight_P, count, table_RxD)


def _value(blocks: Blocks, devices: Devices, u: Array, weight: Array, count: Array, table: Array) -> Array:
    cut = tiles(table, blocks, devices)
    each = devices.each(blocks, u.shape[0])
    u_BxQxD, w_BxQ = split_positions(u, each), split_positions(weight, each)

    def block(b: Array, total: Array) -> Array:
        u_QxD, w_Q = devices.gather(in_loop(u_BxQxD[b], b, blocks.dtype)), devices.gather(w_BxQ[b])
        z_Q = normaliser(u_QxD, cut, blocks, devices)
        return total + jnp.sum(jnp.where(w_Q != 0, w_Q * z_Q, 0.0))

    total = jax.lax.fori_loop(0, devices.number_of_blocks(count, each), block, jnp.float32(0))
    return devices.add(total, SLICE_AXES)  # in a slice all devices have the same


def _gradients(
    blocks: Blocks, devices: Devices, u: Array, weight: Array, count: Array, table: Array
) -> tuple[Array, Array, Array]:
    """The value and its gradients with respect to `u` and the table, float32."""
    cut = tiles(table, blocks, devices)
    each = devices.each(blocks, u.shape[0])
    u_BxQxD, w_BxQ = split_positions(u, each), split_positions(weight, each)
    by_itself = cut.number == 1 and not devices.several and table.shape[0] < STRIPED_FROM and not blocks.given

    def block(b: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, du_BxQxD, dv_RxD = carry
        u_QxD, w_Q = devices.gather(in_loop(u_BxQxD[b], b, blocks.dtype)), devices.gather(w_BxQ[b])
        if by_itself:
            z_Q, du_QxD, dv_RxD = _whole_catalogue(u_QxD, w_Q, table, dv_RxD, blocks)
        else:
            z_Q = normaliser(u_QxD, cut, blocks, devices)

            def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
                du_QxD, dv_RxD = carry
                s_QxC = scores(u_QxD, cut, index, blocks)
                p_QxC = (jnp.exp(s_QxC - z_Q[:, None]) * w_Q[:, None]).astype(blocks.dtype)
                du, dv = products(p_QxC, u_QxD, cut.block(index), blocks.scale)
                return (du_QxD + du, cut.add(dv_RxD, index, dv)), None

            zero = jnp.zeros(u_QxD.shape, jnp.float32)
            (du_QxD, dv_RxD), _ = jax.lax.scan(step, (zero, dv_RxD), jnp.arange(cut.number))
        total = total + jnp.sum(jnp.where(w_Q != 0, w_Q * z_Q, 0.0))
        return total, du_BxQxD.at[b].set(devices.scatter(du_QxD)), dv_RxD

    start = (jnp.float32(0), jnp.zeros(u_BxQxD.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32))
    number = devices.number_of_blocks(count, each)
    total, du_BxQxD, dv_RxD = jax.lax.fori_loop(0, number, block, start)
    du_PxD = devices.add(join_positions(du_BxQxD, u.shape[0]), TWIN_AXES)
    return devices.add(total, SLICE_AXES), du_PxD, devices.add(dv_RxD, SLICE_AXES)


def _forward(
    u_PxD: Array, weight_P: Array, count: Array, table_RxD: Array, blocks: Blocks
) -> tuple[Array, Any]:
    total, du_PxD, dv_RxD = on_devices(
        functools.partial(_gradients, blocks),
        (BATCH, BATCH, BATCH, ROWS),
        (WHOLE, BATCH, ROWS),
        *(u_PxD, weight_P, count, table_RxD),
    )
    return total, (du_PxD, dv_RxD, u_PxD[:0], table_RxD[:0])


def _backward(blocks: Blocks, saved: Any, g: Array) -> tuple[Array, None, None, Array]:
    du_PxD, dv_RxD, u, table = saved
    return (g * du_PxD).astype(u.dtype), None, None, (g * dv_RxD).astype(table.dtype)


logsumexp_sum.defvjp(_forward, _backward)


def _whole_catalogue(
    u_QxD: Array, w_Q: Array, table_RxD: Array, dv_RxD: Array, blocks: Blocks
) -> tuple[Array, Array, Array]:
    """log-sum-exp [Q] and gradients where one block holds all items: scores serve the sum and the gradient.

    It takes the items' rows alone, so nothing is masked, and brings scale and weights to the narrow sides of the
    products: one pass over the scores (the exponential) instead of four, 0.92 of the time on CPU.
    """
    items = slice(1, blocks.items + 1)
    v_NxD = table_RxD[items].astype(blocks.dtype)
    s_QxN = jnp.einsum("qd,nd->qn", u_QxD, v_NxD, preferred_element_type=jnp.float32)
    top_Q = s_QxN.max(axis=1)
    e_QxN = jnp.exp((s_QxN - top_Q[:, None]) * blocks.scale)
    sum_Q = e_QxN.sum(axis=1)
    weight_Qx1 = (w_Q / sum_Q * blocks.scale)[:, None]
    cast_QxN = e_QxN.astype(blocks.dtype)
    du_QxD = jnp.einsum("qn,nd->qd", cast_QxN, v_NxD, preferred_element_type=jnp.float32) * weight_Qx1
    weighted_QxD = (u_QxD * weight_Qx1).astype(blocks.dtype)
    dv_NxD = jnp.einsum("qd,qn->dn", weighted_QxD, cast_QxN, preferred_element_type=jnp.float32).T
    return top_Q * blocks.scale + jnp.log(sum_Q), du_QxD, dv_RxD.at[items].add(dv_NxD)
