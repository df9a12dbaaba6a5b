"""Attention of a history over itself, by blocks of queries, so that `L × L` is never held.

A traversal looks at one side alone, so a block of queries needs the keys on that side only: of `n` blocks, some
`(n + 1) / 2n` of the products. The gradient computes a block's probabilities again from the saved normaliser, as flash
attention does (Dao et al. 2022).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Direction = Literal["forward", "backward"]

# Blocks of a history that is long enough, and queries of a block at most. On CPU at L 200, four blocks take 0.63 of the
# time of one product over all of L × L with autodiff's gradient, two 0.68.
BLOCKS, BLOCK = 4, 512
NEVER = -1e30  # a score whose exponential is 0, and whose differences are finite


class _Block(NamedTuple):
    """Queries that are scored together, and the keys that any of them may look at."""

    queries: slice
    keys: slice


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q_BxHxLxE: Array, k_BxHxLxE: Array, v_BxHxLxE: Array, reach_BxL: Array, direction: Direction
) -> Array:
    """Each position's mean of `v`, weighted by the softmax of `q·k` over what it may look at: `[B, H, L, E]`.

    Forward, a position looks at itself and at `reach` positions before it; backward, at itself and at `reach`
    positions behind it.

    Args:
      q_BxHxLxE: queries, scaled already.
      k_BxHxLxE: keys.
      v_BxHxLxE: values.
      reach_BxL: int32[B, L], from 0; not differentiated.
      direction: of the traversal.

    Returns:
      In the type of `v`; the softmax is computed in float32.
    """
    return _forward(q_BxHxLxE, k_BxHxLxE, v_BxHxLxE, reach_BxL, direction)[0]


def attention_at(q_BxHxE: Array, k_BxHxLxE: Array, v_BxHxLxE: Array, low_B: Array, high_B: Array) -> Array:
    """`attention` for a single query of each history, which looks at the positions `low` to `high`: `[B, H, E]`."""
    s_BxHx1xK = _product("bhqe,bhke->bhqk", q_BxHxE[:, :, None], k_BxHxLxE)
    s_BxHx1xK = _masked(s_BxHx1xK, low_B[:, None], high_B[:, None], slice(0, k_BxHxLxE.shape[2]))
    return _mean(s_BxHx1xK, v_BxHxLxE)[0][:, :, 0].astype(v_BxHxLxE.dtype)


def _mean(s_BxHxQxK: Array, v_BxHxKxE: Array) -> tuple[Array, Array]:
    """The softmax's mean of `v`, float32[B, H, Q, E], and its normaliser, float32[B, H, Q, 1]."""
    top_BxHxQx1 = s_BxHxQxK.max(axis=-1, keepdims=True)
    e_BxHxQxK = jnp.exp(s_BxHxQxK - top_BxHxQx1)
    sum_BxHxQx1 = e_BxHxQxK.sum(axis=-1, keepdims=True)
    y_BxHxQxE = _product("bhqk,bhke->bhqe", e_BxHxQxK.astype(v_BxHxKxE.dtype), v_BxHxKxE)
    # Divided behind the product: E columns instead of K.
    return y_BxHxQxE / sum_BxHxQx1, top_BxHxQx1 + jnp.log(sum_BxHxQx1)


def bounds(reach_BxL: Array, direction: Direction) -> tuple[Array, Array]:
    """First and last position that each may look at, int32[B, L]."""
    at_BxL = jnp.broadcast_to(jnp.arange(reach_BxL.shape[1], dtype=jnp.int32)[None, :], reach_BxL.shape)
    return (at_BxL - reach_BxL, at_BxL) if direction == "forward" else (at_BxL, at_BxL + reach_BxL)


def _blocks(length: int, direction: Direction) -> list[_Block]:
    size = min(BLOCK, -(-length // (BLOCKS * 8)) * 8)
    cuts = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    if direction == "forward":
        return [_Block(cut, slice(0, cut.stop)) for cut in cuts]
    return [_Block(cut, slice(cut.start, length)) for cut in cuts]


def _scores(q: Array, k: Array, bounds_BxL: tuple[Array, Array], at: _Block) -> Array:
    """float32[B, H, Q, K] of a block."""
    q_BxHxQxE, k_BxHxKxE = q[:, :, at.queries], k[:, :, at.keys]
    s_BxHxQxK = _product("bhqe,bhke->bhqk", q_BxHxQxE, k_BxHxKxE)
    low_BxQ, high_BxQ = (bound_BxL[:, at.queries] for bound_BxL in bounds_BxL)
    return _masked(s_BxHxQxK, low_BxQ, high_BxQ, at.keys)


def _masked(s_BxHxQxK: Array, low_BxQ: Array, high_BxQ: Array, keys: slice) -> Array:
    """The scores, NEVER outside of each query's bounds.

    Two numbers of the query's own: comparing the segments of query and key instead costs XLA on CPU its vector
    instructions, also for the exponential that it is fused into, which then takes six times as long.
    """
    key_1x1xK = jnp.arange(keys.start, keys.stop, dtype=jnp.int32)[None, None, :]
    inside_BxQxK = (low_BxQ[..., None] <= key_1x1xK) & (key_1x1xK <= high_BxQ[..., None])
    return jnp.where(inside_BxQxK[:, None], s_BxHxQxK, NEVER)


def _forward(q: Array, k: Array, v: Array, reach: Array, direction: Direction) -> tuple[Array, Any]:
    means, normalisers = [], []
    bounds_BxL = bounds(reach, direction)
    for at in _blocks(q.shape[2], direction):
        y_BxHxQxE, z_BxHxQx1 = _mean(_scores(q, k, bounds_BxL, at), v[:, :, at.keys])
        means.append(y_BxHxQxE)
        normalisers.append(z_BxHxQx1)
    y, z = jnp.concatenate(means, axis=2), jnp.concatenate(normalisers, axis=2)
    return y.astype(v.dtype), (q, k, v, reach, y, z)


def _backward(direction: Direction, saved: Any, g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, reach, y, z = saved
    bounds_BxL = bounds(reach, direction)
    # Σ_k p_k dp_k is g·y: one column to a query instead of a pass over all scores.
    inner_BxHxLx1 = (g.astype(jnp.float32) * y).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for at in _blocks(q.shape[2], direction):
        g_BxHxQxE = g[:, :, at.queries]
        p_BxHxQxK = jnp.exp(_scores(q, k, bounds_BxL, at) - z[:, :, at.queries])
        dp_BxHxQxK = _product("bhqe,bhke->bhqk", g_BxHxQxE, v[:, :, at.keys])
        ds_BxHxQxK = (p_BxHxQxK * (dp_BxHxQxK - inner_BxHxLx1[:, :, at.queries])).astype(q.dtype)
        dq.append(_product("bhqk,bhke->bhqe", ds_BxHxQxK, k[:, :, at.keys]))
        dk = dk.at[:, :, at.keys].add(_product("bhqk,bhqe->bhke", ds_BxHxQxK, q[:, :, at.queries]))
        dv = dv.at[:, :, at.keys].add(_product("bhqk,bhqe->bhke", p_BxHxQxK.astype(v.dtype), g_BxHxQxE))
    return jnp.concatenate(dq, axis=2).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


attention.defvjp(_forward, _backward)
