"""ABRA's mixture of the whole catalogue, streamed as the log-sum-exp is (see `stream`)."""

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
from dynrec_jax.parallel.compressed import Table
from dynrec_jax.parallel.mesh import row_pieces
from dynrec_jax.parallel.rules import BATCH, ROWS

Array = jax.Array


def mixture(u_PxD: Array, table_RxD: Table, blocks: Blocks, count: Array | None = None) -> Array:
    """`r_p = Σ_i softmax_i(scale · u_p·v_i) v_i`, `[P, D]`; differentiable in both arrays, if the table is one.

    Args:
      u_PxD: position vectors, over the devices as the rows of a batch are.
      table_RxD: the catalogue, rows over the devices of a slice.
      blocks: sizes of the blocks, the catalogue's size, the scale, and the type of products.
      count: int32[n], how many positions each of the n devices has, the first of those that it holds; blocks behind
        them cost nothing and their mixture is 0. None: all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    number, pieces = u_PxD.shape[0], 1 if mesh.empty else row_pieces(mesh)
    with jax.named_scope("mixture"):
        if count is not None:
            return _mixture(u_PxD, count, table_RxD, blocks)
        u_PxD = jnp.pad(u_PxD, ((0, -number % pieces), (0, 0)))
        count = jnp.full((pieces,), u_PxD.shape[0] // pieces, jnp.int32)
        return _mixture(u_PxD, count, table_RxD, blocks)[:number]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mixture(u: Array, count: Array, table: Table, blocks: Blocks) -> Array:
    return _forward(u, count, table, blocks)[0]


def _forward(u: Array, count: Array, table: Table, blocks: Blocks) -> tuple[Array, Any]:
    r_PxD, z_P = on_devices(
        functools.partial(_mix, blocks),
        (BATCH, BATCH, ROWS),
        (BATCH, BATCH),
        *(u, count, table),
    )
    return r_PxD, (u, count, table, z_P, r_PxD)


def _mix(blocks: Blocks, devices: Devices, u: Array, count: Array, table: Table) -> tuple[Array, Array]:
    """The mixtures [P, D] and the normalisers [P]."""
    cut = tiles(table, blocks, devices)
    each = devices.each(blocks, u.shape[0])
    u_BxQxD = split_positions(u, each)

    def block(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        r_BxQxD, z_BxQ = carry
        u_QxD = devices.gather(in_loop(u_BxQxD[b], b, blocks.dtype))
        z_Q = normaliser(u_QxD, cut, blocks, devices)

        def step(r_QxD: Array, index: Array) -> tuple[Array, None]:
            p_QxC = jnp.exp(scores(u_QxD, cut, index, blocks) - z_Q[:, None]).astype(blocks.dtype)
            part = jnp.einsum("qc,cd->qd", p_QxC, cut.block(index), preferred_element_type=jnp.float32)
            return r_QxD + part, None

        r_QxD, _ = jax.lax.scan(step, jnp.zeros(u_QxD.shape, jnp.float32), jnp.arange(cut.number))
        return r_BxQxD.at[b].set(devices.scatter(r_QxD)), z_BxQ.at[b].set(devices.own(z_Q, each))

    start = (jnp.zeros(u_BxQxD.shape, jnp.float32), jnp.zeros(u_BxQxD.shape[:2], jnp.float32))
    r_BxQxD, z_BxQ = jax.lax.fori_loop(0, devices.number_of_blocks(count, each), block, start)
    r_PxD = devices.add(join_positions(r_BxQxD, u.shape[0]), TWIN_AXES)
    return r_PxD.astype(u.dtype), join_positions(z_BxQ, u.shape[0])


def _backward(blocks: Blocks, saved: Any, g_PxD: Array) -> tuple[Array, None, Array]:
    u, count, table, z_P, r_PxD = saved
    du_PxD, dv_RxD = on_devices(
        functools.partial(_gradients, blocks),
        (BATCH, BATCH, ROWS, BATCH, BATCH, BATCH),
        (BATCH, ROWS),
        *(u, count, table, z_P, r_PxD, g_PxD),
    )
    return du_PxD, None, dv_RxD


def _gradients(
    blocks: Blocks,
    devices: Devices,
    u: Array,
    count: Array,
    table: Array,
    z_P: Array,
    r_PxD: Array,
    g_PxD: Array,
) -> tuple[Array, Array]:
    cut = tiles(table, blocks, devices)
    each = devices.each(blocks, u.shape[0])
    u_BxQxD, z_BxQ, r_BxQxD, g_BxQxD = (split_positions(x, each) for x in (u, z_P, r_PxD, g_PxD))

    def block(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        du_BxQxD, dv_RxD = carry
        inner_Q = devices.gather(jnp.sum(g_BxQxD[b] * r_BxQxD[b], axis=-1))
        u_QxD, g_QxD = (devices.gather(x_BxQxD[b].astype(blocks.dtype)) for x_BxQxD in (u_BxQxD, g_BxQxD))
        z_Q = devices.gather(z_BxQ[b])

        def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
            du_QxD, dv_RxD = carry
            v_CxD = cut.block(index)
            p_QxC = jnp.exp(scores(u_QxD, cut, index, blocks) - z_Q[:, None])
            along_QxC = jnp.einsum("qd,cd->qc", g_QxD, v_CxD, preferred_element_type=jnp.float32)
            ds_QxC = (p_QxC * (along_QxC - inner_Q[:, None])).astype(blocks.dtype)
            du, dv = products(ds_QxC, u_QxD, v_CxD, blocks.scale)
            dv = dv + jnp.einsum(
                "qc,qd->cd", p_QxC.astype(blocks.dtype), g_QxD, preferred_element_type=jnp.float32
            )
            return (du_QxD + du, cut.add(dv_RxD, index, dv)), None

        zero = jnp.zeros(u_QxD.shape, jnp.float32)
        (du_QxD, dv_RxD), _ = jax.lax.scan(step, (zero, dv_RxD), jnp.arange(cut.number))
        return du_BxQxD.at[b].set(devices.scatter(du_QxD)), dv_RxD

    start = (jnp.zeros(u_BxQxD.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32))
    du_BxQxD, dv_RxD = jax.lax.fori_loop(0, devices.number_of_blocks(count, each), block, start)
    du_PxD = devices.add(join_positions(du_BxQxD, u.shape[0]), TWIN_AXES)
    return du_PxD.astype(u.dtype), devices.add(dv_RxD, SLICE_AXES).astype(table.dtype)


_mixture.defvjp(_forward, _backward)
