"""How devices ask each other for rows of a table, and send gradients to the rows' owners.

Each device of a slice owns a contiguous piece of the rows. A device that needs rows first drops repetitions. It then
sends the numbers to the owners, who send the rows; gradients, added up by row, go the way of the numbers. What is
sent to one device at once has a fixed size, the capacity. What does not fit goes in further rounds, until nothing is
left on any device, so that every request is served however the ids are distributed.

Over many devices a message takes two hops: to the device of the own column that lies in the owner's row of devices,
and along that row. The device between asks for a row once, whoever asked it, and fewer, larger messages have less
room to spare: on 256 devices that look up 1,024 Zipf ids each, two hops move two thirds of the bytes of one. On a
torus each hop stays within a ring.

An optimizer must see all of a row's gradient at once. So in each round the owner tells the others up to which row it
knows all that there is (`bound`), and only gradients of rows up to there are sent.

All functions here run inside `shard_map` over the whole mesh, on what one device holds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynrec_jax.parallel.rules import ITEM_AXES

Array = jax.Array


class Exchange(NamedTuple):
    """Sizes of what is sent, fixed when a program is compiled; results do not depend on them, rounds do.

    Attributes:
      sizes: devices along each hop; their product is the number of owners.
      capacities: rows that a device sends to each of these in a round.
      touched: rows of its own that a device updates in a round.
    """

    sizes: tuple[int, ...]
    capacities: tuple[int, ...]
    touched: int

    def span(self, hop: int, held: int) -> int:
        """How many rows lie behind one device of a hop, each owner having `held`."""
        return held * math.prod(self.sizes[hop + 1 :])


class _Hop(NamedTuple):
    """One hop of a round, as this device sees it.

    Attributes:
      slot_M: where each row of the list at hand is in what is sent, [S · C]; S · C where it is not sent.
      next_K: where each of the S · C rows received is in the next list.
      size: S.
      groups: the devices that exchange, by their place along `ITEM_AXES`.
    """

    slot_M: Array
    next_K: Array
    size: int
    groups: list[list[int]]

    def swap(self, x: Array) -> Array:
        """Sends the s-th part of `x`, [S · C, …], to the s-th device, and returns what came from each."""
        return jax.lax.all_to_all(x, ITEM_AXES, 0, 0, axis_index_groups=self.groups, tiled=True)


class _Route(NamedTuple):
    """A round's way from those who ask to the owners.

    Attributes:
      hops: in the order of the requests.
      owned_U: rows of its own that this device was asked for, ascending without repetition, `none` behind.
      bound: up to this row, the owner has been told of everything that is open.
      done_M: which rows of the list at hand are settled by this round.
    """

    hops: list[_Hop]
    owned_U: Array
    bound: Array
    done_M: Array


def distinct(row_M: Array, none: int) -> tuple[Array, Array]:
    """Rows without repetition, ascending, `none` (the largest number) behind; and where each of `row` is there."""
    order_M = jnp.argsort(row_M)
    sorted_M = row_M[order_M]
    new_M = jnp.concatenate([jnp.zeros((1,), bool), sorted_M[1:] != sorted_M[:-1]])
    group_M = jnp.cumsum(new_M, dtype=jnp.int32)
    list_M = jnp.full(row_M.shape, none, jnp.int32).at[group_M].set(sorted_M.astype(jnp.int32))
    return list_M, jnp.zeros_like(group_M).at[order_M].set(group_M)


def merge(row_M: Array, gradient_MxD: Array, none: int) -> tuple[Array, Array]:
    """Sums gradients of the same row: rows int32[M] without repetition, ascending, `none` behind; and their sums."""
    list_M, place_M = distinct(row_M, none)
    return list_M, jax.ops.segment_sum(gradient_MxD, place_M, num_segments=list_M.shape[0])


def gather_rows(table_RxD: Array, row_M: Array, exchange: Exchange) -> Array:
    """Rows of the whole table by their numbers, [M, D]; `table` is this device's piece, [R / n, D]."""
    held, dim = table_RxD.shape
    none = held * math.prod(exchange.sizes)
    list_M, place_M = distinct(row_M, none)

    def ask(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y_MxD, open_M, _ = carry
        way = _route(list_M, open_M, held, exchange)
        v_UxD = _own(table_RxD, way.owned_U)
        for hop in reversed(way.hops):
            answer_KxD = hop.swap(v_UxD[hop.next_K])
            v_UxD = answer_KxD.at[hop.slot_M].get(mode="fill", fill_value=0)
        open_M = open_M & ~way.done_M
        return jnp.where(way.done_M[:, None], v_UxD, y_MxD), open_M, _anyone(open_M.any())

    start = (jnp.zeros((list_M.shape[0], dim), table_RxD.dtype), list_M < none, jnp.bool_(True))
    with jax.named_scope("lookup_rounds"):
        y_MxD, _, _ = jax.lax.while_loop(lambda carry: carry[2], ask, start)
    return y_MxD[place_M]


class Delivery(NamedTuple):
    """Gradients on their way to the owners.

    Attributes:
      list_M: rows without repetition.
      sum_MxD: their gradients, of this device.
      held: rows of an owner.
      exchange: sizes of a round.
    """

    list_M: Array
    sum_MxD: Array
    held: int
    exchange: Exchange

    @classmethod
    def of(cls, row_M: Array, gradient_MxD: Array, held: int, exchange: Exchange) -> "Delivery":
        """Adds up what this device has of each row; the row `held · owners` stands for none."""
        return cls(*merge(row_M, gradient_MxD, held * math.prod(exchange.sizes)), held, exchange)

    @property
    def all_open(self) -> Array:
        """bool[M], the rows that are to be delivered."""
        return self.list_M < self.held * math.prod(self.exchange.sizes)

    def round(self, open_M: Array, across: Sequence[str] = ()) -> tuple[Array, Array, Array]:
        """Brings owners all that there is of some of the rows that are open.

        Args:
          open_M: what no earlier round has delivered.
          across: mesh axes along which the table has replicas, which all get what any of them is sent.

        Returns:
          This device's own rows int32[T], counted from its first, `held` where there is none; their gradients [T, D];
          and what is still open.
        """
        way = _route(self.list_M, open_M, self.held, self.exchange, self.exchange.touched, across)
        g_UxD = jnp.where(way.done_M[:, None], self.sum_MxD, 0)
        for hop, capacity in zip(way.hops, self.exchange.capacities, strict=True):
            sent_KxD = jnp.zeros((hop.size * capacity, g_UxD.shape[1]), g_UxD.dtype)
            got_KxD = hop.swap(sent_KxD.at[hop.slot_M].set(g_UxD, mode="drop"))
            g_UxD = jax.ops.segment_sum(got_KxD, hop.next_K, num_segments=got_KxD.shape[0])
        touched = min(self.exchange.touched, g_UxD.shape[0])
        row_T, g_TxD = way.owned_U[:touched], g_UxD[:touched]
        own_T = jnp.where(row_T <= way.bound, row_T - _me() * self.held, self.held)
        own_T = jnp.minimum(own_T, self.held)
        if across:
            own_T, g_TxD = self._of_all_replicas(own_T, g_TxD, across)
        return own_T, g_TxD, open_M & ~way.done_M

    def _of_all_replicas(self, own_T: Array, g_TxD: Array, across: Sequence[str]) -> tuple[Array, Array]:
        """What the replicas of this device's rows were sent, merged by row; bit for bit the same in all of them."""
        row_SxT, g_SxTxD = (jax.lax.all_gather(x, across) for x in (own_T, g_TxD))
        list_T, place_T = distinct(row_SxT.reshape(-1), self.held)
        place_SxT = jnp.where(row_SxT < self.held, place_T.reshape(row_SxT.shape), list_T.shape[0])
        # One replica after the other: each names a row once, so nothing depends on the order within one.
        sum_TxD = jnp.zeros((list_T.shape[0], g_TxD.shape[1]), g_TxD.dtype)
        for part_T, part_TxD in zip(place_SxT, g_SxTxD, strict=True):
            sum_TxD = sum_TxD.at[part_T].add(part_TxD, mode="drop")
        return list_T, sum_TxD


def anything_open(open_M: Array, across: Sequence[str] = ()) -> Array:
    """Whether any device has something left to deliver."""
    return _anyone(open_M.any(), across)


def _route(
    list_M: Array,
    open_M: Array,
    held: int,
    exchange: Exchange,
    touched: int | None = None,
    across: Sequence[str] = (),
) -> _Route:
    """Sends the numbers of open rows to their owners, as many as fit, and settles which of them are done."""
    none = held * math.prod(exchange.sizes)
    places = np.arange(math.prod(exchange.sizes)).reshape(exchange.sizes)
    hops: list[_Hop] = []
    row_M, wanted_M, bound = list_M, open_M, jnp.int32(none)
    for index, (size, capacity) in enumerate(zip(exchange.sizes, exchange.capacities, strict=True)):
        span = exchange.span(index, held)
        peer_M = jnp.where(row_M < none, row_M // span % size, size)
        slot_M, sent_SxC, full_S = _pack(row_M, wanted_M, peer_M, size, capacity, none)
        bound_S = jnp.minimum(bound, jnp.where(full_S, sent_SxC[:, -1], none))
        groups = np.moveaxis(places, index, -1).reshape(-1, size).tolist()
        hop = _Hop(slot_M, slot_M, size, groups)
        told_SxC = hop.swap(jnp.concatenate([sent_SxC, bound_S[:, None]], axis=1))
        row_M, next_K = distinct(told_SxC[:, :-1].reshape(-1), none)
        wanted_M, bound = row_M < none, told_SxC[:, -1].min()
        hops.append(hop._replace(next_K=next_K))
    if touched is not None and touched < row_M.shape[0]:
        bound = jnp.minimum(bound, row_M[touched - 1])
    if across:
        bound = jax.lax.pmin(bound, across)
    bound_N = jax.lax.all_gather(bound, ITEM_AXES)
    owner_M = jnp.minimum(list_M // held, bound_N.shape[0] - 1)
    sent_M = hops[0].slot_M < exchange.sizes[0] * exchange.capacities[0]
    return _Route(hops, row_M, bound, sent_M & (list_M <= bound_N[owner_M]))


def _pack(
    row_M: Array, wanted_M: Array, peer_M: Array, size: int, capacity: int, none: int
) -> tuple[Array, Array, Array]:
    """Puts the first wanted rows of each peer into its part of what is sent.

    Args:
      row_M: ascending.
      wanted_M: which of them are to be sent.
      peer_M: to whom, ascending; `size` where there is no row.
      size: number of peers, S.
      capacity: C.
      none: stands for no row.

    Returns:
      The slot of each row, `size · capacity` where it is not sent; rows by slot [S, C]; and bool[S], which peers are
      owed more than was sent.
    """
    until_M = jnp.cumsum(wanted_M, dtype=jnp.int32)
    before_M = jnp.concatenate([jnp.zeros((1,), jnp.int32), until_M])
    start_S = jnp.searchsorted(peer_M, jnp.arange(size + 1, dtype=peer_M.dtype))
    base_S = before_M[start_S]
    rank_M = before_M[:-1] - base_S[peer_M]
    slot_M = jnp.where(
        wanted_M & (rank_M < capacity) & (peer_M < size), peer_M * capacity + rank_M, size * capacity
    )
    sent = jnp.full((size * capacity,), none, jnp.int32).at[slot_M].set(row_M, mode="drop")
    return slot_M, sent.reshape(size, capacity), base_S[1:] - base_S[:-1] > capacity


def _own(table_RxD: Array, row_U: Array) -> Array:
    """This device's rows by their numbers in the whole table; zeros where they are another's."""
    own_U = row_U - _me() * table_RxD.shape[0]
    return table_RxD.at[own_U].get(mode="fill", fill_value=0)


def _me() -> Array:
    """This device's place among the owners."""
    return jax.lax.axis_index(ITEM_AXES)


def _anyone(mine: Array, across: Sequence[str] = ()) -> Array:
    return jax.lax.pmax(mine.astype(jnp.int32), (*across, *ITEM_AXES)) > 0
