"""Lists made anew from longer ones: more varied, or as popular as what each user took.

Both are greedy: item after item is taken from a pool of candidates, the one that then stands best.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.batch import PAD
from dynrec_jax.evaluate.beyond import KINDS, SMOOTHING, TAIL
from dynrec_jax.evaluate.recommender import HistorySource, ListMaker, Lists
from dynrec_jax.parallel.mesh import feed, own_rows, place_rows, place_same
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.parallel.rules import constrain, sharding
from dynrec_jax.parallel.table import lookup

Array = jax.Array

TOGETHER = 64  # users of a device whose lists are made at a time: on CPU, what its cache holds
LAST = jnp.iinfo(jnp.int32).max


def relevance(ids_BxC: Array, scores_BxC: Array) -> Array:
    """float32[B, C], each user's scores brought to 0 … 1: 0 is the pool's lowest and 1 its highest; 0 where no item is.

    Logits have no scale of their own, and their softmax over a pool gives almost all of it to a few items.
    """
    real_BxC = ids_BxC != PAD
    low_Bx1 = jnp.where(real_BxC, scores_BxC, jnp.inf).min(axis=1, keepdims=True)
    high_Bx1 = jnp.where(real_BxC, scores_BxC, -jnp.inf).max(axis=1, keepdims=True)
    span_Bx1 = jnp.where(high_Bx1 > low_Bx1, high_Bx1 - low_Bx1, 1.0)
    return jnp.where(real_BxC, (scores_BxC - low_Bx1) / span_Bx1, 0.0)


def diversified(
    ids_BxC: Array, scores_BxC: Array, vectors_BxCxD: Array, k: int, weight: float
) -> tuple[Array, Array]:
    """The k items of each pool that maximal marginal relevance takes, in the order in which it takes them.

    Each time the item of the largest `(1 - λ) · relevance - λ · max cosine to those taken` (Carbonell and Goldstein,
    SIGIR 1998), the first by relevance alone; equal ones by the lowest item index.

    Args:
      ids_BxC: int32, best first, 0 behind the last candidate.
      scores_BxC: float32, of the candidates; `relevance` says how they count.
      vectors_BxCxD: of the candidates, of any length; a zero vector is like none.
      k: how many, at most C.
      weight: λ, 0 to 1; 0 gives the first k as they are.

    Returns:
      ids int32[B, k] and the scores that the pool has for them; 0 and -inf where no candidate is left.

    Raises:
      ValueError: k exceeds the pool.
    """
    if weight == 0 or ids_BxC.shape[1] < k:
        return _first(ids_BxC, scores_BxC, k)
    norm_BxCx1 = jnp.linalg.norm(vectors_BxCxD, axis=-1, keepdims=True)
    unit_BxCxD = vectors_BxCxD / jnp.where(norm_BxCx1 > 0, norm_BxCx1, 1.0)
    gain_BxC = (1 - weight) * relevance(ids_BxC, scores_BxC)

    def value(nearest_BxC: Array, taken: Array) -> Array:
        return gain_BxC - weight * jnp.where(taken == 0, 0.0, nearest_BxC)

    def take(nearest_BxC: Array, at_Bx1: Array) -> Array:
        chosen_BxD = jnp.take_along_axis(unit_BxCxD, at_Bx1[..., None], axis=1)[:, 0]
        return jnp.maximum(nearest_BxC, jnp.einsum("bcd,bd->bc", unit_BxCxD, chosen_BxD))

    return _greedy(ids_BxC, scores_BxC, k, jnp.full_like(gain_BxC, -jnp.inf), value, take)


def calibrated(
    ids_BxC: Array, scores_BxC: Array, groups_BxC: Array, history_share_BxG: Array, k: int, weight: float
) -> tuple[Array, Array]:
    """The k items of each pool whose groups are spread as those of the user's history are, in the order of taking.

    Each time the item with which `(1 - λ) · Σ relevance - λ · KL(p || q~)` of the list is largest (Steck, Calibrated
    Recommendations, RecSys 2018, with groups of popularity as in Abdollahpouri et al., User-centered Evaluation of
    Popularity Bias, UMAP 2021); `q~ = 0.99 q + 0.01 p`, p the history's distribution over the groups and q the list's.
    Equal ones by the lowest item index. Without a history, by relevance alone.

    Args:
      ids_BxC: int32, best first, 0 behind the last candidate.
      scores_BxC: float32, of the candidates; `relevance` says how they count.
      groups_BxC: int32 in 0 … G - 1, of the candidates.
      history_share_BxG: float32, p; zeros of an empty history.
      k: how many, at most C.
      weight: λ, 0 to 1; 0 gives the first k as they are.

    Returns:
      As `diversified`.

    Raises:
      ValueError: k exceeds the pool.
    """
    if weight == 0 or ids_BxC.shape[1] < k:
        return _first(ids_BxC, scores_BxC, k)
    gain_BxC = (1 - weight) * relevance(ids_BxC, scores_BxC)
    p_Bx1xG = history_share_BxG[:, None, :]
    one_GxG = jnp.eye(history_share_BxG.shape[1])

    def value(count_BxG: Array, taken: Array) -> Array:
        # Of a list with one item more: a row for each group that it may be of.
        q_BxGxG = (count_BxG[:, None, :] + one_GxG[None]) / (taken + 1)
        mixed_BxGxG = (1 - SMOOTHING) * q_BxGxG + SMOOTHING * p_Bx1xG
        there = p_Bx1xG > 0
        ratio = jnp.where(there, p_Bx1xG, 1.0) / jnp.where(there, mixed_BxGxG, 1.0)
        kl_BxG = jnp.sum(p_Bx1xG * jnp.log(ratio), axis=-1)
        return gain_BxC - weight * jnp.take_along_axis(kl_BxG, groups_BxC, axis=1)

    def take(count_BxG: Array, at_Bx1: Array) -> Array:
        return count_BxG + one_GxG[jnp.take_along_axis(groups_BxC, at_Bx1, axis=1)[:, 0]]

    return _greedy(ids_BxC, scores_BxC, k, jnp.zeros_like(history_share_BxG), value, take)


def _first(ids_BxC: Array, scores_BxC: Array, k: int) -> tuple[Array, Array]:
    if ids_BxC.shape[1] < k:
        raise ValueError(f"{k} of {ids_BxC.shape[1]} candidates; a pool must hold as many as are taken")
    return ids_BxC[:, :k], scores_BxC[:, :k]


def _greedy(
    ids_BxC: Array,
    scores_BxC: Array,
    k: int,
    state: Array,
    value: Callable[[Array, Array], Array],
    take: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    """Takes k times the candidate of the largest `value(state, taken)`; `take(state, its place)` is the next state."""
    place_C = jnp.arange(ids_BxC.shape[1])

    def step(taken: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        state, free_BxC, found_BxK, kept_BxK = carry
        value_BxC = jnp.where(free_BxC, value(state, taken), -jnp.inf)
        best_Bx1 = value_BxC.max(axis=1, keepdims=True)
        # Where nothing is left, all are as good, and 0 is the lowest index: a pool has as many places as are taken.
        at_Bx1 = jnp.argmin(jnp.where(value_BxC == best_Bx1, ids_BxC, LAST), axis=1, keepdims=True)
        id_Bx1 = jnp.take_along_axis(ids_BxC, at_Bx1, axis=1)
        score_Bx1 = jnp.take_along_axis(scores_BxC, at_Bx1, axis=1)
        found_BxK = jax.lax.dynamic_update_slice_in_dim(found_BxK, id_Bx1, taken, axis=1)
        kept_BxK = jax.lax.dynamic_update_slice_in_dim(kept_BxK, score_Bx1, taken, axis=1)
        return take(state, at_Bx1), free_BxC & (place_C[None] != at_Bx1), found_BxK, kept_BxK

    found_BxK = jnp.full((len(ids_BxC), k), PAD, ids_BxC.dtype)
    kept_BxK = jnp.full((len(ids_BxC), k), -jnp.inf, scores_BxC.dtype)
    carry = state, ids_BxC != PAD, found_BxK, kept_BxK
    _, _, found_BxK, kept_BxK = jax.lax.fori_loop(0, k, step, carry)
    return found_BxK, kept_BxK


def history_shares(
    source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray, group_N: np.ndarray
) -> np.ndarray:
    """float32[B, 3], how the events before number `end` of each user are spread over the groups of items.

    Zeros where there are none, or for a user of -1.
    """
    items_BxL = source.last_items(users_B, ends_B, max(int(ends_B.max(initial=0)), 1))
    real_BxL = items_BxL != PAD
    later_BxL = items_BxL >= len(group_N)  # items that came after training
    group_BxL = np.where(later_BxL, TAIL, group_N[np.where(later_BxL, PAD, items_BxL)])
    count_BxG = np.stack([((group_BxL == g) & real_BxL).sum(axis=1) for g in range(KINDS)], axis=1)
    return (count_BxG / np.maximum(real_BxL.sum(axis=1, keepdims=True), 1)).astype(np.float32)


# (where histories are, users, the event that each is asked for, ids and scores [B, C] on the devices) -> ids, scores
Again = Callable[[HistorySource, np.ndarray, np.ndarray, Array, Array], tuple[Array, Array]]


def diversifying(mesh: Mesh, table_RxD: Array, k: int, weight: float) -> Again:
    """`diversified` by the vectors of an item table, whose rows are asked of the devices that hold them."""

    @jax.jit
    def program(table_RxD: Array, ids_BxC: Array, scores_BxC: Array) -> tuple[Array, Array]:
        found = diversified(ids_BxC, scores_BxC, lookup(table_RxD, ids_BxC), k, weight)
        return constrain(found[0], "batch", None), constrain(found[1], "batch", None)

    return lambda source, users, ends, ids, scores: program(table_RxD, ids, scores)


def calibrating(mesh: Mesh, group_N: np.ndarray, k: int, weight: float) -> Again:
    """`calibrated` by groups of items, int32[N + 1], as `evaluate.beyond.popularity_groups` gives them."""
    where = sharding(mesh)
    groups = place_same(where, group_N)

    @jax.jit
    def program(groups_N: Array, ids_BxC: Array, scores_BxC: Array, p_BxG: Array) -> tuple[Array, Array]:
        groups_BxC = groups_N.at[ids_BxC].get(mode="fill", fill_value=TAIL)
        found = calibrated(ids_BxC, scores_BxC, groups_BxC, p_BxG, k, weight)
        return constrain(found[0], "batch", None), constrain(found[1], "batch", None)

    def again(
        source: HistorySource, users: np.ndarray, ends: np.ndarray, ids: Array, scores: Array
    ) -> tuple[Array, Array]:
        p_BxG = place_rows(mesh, history_shares(source, users, ends, group_N))
        return program(groups, ids, scores, p_BxG)

    return again


@dataclasses.dataclass(frozen=True)
class Reranked:
    """Makes lists from longer ones; is itself what makes lists (`ListMaker`).

    Attributes:
      maker: makes the pools.
      again: makes lists of length k from pools, on the devices.
      k: length of the lists.
      mesh: the devices.
      processes: that make lists together, each of its users.
    """

    maker: ListMaker
    again: Again
    k: int
    mesh: Mesh
    processes: Processes = ALONE

    def __call__(self, source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        """Lists of some users; all processes call it together, those without users too."""
        pools = self.maker(source, users_U, ends_U)
        lists = Lists(
            np.zeros((len(users_U), self.k), np.int32),
            np.full((len(users_U), self.k), -np.inf, np.float32),
        )
        own = feed(self.mesh, self.processes.index)
        size = TOGETHER * own.pieces
        before: tuple[slice, Any] | None = None
        for number in range(max(self.processes.exchange(-(-len(users_U) // size)))):
            here = slice(number * size, min((number + 1) * size, len(users_U)))
            made = self._made(source, users_U[here], ends_U[here], pools.ids[here], pools.scores[here], size)
            # The devices go on with these while those before them are read.
            if before is not None:
                _read(*before, lists)
            before = here, made
        if before is not None:
            _read(*before, lists)
        return lists

    def _made(
        self,
        source: HistorySource,
        users: np.ndarray,
        ends: np.ndarray,
        ids: np.ndarray,
        scores: np.ndarray,
        size: int,
    ) -> tuple[Array, Array]:
        short = (0, size - len(users))
        users_B, ends_B = np.pad(users, short, constant_values=-1), np.pad(ends, short)
        ids_BxC = place_rows(self.mesh, np.pad(ids, (short, (0, 0))))
        scores_BxC = place_rows(self.mesh, np.pad(scores, (short, (0, 0))))
        with jax.set_mesh(self.mesh):
            return self.again(source, users_B, ends_B, ids_BxC, scores_BxC)


def _read(here: slice, made: tuple[Array, Array], lists: Lists) -> None:
    """Waits for some lists and puts them where they belong."""
    size = max(here.stop - here.start, 0)
    for found, kept in zip(made, lists, strict=True):
        kept[here] = own_rows(found)[:size]


@dataclasses.dataclass(frozen=True)
class Rerank:
    """How lists are made from longer ones: by one of the two.

    Attributes:
      pool: candidates of a user, at most.
      diversify: λ of `diversified`; 0 for none.
      calibrate: λ of `calibrated`; 0 for none.
      group_N: int32[N + 1], groups of items as `evaluate.beyond.popularity_groups` gives them, where `calibrate` is
        used. Items behind them came later and are in the tail.
    """

    pool: int
    diversify: float = 0.0
    calibrate: float = 0.0
    group_N: np.ndarray | None = None

    def length(self, k: int, items: int) -> int:
        """How long the pools for lists of `k` are, from so many items."""
        return max(min(self.pool, items), k)

    def of(
        self, maker: ListMaker, mesh: Mesh, table_RxD: Array, k: int, processes: Processes = ALONE
    ) -> ListMaker:
        """What makes lists of `k` from those of `maker`, which are of `length`.

        Args:
          maker: makes the pools.
          mesh: the devices.
          table_RxD: vectors of all items.
          k: length of the lists.
          processes: that make lists together.
        """
        if self.diversify:
            return Reranked(maker, diversifying(mesh, table_RxD, k, self.diversify), k, mesh, processes)
        assert self.group_N is not None, "lists are calibrated by groups of items, and none were given"
        return Reranked(maker, calibrating(mesh, self.group_N, k, self.calibrate), k, mesh, processes)
