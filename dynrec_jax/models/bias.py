"""What attention adds to the score of one event for another: by the time between them, and by the events between them.

Both count without sign, so both traversals read the same: time is mirrored in the backward one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Bias(NamedTuple):
    """Added to the score of query i for key j: `time[h, time_bucket(|asked_i - times_j|)] + distance[h, |i - j|]`.

    Attributes:
      time: float32[H, T]; None where time does not count.
      asked: int32[B, Q], moments of the queries, in seconds from 0, so that no difference overflows.
      times: int32[B, K], moments of the keys.
      distance: float32[H, P]; None where distance does not count. Its last column is that of all distances from
        `P - 1` on.
    """

    time: Array | None = None
    asked: Any = None
    times: Any = None
    distance: Array | None = None


class Pairs(NamedTuple):
    """The moments of some queries and of some keys, and where they stand in the history.

    Attributes:
      asked: int32[B, Q]; None where time does not count.
      times: int32[B, K].
      ahead: by how many positions the first query stands behind the first key; an integer, or one on the device.
    """

    asked: Any
    times: Any
    ahead: Array | int


def time_bucket(gap: Array, buckets: int) -> Array:
    """The bucket of a gap in time, int32 from 0 to `buckets - 1`: `floor(buckets · log2(gap + 1) / 32)`.

    A bucket is `32 / buckets` octaves wide, and events of the same second are apart from those of two seconds where
    there are 32 buckets or more. The logarithm is the straight line between powers of two, in steps of a sixteenth, at
    most 0.15 below the true one; one less than a power of two begins the bucket that the formula says.

    Args:
      gap: int32 seconds from 0 to 2**31 - 1, of any shape.
      buckets: at most 2**22.
    """
    # A float32 is its logarithm: the exponent with the leading bits of the fraction behind the point. Gaps from 2**24
    # up are rounded to 24 bits first. Nothing overflows: the logarithm is 16 · 31 at most.
    more = jnp.clip(gap, 0, 2**31 - 2) + 1
    bits = jax.lax.bitcast_convert_type(more.astype(jnp.float32), jnp.int32)
    return (((bits >> 19) - 127 * 16) * buckets) >> 9


def add_bias(s_BxHxQxK: Array, bias: Bias, at: Pairs) -> Array:
    """The scores of some pairs, with their bias."""
    if bias.time is not None:
        s_BxHxQxK = s_BxHxQxK + _at_pairs(bias.time, _buckets(bias.time, at))
    if bias.distance is not None:
        s_BxHxQxK = s_BxHxQxK + _by_distance(bias.distance, s_BxHxQxK.shape[2:], at.ahead)[None]
    return s_BxHxQxK


def bias_gradient(ds_BxHxQxK: Array, bias: Bias, at: Pairs) -> tuple[Array | None, Array | None]:
    """The gradients of both tables from that of the scores of some pairs, in float32."""
    time = distance = None
    if bias.time is not None:
        time = _to_table(ds_BxHxQxK, _buckets(bias.time, at), bias.time.shape[1])
    if bias.distance is not None:
        distance = _to_distance(ds_BxHxQxK.sum(axis=0), bias.distance.shape[1], at.ahead)
    return time, distance


def time_bias_of(bias: Bias, asked_B: Array, times_BxK: Array) -> Array:
    """What a single query of each history adds by time, float32[B, H, K]."""
    assert bias.time is not None
    pairs = Pairs(asked_B[:, None], times_BxK, 0)
    return _at_pairs(bias.time, _buckets(bias.time, pairs))[:, :, 0]


def distance_bias_of(bias: Bias, distance_BxK: Array) -> Array:
    """What a single query of each history adds by distance, float32[B, H, K]."""
    assert bias.distance is not None
    return _at_pairs(bias.distance, jnp.minimum(distance_BxK, bias.distance.shape[1] - 1)[:, None])[:, :, 0]


def _buckets(table_HxT: Array, at: Pairs) -> Array:
    """int32[B, Q, K]."""
    return time_bucket(jnp.abs(at.asked[:, :, None] - at.times[:, None, :]), table_HxT.shape[1])


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


def _diagonals(queries: int, keys: int, last: int, ahead: Array | int) -> Array:
    """int32[Q + K], the distance along each diagonal of a block: of diagonal j, keys stand `j - (Q - 1)` ahead."""
    offset_M = jnp.arange(queries + keys, dtype=jnp.int32) - (queries - 1)
    return jnp.minimum(jnp.abs(ahead - offset_M), last)


def _by_distance(table_HxP: Array, shape: tuple[int, ...], ahead: Array | int) -> Array:
    """The bias of each pair of a block, float32[H, Q, K]: equal along its diagonals.

    Without a lookup for each pair: the diagonals' numbers, repeated, come one to the left in each row when the rows are
    cut one shorter than they are.
    """
    queries, keys = shape
    size = queries + keys
    w_HxM = table_HxP[:, _diagonals(queries, keys, table_HxP.shape[1] - 1, ahead)]
    heads = w_HxM.shape[0]
    flat = jnp.broadcast_to(w_HxM[:, None], (heads, queries, size)).reshape(heads, queries * size)
    rows_HxQxN = flat[:, : queries * (size - 1)].reshape(heads, queries, size - 1)
    return rows_HxQxN[:, :, queries - 1 : queries - 1 + keys]


def _to_distance(ds_HxQxK: Array, distances: int, ahead: Array | int) -> Array:
    """The table's gradient, float32[H, P]: `_by_distance` transposed."""
    heads, queries, keys = ds_HxQxK.shape
    size = queries + keys
    rows_HxQxN = jnp.pad(ds_HxQxK, ((0, 0), (0, 0), (queries - 1, 0)))
    flat = jnp.pad(rows_HxQxN.reshape(heads, queries * (size - 1)), ((0, 0), (0, queries)))
    w_HxM = flat.reshape(heads, queries, size).sum(axis=1)
    at_M = _diagonals(queries, keys, distances - 1, ahead)
    return jnp.zeros((heads, distances), jnp.float32).at[:, at_M].add(w_HxM)


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
