"""Attention of a history over itself, by blocks or tiles, so that `L × L` is never held.

Two schemes with one result. A short history is cut into a few blocks of queries, each scored over all keys on the side
that a traversal looks at: of `n` blocks, some `(n + 1) / 2n` of the products. A long one is cut into square tiles of
queries and keys, visited one after the other with a running maximum and sum, as flash attention does (Dao et al.
2022); tiles on the other side, and tiles outside of a window, are left out. In the gradient both compute a block's
weights again, from the saved normaliser.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dynrec_jax.models.bias import Bias, Pairs, add_bias, bias_gradient

Array = jax.Array
Direction = Literal["forward", "backward"]

# Blocks of a short history, and queries of a block at most. On CPU at L 200, four blocks take 0.63 of the time of one
# product over all of L × L with autodiff's gradient, two 0.68.
BLOCKS, BLOCK = 4, 512
# Positions of a history that is still cut into blocks. On CPU tiles take 1.20 of the blocks' time at L 640, 0.76 at
# 768 and 0.67 at 2,048.
SHORT = 700
TILE = 512  # queries of a tile at most, and as many keys
ALIGN = 128  # what the sides of tiles divide by, where they are that long: the lanes of a TPU
NEVER = -1e30  # a score whose exponential is 0, and whose differences are finite
SAVED = "products"  # `checkpoint_name` of what is worth keeping for the gradient


class _Span(NamedTuple):
    """A piece of the length; a start that is no Python integer is known to the device alone."""

    start: Any
    size: int


class _Block(NamedTuple):
    """Queries that are scored together, and the keys that any of them may look at."""

    queries: _Span
    keys: _Span


class _Given(NamedTuple):
    """What attention reads besides queries, keys and values; `low` and `high` are those of `bounds`."""

    low: Array
    high: Array
    bias: Bias | None


class Way(NamedTuple):
    """How attention looks: known before anything runs.

    Attributes:
      direction: of the traversal.
      window: positions that any query looks at, at most, so that no others need be scored; 0: no bound is known.
      pointwise: weights are `silu(score)` each for itself, instead of the softmax.
    """

    direction: Direction
    window: int = 0
    pointwise: bool = False


def attention(
    q_BxHxLxE: Array,
    k_BxHxLxE: Array,
    v_BxHxLxE: Array,
    reach_BxL: Array,
    way: Way,
    bias: Bias | None = None,
) -> Array:
    """Each position's mean of `v`, weighted by the softmax of `q·k` over what it may look at: `[B, H, L, E]`.

    Forward, a position looks at itself and at `reach` positions before it; backward, at itself and at `reach`
    positions behind it. Pointwise, it is the sum of `silu(q·k) v` over what it may look at, divided by how many these
    are (HSTU, Zhai et al. 2024).

    Args:
      q_BxHxLxE: queries, scaled already.
      k_BxHxLxE: keys.
      v_BxHxLxE: values.
      reach_BxL: int32[B, L], from 0, less than `way.window` where there is one; not differentiated.
      way: direction, window and weights.
      bias: added to the scores; its tables are differentiated.

    Returns:
      In the type of `v`; weights are computed, and products are added up, in float32.
    """
    y_BxHxLxE = _attention(q_BxHxLxE, k_BxHxLxE, v_BxHxLxE, reach_BxL, way, bias)
    if not way.pointwise:
        return y_BxHxLxE
    low_BxL, high_BxL = bounds(reach_BxL, way.direction)
    count_BxL = jnp.minimum(high_BxL, reach_BxL.shape[1] - 1) - jnp.maximum(low_BxL, 0) + 1
    return (y_BxHxLxE / count_BxL[:, None, :, None]).astype(v_BxHxLxE.dtype)


def attention_at(
    q_BxHxE: Array,
    k_BxHxKxE: Array,
    v_BxHxKxE: Array,
    inside_BxK: Array,
    added_BxHxK: Array | None = None,
    pointwise: bool = False,
) -> Array:
    """`attention` for a single query of each history, `[B, H, E]`.

    Args:
      q_BxHxE: queries, scaled already.
      k_BxHxKxE: keys.
      v_BxHxKxE: values.
      inside_BxK: bool, the keys that each looks at, one at least.
      added_BxHxK: what the bias adds to the scores.
      pointwise: see `Way`.
    """
    s_BxHx1xK = _product("bhqe,bhke->bhqk", q_BxHxE[:, :, None], k_BxHxKxE)
    if added_BxHxK is not None:
        s_BxHx1xK = s_BxHx1xK + added_BxHxK[:, :, None]
    s_BxHx1xK = jnp.where(inside_BxK[:, None, None], s_BxHx1xK, NEVER)
    if pointwise:
        count_B = inside_BxK.sum(axis=1)
        y_BxHx1xE = _weighed(jax.nn.silu(s_BxHx1xK), v_BxHxKxE) / count_B[:, None, None, None]
    else:
        y_BxHx1xE = _mean(s_BxHx1xK, v_BxHxKxE)[0]
    return y_BxHx1xE[:, :, 0].astype(v_BxHxKxE.dtype)


def bounds(reach_BxL: Array, direction: Direction) -> tuple[Array, Array]:
    """First and last position that each may look at, int32[B, L]."""
    at_BxL = jnp.broadcast_to(jnp.arange(reach_BxL.shape[1], dtype=jnp.int32)[None, :], reach_BxL.shape)
    return (at_BxL - reach_BxL, at_BxL) if direction == "forward" else (at_BxL, at_BxL + reach_BxL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, reach: Array, way: Way, bias: Bias | None) -> Array:
    """As `attention`, but pointwise not divided by the count."""
    return _forward(q, k, v, reach, way, bias)[0]


def _mean(s_BxHxQxK: Array, v_BxHxKxE: Array) -> tuple[Array, Array]:
    """The softmax's mean of `v`, float32[B, H, Q, E], and its normaliser, float32[B, H, Q, 1]."""
    top_BxHxQx1 = s_BxHxQxK.max(axis=-1, keepdims=True)
    e_BxHxQxK = jnp.exp(s_BxHxQxK - top_BxHxQx1)
    sum_BxHxQx1 = e_BxHxQxK.sum(axis=-1, keepdims=True)
    # Divided behind the product: E columns instead of K.
    return _weighed(e_BxHxQxK, v_BxHxKxE) / sum_BxHxQx1, top_BxHxQx1 + jnp.log(sum_BxHxQx1)


def _weighed(w_BxHxQxK: Array, v_BxHxKxE: Array) -> Array:
    """Sums of `v`, float32[B, H, Q, E]."""
    return _product("bhqk,bhke->bhqe", w_BxHxQxK.astype(v_BxHxKxE.dtype), v_BxHxKxE)


def _cut(x: Array, span: _Span, axis: int) -> Array:
    if isinstance(span.start, int):
        return jax.lax.slice_in_dim(x, span.start, span.start + span.size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, span.start, span.size, axis)


def _put(whole: Array, part: Array, span: _Span) -> Array:
    """`[B, H, L, …]` with a piece of its length written over, in place in a loop."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part, span.start, 2)


def _add(whole: Array, part: Array, span: _Span) -> Array:
    if isinstance(span.start, int):
        return whole.at[:, :, span.start : span.start + span.size].add(part)
    return _put(whole, _cut(whole, span, 2) + part, span)


def _blocks(length: int, way: Way) -> list[_Block]:
    size = min(BLOCK, -(-length // (BLOCKS * 8)) * 8)
    beyond = (
        way.window - 1 if way.window else length
    )  # positions of a block's first or last query's own sight
    blocks = []
    for start in range(0, length, size):
        queries = _Span(start, min(size, length - start))
        end = start + queries.size
        first, last = (start - beyond, end) if way.direction == "forward" else (start, end + beyond)
        first, last = max(first, 0), min(last, length)
        blocks.append(_Block(queries, _Span(first, last - first)))
    return blocks


def _pairs(bias: Bias, at: _Block) -> Pairs:
    ahead = at.queries.start - at.keys.start
    if bias.time is None:
        return Pairs(None, None, ahead)
    return Pairs(_cut(bias.asked, at.queries, 1), _cut(bias.times, at.keys, 1), ahead)


def _scores(q: Array, k: Array, given: _Given, at: _Block) -> Array:
    """float32[B, H, Q, K] of a block."""
    s_BxHxQxK = _product("bhqe,bhke->bhqk", _cut(q, at.queries, 2), _cut(k, at.keys, 2))
    if given.bias is not None:
        s_BxHxQxK = add_bias(s_BxHxQxK, given.bias, _pairs(given.bias, at))
    key_K = at.keys.start + jnp.arange(at.keys.size, dtype=jnp.int32)
    return _masked(s_BxHxQxK, _cut(given.low, at.queries, 1), _cut(given.high, at.queries, 1), key_K)


def _masked(s_BxHxQxK: Array, low_BxQ: Array, high_BxQ: Array, key_K: Array) -> Array:
    """The scores, NEVER outside of each query's bounds.

    Two numbers of the query's own: comparing the segments of query and key instead costs XLA on CPU its vector
    instructions, also for the exponential that it is fused into, which then takes six times as long.
    """
    key_1x1xK = key_K[None, None, :]
    inside_BxQxK = (low_BxQ[..., None] <= key_1x1xK) & (key_1x1xK <= high_BxQ[..., None])
    return jnp.where(inside_BxQxK[:, None], s_BxHxQxK, NEVER)


def _side(length: int) -> int:
    """Positions of a tile's side: as few beyond the length as can be, of which there are none if it divides."""
    number = -(-length // TILE)
    return min(TILE, -(-length // (number * ALIGN)) * ALIGN)


def _tiles(length: int, way: Way) -> np.ndarray:
    """int32[tiles, 2], where queries and keys of each tile start: those that a traversal reaches.

    A query's own tile comes first, so that its running maximum is a score that it may look at from then on.
    """
    side = _side(length)
    number = -(-length // side)
    # Tiles on either side of a query's own that its window reaches into: its last query looks back least.
    beyond = -(-(way.window - 1) // side) if way.window else number
    step = -1 if way.direction == "forward" else 1
    pairs = []
    for at in range(number):
        end = max(at - beyond - 1, -1) if step < 0 else min(at + beyond + 1, number)
        pairs += [(at, other) for other in range(at, end, step)]
    return np.asarray(pairs, np.int32) * side


def _padded(x: Array, axis: int) -> Array:
    """To whole tiles, with zeros: no position looks at them, and what they look at has no gradient."""
    length, side = x.shape[axis], _side(x.shape[axis])
    return jnp.pad(x, [(0, -length % side if at == axis else 0) for at in range(x.ndim)])


def _given(k: Array, reach_BxL: Array, way: Way, bias: Bias | None, tiled: bool) -> _Given:
    if tiled:
        if way.direction == "backward":
            # Not beyond the last position: padding follows.
            behind_L = jnp.arange(reach_BxL.shape[1] - 1, -1, -1, dtype=jnp.int32)
            reach_BxL = jnp.minimum(reach_BxL, behind_L[None, :])
        reach_BxL = _padded(reach_BxL, 1)
        if bias is not None and bias.time is not None:
            bias = bias._replace(asked=_padded(bias.asked, 1), times=_padded(bias.times, 1))
    given = _Given(*bounds(reach_BxL, way.direction), bias)
    # As if it depended on the keys. In a scan over blocks of the encoder, JAX computes ahead what is the same in each:
    # masks and buckets of all pairs, which are `L × L`.
    return jax.lax.optimization_barrier((given, k))[0]


def _forward(q: Array, k: Array, v: Array, reach: Array, way: Way, bias: Bias | None) -> tuple[Array, Any]:
    tiled = q.shape[2] > SHORT
    given = _given(k, reach, way, bias, tiled)
    y, z = (_forward_tiles if tiled else _forward_blocks)(q, k, v, given, way)
    # In the type of `v` also for the gradient: a float32 copy would be the largest thing kept.
    y = checkpoint_name(y.astype(v.dtype), SAVED)
    z = None if z is None else checkpoint_name(z, SAVED)
    return y, (q, k, v, reach, bias, y, z)


def _forward_blocks(q: Array, k: Array, v: Array, given: _Given, way: Way) -> tuple[Array, Array | None]:
    sums, normalisers = [], []
    for at in _blocks(q.shape[2], way):
        s_BxHxQxK, v_BxHxKxE = _scores(q, k, given, at), _cut(v, at.keys, 2)
        if way.pointwise:
            sums.append(_weighed(jax.nn.silu(s_BxHxQxK), v_BxHxKxE))
            continue
        y_BxHxQxE, z_BxHxQx1 = _mean(s_BxHxQxK, v_BxHxKxE)
        sums.append(y_BxHxQxE)
        normalisers.append(z_BxHxQx1)
    return jnp.concatenate(sums, axis=2), jnp.concatenate(normalisers, axis=2) if normalisers else None


def _forward_tiles(q: Array, k: Array, v: Array, given: _Given, way: Way) -> tuple[Array, Array | None]:
    length, side = q.shape[2], _side(q.shape[2])
    q, k, v = (_padded(x, 2) for x in (q, k, v))

    def add(carry: Any, start_2: Any) -> tuple[Any, None]:
        at = _Block(_Span(start_2[0], side), _Span(start_2[1], side))
        part_BxHxQxE = _weighed(jax.nn.silu(_scores(q, k, given, at)), _cut(v, at.keys, 2))
        return _add(carry, part_BxHxQxE, at.queries), None

    def visit(carry: Any, start_2: Any) -> tuple[Any, None]:
        at = _Block(_Span(start_2[0], side), _Span(start_2[1], side))
        y_BxHxQxE, top_BxHxQx1, sum_BxHxQx1 = (_cut(x, at.queries, 2) for x in carry)
        s_BxHxQxK = _scores(q, k, given, at)
        higher_BxHxQx1 = jnp.maximum(top_BxHxQx1, s_BxHxQxK.max(axis=-1, keepdims=True))
        e_BxHxQxK = jnp.exp(s_BxHxQxK - higher_BxHxQx1)
        shrink_BxHxQx1 = jnp.exp(top_BxHxQx1 - higher_BxHxQx1)
        found = (
            y_BxHxQxE * shrink_BxHxQx1 + _weighed(e_BxHxQxK, _cut(v, at.keys, 2)),
            higher_BxHxQx1,
            sum_BxHxQx1 * shrink_BxHxQx1 + e_BxHxQxK.sum(axis=-1, keepdims=True),
        )
        y, top, total = (_put(x, part, at.queries) for x, part in zip(carry, found, strict=True))
        return (y, top, total), None

    zeros, tiles = jnp.zeros(v.shape, jnp.float32), _tiles(length, way)
    if way.pointwise:
        return jax.lax.scan(add, zeros, tiles)[0][:, :, :length], None
    one = jnp.zeros((*q.shape[:3], 1), jnp.float32)
    start: Any = (zeros, one + NEVER, one)
    (y, top, total), _ = jax.lax.scan(visit, start, tiles)
    return (y / total)[:, :, :length], (top + jnp.log(total))[:, :, :length]


class _Read(NamedTuple):
    """What the gradient reads: `g` is that of the means, `inner` float32[B, H, L, 1] its product with them.

    Pointwise there is neither a normaliser `z` nor `inner`.
    """

    q: Array
    k: Array
    v: Array
    g: Array
    z: Array | None
    inner: Array | None


def _gradients(x: _Read, given: _Given, at: _Block) -> tuple[Array, Array, Array, Any]:
    """What a block adds to the gradients of its queries, keys and values and of the bias's tables, in float32."""
    g_BxHxQxE = _cut(x.g, at.queries, 2)
    s_BxHxQxK = _scores(x.q, x.k, given, at)
    dp_BxHxQxK = _product("bhqe,bhke->bhqk", g_BxHxQxE, _cut(x.v, at.keys, 2))
    if x.z is None or x.inner is None:
        gate_BxHxQxK = jax.nn.sigmoid(s_BxHxQxK)
        p_BxHxQxK = s_BxHxQxK * gate_BxHxQxK
        wide_BxHxQxK = dp_BxHxQxK * (gate_BxHxQxK + p_BxHxQxK * (1.0 - gate_BxHxQxK))
    else:
        p_BxHxQxK = jnp.exp(s_BxHxQxK - _cut(x.z, at.queries, 2))
        wide_BxHxQxK = p_BxHxQxK * (dp_BxHxQxK - _cut(x.inner, at.queries, 2))
    ds_BxHxQxK = wide_BxHxQxK.astype(x.q.dtype)
    dq = _product("bhqk,bhke->bhqe", ds_BxHxQxK, _cut(x.k, at.keys, 2))
    dk = _product("bhqk,bhqe->bhke", ds_BxHxQxK, _cut(x.q, at.queries, 2))
    dv = _product("bhqk,bhqe->bhke", p_BxHxQxK.astype(x.v.dtype), g_BxHxQxE)
    if given.bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, bias_gradient(wide_BxHxQxK, given.bias, _pairs(given.bias, at))


def _no_tables(bias: Bias | None) -> Any:
    """Zeros to add the gradients of the bias's tables to."""
    if bias is None:
        return None
    return tuple(None if x is None else jnp.zeros(x.shape, jnp.float32) for x in (bias.time, bias.distance))


def _backward(way: Way, saved: Any, g: Array) -> tuple[Array, Array, Array, None, Any]:
    q, k, v, reach, bias, y, z = saved
    inner = None
    if not way.pointwise:
        # Σ_k p_k dp_k is g·y: one column to a query instead of a pass over all scores.
        inner = (g.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    tiled = q.shape[2] > SHORT
    given = _given(k, reach, way, bias, tiled)
    read = _Read(q, k, v, g, z, inner)
    dq, dk, dv, tables = (_backward_tiles if tiled else _backward_blocks)(read, given, way)
    none: Any = None  # integers have no gradient
    d_bias = None if bias is None else Bias(tables[0], none, none, tables[1])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), none, d_bias


def _backward_blocks(x: _Read, given: _Given, way: Way) -> tuple[Any, ...]:
    dq, dk, dv = [], jnp.zeros(x.k.shape, jnp.float32), jnp.zeros(x.v.shape, jnp.float32)
    tables = _no_tables(given.bias)
    for at in _blocks(x.q.shape[2], way):
        dq_BxHxQxE, dk_BxHxKxE, dv_BxHxKxE, parts = _gradients(x, given, at)
        dq.append(dq_BxHxQxE)
        dk, dv = _add(dk, dk_BxHxKxE, at.keys), _add(dv, dv_BxHxKxE, at.keys)
        tables = jax.tree.map(jnp.add, tables, parts)
    return jnp.concatenate(dq, axis=2), dk, dv, tables


def _backward_tiles(x: _Read, given: _Given, way: Way) -> tuple[Any, ...]:
    length, side = x.q.shape[2], _side(x.q.shape[2])
    x = jax.tree.map(lambda each: _padded(each, 2), x)

    def visit(carry: Any, start_2: Any) -> tuple[Any, None]:
        at = _Block(_Span(start_2[0], side), _Span(start_2[1], side))
        dq, dk, dv, tables = carry
        dq_BxHxQxE, dk_BxHxKxE, dv_BxHxKxE, parts = _gradients(x, given, at)
        dk, dv = _add(dk, dk_BxHxKxE, at.keys), _add(dv, dv_BxHxKxE, at.keys)
        return (_add(dq, dq_BxHxQxE, at.queries), dk, dv, jax.tree.map(jnp.add, tables, parts)), None

    start: Any = [jnp.zeros(each.shape, jnp.float32) for each in (x.q, x.k, x.v)]
    start.append(_no_tables(given.bias))
    (dq, dk, dv, tables), _ = jax.lax.scan(visit, tuple(start), _tiles(length, way))
    return dq[:, :, :length], dk[:, :, :length], dv[:, :, :length], tables


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


_attention.defvjp(_forward, _backward)
