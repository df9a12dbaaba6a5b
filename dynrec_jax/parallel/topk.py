"""The k best items of the whole catalogue, streamed by blocks of rows and merged over devices.

Equal scores rank by the lowest item index, in every block and every merge: `lax.top_k` prefers the earlier
element, and blocks and devices are joined in the order of their rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dynrec_jax.parallel.rules import ITEM_AXES

Array = jax.Array


def top_k(
    u_BxD: Array, table_RxD: Array, seen_BxM: Array, *, k: int, items: int, scale: float, rows: int
) -> tuple[Array, Array]:
    """The k best items by `scale · u·v_i`, without those of `seen`.

    Args:
      u_BxD: query vectors.
      table_RxD: the catalogue, rows over all devices of the mesh.
      seen_BxM: int32 item indices to leave out; 0 names none.
      k: length of the list, at most `items`.
      items: N; rows 1 .. N are items.
      scale: what multiplies u·v.
      rows: catalogue rows scored at a time.

    Returns:
      ids int32[B, k], best first, and their scores float32[B, k]. Where fewer than k items are left, the list
      ends in the id 0 with the score -inf.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_local, k=k, items=items, scale=scale, rows=rows)
    if mesh.empty or mesh.size == 1:
        return local(u_BxD, table_RxD, seen_BxM, first=jnp.int32(0))

    def inside(u_BxD: Array, table_RxD: Array, seen_BxM: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index(ITEM_AXES) * table_RxD.shape[0]
        found = local(u_BxD, table_RxD, seen_BxM, first=first)
        # Each device merges its share of the queries, so that lists travel once and not to everybody.
        ids, scores = (
            jax.lax.all_to_all(x_BxK, ITEM_AXES, split_axis=0, concat_axis=1, tiled=True) for x_BxK in found
        )
        return _best(ids, scores, k)

    whole, table, spread = PartitionSpec(), PartitionSpec(ITEM_AXES), PartitionSpec(ITEM_AXES)
    merged = jax.shard_map(inside, in_specs=(whole, table, whole), out_specs=spread, check_vma=False)
    batch = u_BxD.shape[0]
    more = (0, -batch % mesh.size), (0, 0)
    ids_BxK, scores_BxK = merged(jnp.pad(u_BxD, more), table_RxD, jnp.pad(seen_BxM, more))
    return ids_BxK[:batch], scores_BxK[:batch]


def _local(
    u_BxD: Array,
    table_RxD: Array,
    seen_BxM: Array,
    *,
    first: Array,
    k: int,
    items: int,
    scale: float,
    rows: int,
) -> tuple[Array, Array]:
    """Top k of the rows at hand, whose global numbers start at `first`."""
    batch, total = u_BxD.shape[0], table_RxD.shape[0]
    number = -(-total // rows)
    size = -(-total // number)
    each_B = jnp.arange(batch)[:, None]

    def block(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        # The last block starts early enough to be full, so that the table is never copied; what it shares with the
        # block before is left out here.
        own = jnp.minimum(index * size, total - size)
        v_CxD = jax.lax.dynamic_slice_in_dim(table_RxD, own, size)
        s_BxC = jnp.einsum("bd,cd->bc", u_BxD, v_CxD, preferred_element_type=jnp.float32) * scale
        start = first + own
        row_C = start + jnp.arange(size)
        real_C = (row_C >= 1) & (row_C <= items) & (row_C >= first + index * size)
        s_BxC = jnp.where(real_C[None, :], s_BxC, -jnp.inf)
        # Negative places would count from the end: send what lies before this block behind it.
        place_BxM = jnp.where(seen_BxM >= start, seen_BxM - start, size)
        s_BxC = s_BxC.at[each_B, place_BxM].set(-jnp.inf, mode="drop")
        if number == 1 and size >= k:
            best_BxK, place_BxK = jax.lax.top_k(s_BxC, k)
            return (_named(start + place_BxK, best_BxK), best_BxK), None
        best_BxK, place_BxK = jax.lax.top_k(jnp.concatenate([carry[1], s_BxC], axis=1), k)
        kept_BxK = jnp.take_along_axis(carry[0], jnp.minimum(place_BxK, k - 1), axis=1)
        ids_BxK = jnp.where(place_BxK < k, kept_BxK, start + place_BxK - k)
        return (_named(ids_BxK, best_BxK), best_BxK), None

    empty = (jnp.zeros((batch, k), jnp.int32), jnp.full((batch, k), -jnp.inf, jnp.float32))
    if number == 1:
        return block(empty, jnp.int32(0))[0]
    return jax.lax.scan(block, empty, jnp.arange(number))[0]


def _best(ids: Array, scores: Array, k: int) -> tuple[Array, Array]:
    best_BxK, place_BxK = jax.lax.top_k(scores, k)
    ids_BxK = jnp.take_along_axis(ids, place_BxK, axis=1)
    return _named(ids_BxK, best_BxK), best_BxK


def _named(ids: Array, scores: Array) -> Array:
    """The ids; 0 where the score says that there is no item."""
    return jnp.where(jnp.isneginf(scores), 0, ids)
