"""The k best items of the whole catalogue, streamed by blocks of rows and merged over devices.

Equal scores rank by the lowest item index, in every block and every merge. A device goes over its rows in the order of
their items, and `lax.top_k` prefers the earlier element; so a block's items come behind all those of the blocks before
it. Devices are joined in the order of their rows where that is the order of items, and by (score, index) where it is
not. Queries lie over the slices, each of which has the whole catalogue.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dynrec_jax.parallel.blocks import SLICE_AXES, Devices, in_turn, on_devices
from dynrec_jax.parallel.compressed import Table
from dynrec_jax.parallel.rules import ITEM_AXES, ROWS
from dynrec_jax.parallel.table import STRIPED_FROM, STRIPS, ids_of, rows_of

Array = jax.Array

# XLA's CPU backend finds the best of an array's rows on one core, unless enough of such calls are ready at once.
PIECES = 16
FEWEST = 1 << 16  # scores that are worth it

QUERIES, LISTS = PartitionSpec(SLICE_AXES), PartitionSpec((*SLICE_AXES, *ITEM_AXES))


def top_k(
    u_BxD: Array,
    table_RxD: Table,
    seen_BxM: Array,
    *,
    k: int,
    items: int,
    scale: float,
    rows: int,
    allowed_Rx1: Array | None = None,
) -> tuple[Array, Array]:
    """The k best items by `scale · u·v_i`, without those of `seen`.

    Args:
      u_BxD: query vectors.
      table_RxD: the catalogue, rows over the devices of a slice; compressed or not.
      seen_BxM: int32 item indices to leave out; 0 names none.
      k: length of the list, at most `items`.
      items: N.
      scale: what multiplies u·v.
      rows: catalogue rows that a device scores at a time.
      allowed_Rx1: bool, which items may be in a list, rows as the catalogue's; None for all of them.

    Returns:
      ids int32[B, k], best first, and their scores float32[B, k]. Where fewer than k items are left, the list
      ends in the id 0 with the score -inf.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, pieces = u_BxD.shape[0], 1 if mesh.empty else mesh.size
    more = (0, -batch % pieces), (0, 0)
    settings = _Settings(k, items, scale, rows)
    only = () if allowed_Rx1 is None else (allowed_Rx1,)
    ids_BxK, scores_BxK = on_devices(
        functools.partial(_lists, settings),
        (QUERIES, ROWS, QUERIES, *(ROWS for _ in only)),
        LISTS,
        *(jnp.pad(u_BxD, more), table_RxD, jnp.pad(seen_BxM, more), *only),
    )
    return ids_BxK[:batch], scores_BxK[:batch]


class _Settings(NamedTuple):
    """Those of `top_k`."""

    k: int
    items: int
    scale: float
    rows: int


class _Order(NamedTuple):
    """A device's rows in the order of their items.

    Attributes:
      rows: (table, first place, number of places) -> a table of C rows, those of the places that follow each other.
      ids: places -> the items there.
      places: items -> where they are; where no place is, if they are of another device.
      by_row: whether all devices together have the items in the order of their rows.
    """

    rows: Callable[[Any, Array, int], Any]
    ids: Callable[[Array], Array]
    places: Callable[[Array], Array]
    by_row: bool


def _order(held: int, devices: Devices) -> _Order:
    """How a device finds its items in their order.

    In a striped table a device of n, where n is a power of two, has the items `low + n·place`; of any other n the
    items that it has are sorted.
    """
    count = devices.size(ITEM_AXES)
    total, first = held * count, devices.place(ITEM_AXES) * held
    if total < STRIPED_FROM:
        return _Order(
            lambda table, start, size: jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), table
            ),
            lambda places: first + places,
            # Negative places would count from the end.
            lambda ids: jnp.where(ids >= first, ids - first, held),
            True,
        )
    if count <= STRIPS and count & (count - 1) == 0:
        low = ids_of(first, total)

        def places(ids: Array) -> Array:
            return jnp.where((ids >= low) & ((ids - low) % count == 0), (ids - low) // count, held)

        def item(places: Array) -> Array:
            return low + count * places

    else:
        id_R = ids_of(first + jnp.arange(held), total)
        order_R = jnp.argsort(id_R)
        sorted_R, place_R = id_R[order_R], jnp.argsort(order_R)

        def places(ids: Array) -> Array:
            row = rows_of(ids, total) - first
            own = (row >= 0) & (row < held)
            return jnp.where(own, place_R[jnp.where(own, row, 0)], held)

        def item(places: Array) -> Array:
            return sorted_R[places]

    def rows(table: Any, start: Array, size: int) -> Any:
        row_C = rows_of(item(start + jnp.arange(size)), total) - first
        return jax.tree.map(lambda x: x.at[row_C].get(mode="promise_in_bounds"), table)

    return _Order(rows, item, places, False)


def _lists(
    settings: _Settings, devices: Devices, u_BxD: Array, table_RxD: Table, seen_BxM: Array, *only: Array
) -> tuple[Array, Array]:
    """A device's share of its slice's lists; `only` may be its rows of `allowed`."""
    order = _order(table_RxD.shape[0], devices)
    place_BxK, scores_BxK = _local(settings, u_BxD, table_RxD, order.places(seen_BxM), order, *only)
    ids_BxK = jnp.where(jnp.isneginf(scores_BxK), 0, order.ids(place_BxK))
    if not devices.several:
        return ids_BxK, scores_BxK
    # Each device merges its share of the queries, so that lists travel once and not to everybody.
    ids, scores = (
        jax.lax.all_to_all(x_BxK, ITEM_AXES, split_axis=0, concat_axis=1, tiled=True)
        for x_BxK in (ids_BxK, scores_BxK)
    )
    if not order.by_row:
        # What is not a number comes first, as in `top_k`, so that nobody misses it.
        key = jnp.where(jnp.isnan(scores), -jnp.inf, -scores)
        _, ids, scores = jax.lax.sort((key, ids, scores), num_keys=2)
        return ids[:, : settings.k], scores[:, : settings.k]
    best_BxK, place_BxK = jax.lax.top_k(scores, settings.k)
    return jnp.take_along_axis(ids, place_BxK, axis=1), best_BxK


def best(s_BxC: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k`, on a CPU by all of its cores."""
    batch: Any = s_BxC.shape[0]  # of an exported program a symbol, which stands for any size
    count = s_BxC.shape[1]
    if not isinstance(batch, int) or batch % PIECES or batch * count < FEWEST:
        return jax.lax.top_k(s_BxC, k)

    def in_pieces(s_BxC: Array) -> tuple[Array, Array]:
        found = [jax.lax.top_k(piece, k) for piece in jnp.split(s_BxC, PIECES)]
        scores, places = (jnp.concatenate(each) for each in zip(*found, strict=True))
        return scores, places

    return jax.lax.platform_dependent(
        s_BxC, cpu=in_pieces, default=lambda s_BxC: tuple(jax.lax.top_k(s_BxC, k))
    )


def _local(
    settings: _Settings, u_BxD: Array, table_RxD: Table, seen_BxM: Array, order: _Order, *only: Array
) -> tuple[Array, Array]:
    """Places and scores of the k best of a device's rows; `seen` are places. A score of -inf names no item."""
    batch, k, held = u_BxD.shape[0], settings.k, table_RxD.shape[0]
    number = -(-held // settings.rows)
    size = -(-held // number)
    each_B = jnp.arange(batch)[:, None]

    def block(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        # The last block starts early enough to be full, so that the table is never copied; what it shares with the
        # block before is left out here.
        start = jnp.minimum(index * size, held - size)
        v_CxD, scale_C = in_turn(order.rows(table_RxD, start, size), index, u_BxD.dtype)
        s_BxC = jnp.einsum("bd,cd->bc", u_BxD, v_CxD, preferred_element_type=jnp.float32) * settings.scale
        if scale_C is not None:
            s_BxC = s_BxC * scale_C[None, :]
        place_C = start + jnp.arange(size)
        id_C = order.ids(place_C)
        real_C = (id_C >= 1) & (id_C <= settings.items) & (place_C >= index * size)
        for allowed_Rx1 in only:
            real_C &= order.rows(allowed_Rx1, start, size)[:, 0]
        s_BxC = jnp.where(real_C[None, :], s_BxC, -jnp.inf)
        # Negative places would count from the end: send what lies before this block behind it.
        place_BxM = jnp.where(seen_BxM >= start, seen_BxM - start, size)
        s_BxC = s_BxC.at[each_B, place_BxM].set(-jnp.inf, mode="drop")
        if number == 1 and size >= k:
            best_BxK, place_BxK = best(s_BxC, k)
            return (start + place_BxK, best_BxK), None
        best_BxK, place_BxK = best(jnp.concatenate([carry[1], s_BxC], axis=1), k)
        kept_BxK = jnp.take_along_axis(carry[0], jnp.minimum(place_BxK, k - 1), axis=1)
        return (jnp.where(place_BxK < k, kept_BxK, start + place_BxK - k), best_BxK), None

    empty = (jnp.zeros((batch, k), jnp.int32), jnp.full((batch, k), -jnp.inf, jnp.float32))
    if number == 1:
        return block(empty, jnp.int32(0))[0]
    return jax.lax.scan(block, empty, jnp.arange(number))[0]
