"""Attention of a history over itself, by blocks or tiles, so that `L × L` is never held.

Two schemes with one result. A short history is cut into a few blocks of queries, each scored over all keys on the side
that a traversal looks at: of `n` blocks, some `(n + 1) / 2n` of the products. A long one is cut into square tiles of
queries and keys, visited one after the other with a running maximum and sum, as flash attention does (Dao et al.
2022); tiles on the other side are left out. In the gradient both compute a block's probabilities again, from the saved
normaliser.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

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


class TimeBias(NamedTuple):
    """What the time between two events adds to the score of one for the other: `table[h, time_bucket(gap)]`.

    The gap counts without its sign, so both traversals read the same: time is mirrored in the backward one.

    Attributes:
      table: float32[H, T].
      times: int32[B, L], seconds from 0, so that no difference overflows; not differentiated.
    """

    table: Array
    times: Array


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
    bias: TimeBias | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q_BxHxLxE: Array,
    k_BxHxLxE: Array,
    v_BxHxLxE: Array,
    reach_BxL: Array,
    direction: Direction,
    bias: TimeBias | None = None,
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
      bias: added to the scores; its table is differentiated.

    Returns:
      In the type of `v`; the softmax is computed, and products are added up, in float32.
    """
    return _forward(q_BxHxLxE, k_BxHxLxE, v_BxHxLxE, reach_BxL, direction, bias)[0]


def attention_at(
    q_BxHxE: Array,
    k_BxHxLxE: Array,
    v_BxHxLxE: Array,
    low_B: Array,
    high_B: Array,
    bias: TimeBias | None = None,
    time_B: Array | None = None,
) -> Array:
    """`attention` for a single query of each history, which looks at the positions `low` to `high`: `[B, H, E]`.

    Where there is a bias, `time` is that of the query, int32[B].
    """
    key_L = jnp.arange(k_BxHxLxE.shape[2], dtype=jnp.int32)
    s_BxHx1xK = _product("bhqe,bhke->bhqk", q_BxHxE[:, :, None], k_BxHxLxE)
    if bias is not None:
        if time_B is None:
            raise ValueError("a bias by time needs the time of the query; found none")
        s_BxHx1xK = s_BxHx1xK + _at_pairs(bias.table, _buckets(bias, time_B[:, None], bias.times))
    s_BxHx1xK = _masked(s_BxHx1xK, low_B[:, None], high_B[:, None], key_L)
    return _mean(s_BxHx1xK, v_BxHxLxE)[0][:, :, 0].astype(v_BxHxLxE.dtype)


def bounds(reach_BxL: Array, direction: Direction) -> tuple[Array, Array]:
    """First and last position that each may look at, int32[B, L]."""
    at_BxL = jnp.broadcast_to(jnp.arange(reach_BxL.shape[1], dtype=jnp.int32)[None, :], reach_BxL.shape)
    return (at_BxL - reach_BxL, at_BxL) if direction == "forward" else (at_BxL, at_BxL + reach_BxL)


def time_bucket(gap: Array, buckets: int) -> Array:
    """The bucket of a gap in time, int32 from 0 to `buckets - 1`: `floor(buckets · log2(max(gap, 1)) / 32)`.

    A bucket is `32 / buckets` octaves wide. The logarithm is the straight line between powers of two, in steps of a
    sixteenth, at most 0.15 below the true one; a power of two begins the bucket that the formula says.

    Args:
      gap: int32 seconds from 0 to 2**31 - 1, of any shape.
      buckets: at most 2**22.
    """
    # A float32 is its logarithm: the exponent with the leading bits of the fraction behind the point. Gaps from 2**24
    # up are rounded to 24 bits first. Nothing overflows: the logarithm is 16 · 31 at most.
    bits = jax.lax.bitcast_convert_type(jnp.maximum(gap, 1).astype(jnp.float32), jnp.int32)
    return (((bits >> 19) - 127 * 16) * buckets) >> 9


def _buckets(bias: TimeBias, times_BxQ: Array, times_BxK: Array) -> Array:
    """int32[B, Q, K]."""
    return time_bucket(jnp.abs(times_BxQ[:, :, None] - times_BxK[:, None, :]), bias.table.shape[1])


def _at_pairs(table_HxT: Array, bucket_BxQxK: Array) -> Array:
    """The bias of each pair, float32[B, H, Q, K].

    By a product with ones at the buckets, which a TPU makes on the way to its matrix unit: of a lookup it pads each
    index to a row of its memory, 140 MiB for a tile. On CPU the product takes 26 ms for a tile of 512 × 512, two heads
    and 32 buckets, a lookup 0.4.
    """
    return jax.lax.platform_dependent(table_HxT, bucket_BxQxK, cpu=_looked_up, default=_multiplied)


def _multiplied(table_HxT: Array, bucket_BxQxK: Array) -> Array:
    ones_BxQxKxT = jax.nn.one_hot(bucket_BxQxK, table_HxT.shape[1], dtype=jnp.float32)
    return _product("ht,bqkt->bhqk", table_HxT, ones_BxQxKxT)


def _looked_up(table_HxT: Array, bucket_BxQxK: Array) -> Array:
    return table_HxT.at[:, bucket_BxQxK].get(mode="promise_in_bounds").swapaxes(0, 1)


def _to_table(ds_BxHxQxK: Array, bucket_BxQxK: Array, buckets: int) -> Array:
    """The table's gradient, float32[H, T], from that of the scores; on CPU by adding, in a fifteenth of the time."""
    cpu, default = (functools.partial(way, buckets=buckets) for way in (_added, _ones_product))
    return jax.lax.platform_dependent(ds_BxHxQxK, bucket_BxQxK, cpu=cpu, default=default)


def _ones_product(ds_BxHxQxK: Array, bucket_BxQxK: Array, buckets: int) -> Array:
    ones_BxQxKxT = jax.nn.one_hot(bucket_BxQxK, buckets, dtype=jnp.float32)
    return _product("bhqk,bqkt->ht", ds_BxHxQxK, ones_BxQxKxT)


def _added(ds_BxHxQxK: Array, bucket_BxQxK: Array, buckets: int) -> Array:
    zeros_HxT = jnp.zeros((ds_BxHxQxK.shape[1], buckets), jnp.float32)
    return zeros_HxT.at[:, bucket_BxQxK].add(ds_BxHxQxK.swapaxes(0, 1), mode="promise_in_bounds")


def _mean(s_BxHxQxK: Array, v_BxHxKxE: Array) -> tuple[Array, Array]:
    """The softmax's mean of `v`, float32[B, H, Q, E], and its normaliser, float32[B, H, Q, 1]."""
    top_BxHxQx1 = s_BxHxQxK.max(axis=-1, keepdims=True)
    e_BxHxQxK = jnp.exp(s_BxHxQxK - top_BxHxQx1)
    sum_BxHxQx1 = e_BxHxQxK.sum(axis=-1, keepdims=True)
    y_BxHxQxE = _product("bhqk,bhke->bhqe", e_BxHxQxK.astype(v_BxHxKxE.dtype), v_BxHxKxE)
    # Divided behind the product: E columns instead of K.
    return y_BxHxQxE / sum_BxHxQx1, top_BxHxQx1 + jnp.log(sum_BxHxQx1)


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


def _blocks(length: int, direction: Direction) -> list[_Block]:
    size = min(BLOCK, -(-length // (BLOCKS * 8)) * 8)
    blocks = []
    for start in range(0, length, size):
        queries = _Span(start, min(size, length - start))
        keys = _Span(0, start + queries.size) if direction == "forward" else _Span(start, length - start)
        blocks.append(_Block(queries, keys))
    return blocks


def _block_buckets(bias: TimeBias, at: _Block) -> Array:
    return _buckets(bias, _cut(bias.times, at.queries, 1), _cut(bias.times, at.keys, 1))


def _scores(q: Array, k: Array, given: _Given, at: _Block) -> Array:
    """float32[B, H, Q, K] of a block."""
    s_BxHxQxK = _product("bhqe,bhke->bhqk", _cut(q, at.queries, 2), _cut(k, at.keys, 2))
    if given.bias is not None:
        s_BxHxQxK = s_BxHxQxK + _at_pairs(given.bias.table, _block_buckets(given.bias, at))
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


def _tiles(length: int, direction: Direction) -> np.ndarray:
    """int32[tiles, 2], where queries and keys of each tile start: those that a traversal reaches.

    A query's own tile comes first, so that its running maximum is a score that it may look at from then on.
    """
    side = _side(length)
    number = -(-length // side)
    step = -1 if direction == "forward" else 1
    pairs = [(at, other) for at in range(number) for other in range(at, -1 if step < 0 else number, step)]
    return np.asarray(pairs, np.int32) * side


def _padded(x: Array, axis: int) -> Array:
    """To whole tiles, with zeros: no position looks at them, and what they look at has no gradient."""
    length, side = x.shape[axis], _side(x.shape[axis])
    return jnp.pad(x, [(0, -length % side if at == axis else 0) for at in range(x.ndim)])


def _given(k: Array, reach_BxL: Array, direction: Direction, bias: TimeBias | None, tiled: bool) -> _Given:
    if tiled:
        if direction == "backward":
            # Not beyond the last position: padding follows.
            behind_L = jnp.arange(reach_BxL.shape[1] - 1, -1, -1, dtype=jnp.int32)
            reach_BxL = jnp.minimum(reach_BxL, behind_L[None, :])
        reach_BxL = _padded(reach_BxL, 1)
        bias = None if bias is None else bias._replace(times=_padded(bias.times, 1))
    given = _Given(*bounds(reach_BxL, direction), bias)
    # As if it depended on the keys. In a scan over blocks of the encoder, JAX computes ahead what is the same in each:
    # masks and buckets of all pairs, which are `L × L`.
    return jax.lax.optimization_barrier((given, k))[0]


def _forward(
    q: Array, k: Array, v: Array, reach: Array, direction: Direction, bias: TimeBias | None
) -> tuple[Array, Any]:
    tiled = q.shape[2] > SHORT
    given = _given(k, reach, direction, bias, tiled)
    y, z = (_forward_tiles if tiled else _forward_blocks)(q, k, v, given, direction)
    # In the type of `v` also for the gradient: a float32 copy would be the largest thing kept.
    y, z = checkpoint_name(y.astype(v.dtype), SAVED), checkpoint_name(z, SAVED)
    return y, (q, k, v, reach, bias, y, z)


def _forward_blocks(q: Array, k: Array, v: Array, given: _Given, direction: Direction) -> tuple[Array, Array]:
    means, normalisers = [], []
    for at in _blocks(q.shape[2], direction):
        y_BxHxQxE, z_BxHxQx1 = _mean(_scores(q, k, given, at), _cut(v, at.keys, 2))
        means.append(y_BxHxQxE)
        normalisers.append(z_BxHxQx1)
    return jnp.concatenate(means, axis=2), jnp.concatenate(normalisers, axis=2)


def _forward_tiles(q: Array, k: Array, v: Array, given: _Given, direction: Direction) -> tuple[Array, Array]:
    length, side = q.shape[2], _side(q.shape[2])
    q, k, v = (_padded(x, 2) for x in (q, k, v))

    def visit(carry: Any, start_2: Any) -> tuple[Any, None]:
        at = _Block(_Span(start_2[0], side), _Span(start_2[1], side))
        y_BxHxQxE, top_BxHxQx1, sum_BxHxQx1 = (_cut(x, at.queries, 2) for x in carry)
        s_BxHxQxK = _scores(q, k, given, at)
        higher_BxHxQx1 = jnp.maximum(top_BxHxQx1, s_BxHxQxK.max(axis=-1, keepdims=True))
        e_BxHxQxK = jnp.exp(s_BxHxQxK - higher_BxHxQx1)
        shrink_BxHxQx1 = jnp.exp(top_BxHxQx1 - higher_BxHxQx1)
        part_BxHxQxE = _product("bhqk,bhke->bhqe", e_BxHxQxK.astype(v.dtype), _cut(v, at.keys, 2))
        found = (
            y_BxHxQxE * shrink_BxHxQx1 + part_BxHxQxE,
            higher_BxHxQx1,
            sum_BxHxQx1 * shrink_BxHxQx1 + e_BxHxQxK.sum(axis=-1, keepdims=True),
        )
        y, top, total = (_put(x, part, at.queries) for x, part in zip(carry, found, strict=True))
        return (y, top, total), None

    one = jnp.zeros((*q.shape[:3], 1), jnp.float32)
    start: Any = (jnp.zeros(v.shape, jnp.float32), one + NEVER, one)
    (y, top, total), _ = jax.lax.scan(visit, start, _tiles(length, direction))
    return (y / total)[:, :, :length], (top + jnp.log(total))[:, :, :length]


class _Read(NamedTuple):
    """What the gradient reads: `g` is that of the means, `inner` float32[B, H, L, 1] its product with them."""

    q: Array
    k: Array
    v: Array
    z: Array
    g: Array
    inner: Array


def _gradients(x: _Read, given: _Given, at: _Block) -> tuple[Array, Array, Array, Array | None]:
    """What a block adds to the gradients of its queries, keys and values and of the bias's table, in float32."""
    g_BxHxQxE, z_BxHxQx1, inner_BxHxQx1 = (_cut(each, at.queries, 2) for each in (x.g, x.z, x.inner))
    p_BxHxQxK = jnp.exp(_scores(x.q, x.k, given, at) - z_BxHxQx1)
    dp_BxHxQxK = _product("bhqe,bhke->bhqk", g_BxHxQxE, _cut(x.v, at.keys, 2))
    wide_BxHxQxK = p_BxHxQxK * (dp_BxHxQxK - inner_BxHxQx1)
    ds_BxHxQxK = wide_BxHxQxK.astype(x.q.dtype)
    dq = _product("bhqk,bhke->bhqe", ds_BxHxQxK, _cut(x.k, at.keys, 2))
    dk = _product("bhqk,bhqe->bhke", ds_BxHxQxK, _cut(x.q, at.queries, 2))
    dv = _product("bhqk,bhqe->bhke", p_BxHxQxK.astype(x.v.dtype), g_BxHxQxE)
    if given.bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, _to_table(wide_BxHxQxK, _block_buckets(given.bias, at), given.bias.table.shape[1])


def _backward(direction: Direction, saved: Any, g: Array) -> tuple[Array, Array, Array, None, Any]:
    q, k, v, reach, bias, y, z = saved
    # Σ_k p_k dp_k is g·y: one column to a query instead of a pass over all scores.
    inner = (g.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    tiled = q.shape[2] > SHORT
    given = _given(k, reach, direction, bias, tiled)
    read = _Read(q, k, v, z, g, inner)
    dq, dk, dv, table = (_backward_tiles if tiled else _backward_blocks)(read, given, direction)
    none: Any = None  # integers have no gradient
    d_bias = None if bias is None else TimeBias(table, none)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), none, d_bias


def _backward_blocks(x: _Read, given: _Given, direction: Direction) -> tuple[Any, ...]:
    dq, dk, dv = [], jnp.zeros(x.k.shape, jnp.float32), jnp.zeros(x.v.shape, jnp.float32)
    table: Any = None if given.bias is None else jnp.zeros(given.bias.table.shape, jnp.float32)
    for at in _blocks(x.q.shape[2], direction):
        dq_BxHxQxE, dk_BxHxKxE, dv_BxHxKxE, part = _gradients(x, given, at)
        dq.append(dq_BxHxQxE)
        dk, dv = _add(dk, dk_BxHxKxE, at.keys), _add(dv, dv_BxHxKxE, at.keys)
        table = table if part is None else table + part
    return jnp.concatenate(dq, axis=2), dk, dv, table


def _backward_tiles(x: _Read, given: _Given, direction: Direction) -> tuple[Any, ...]:
    length, side = x.q.shape[2], _side(x.q.shape[2])
    x = _Read(*(_padded(each, 2) for each in x))

    def visit(carry: Any, start_2: Any) -> tuple[Any, None]:
        at = _Block(_Span(start_2[0], side), _Span(start_2[1], side))
        dq, dk, dv, table = carry
        dq_BxHxQxE, dk_BxHxKxE, dv_BxHxKxE, part = _gradients(x, given, at)
        dk, dv = _add(dk, dk_BxHxKxE, at.keys), _add(dv, dv_BxHxKxE, at.keys)
        return (_add(dq, dq_BxHxQxE, at.queries), dk, dv, None if part is None else table + part), None

    start: Any = [jnp.zeros(each.shape, jnp.float32) for each in (x.q, x.k, x.v)]
    start.append(None if given.bias is None else jnp.zeros(given.bias.table.shape, jnp.float32))
    (dq, dk, dv, table), _ = jax.lax.scan(visit, tuple(start), _tiles(length, direction))
    return dq[:, :, :length], dk[:, :, :length], dv[:, :, :length], table


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


attention.defvjp(_forward, _backward)
