"""ABRA, the attention-based recommendation algorithm: attention of the user over the whole catalogue.

`a_i = softmax_i(u·v_i / (τ · sqrt(d_u + d_v)))`, `r = Σ a_i v_i`. The list is the attention's top k; the mixture r
can be fed back, so that the next attention asks with `u + r` ("hops"). The scores are the logits before the
softmax, and they are the logits of the training loss; where neighbours count, theirs are raised, and vectors of rare
items drawn to theirs (`models.neighbours`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.batch import PAD
from dynrec_jax.models.neighbours import Raised
from dynrec_jax.parallel.blocks import Blocks
from dynrec_jax.parallel.compressed import Compressed, Table
from dynrec_jax.parallel.mixture import mixture
from dynrec_jax.parallel.table import lookup
from dynrec_jax.parallel.topk import top_k

Array = jax.Array

AMONG = 512  # items of each query that are looked up at a time, where lists are among some alone


class Recommendation(NamedTuple):
    """ABRA's answer.

    Attributes:
      ids: int32[B, k], best first; 0 where the catalogue had no more items to offer.
      scores: float32[B, k], logits; -inf where `ids` is 0.
      mixture: float[B, D], r over the whole catalogue, seen items included.
    """

    ids: Array
    scores: Array
    mixture: Array


@dataclasses.dataclass(frozen=True)
class Abra:
    """The attention's settings; the functions below are pure.

    Attributes:
      dim: D of users and of items.
      items: N.
      temperature: τ.
      normalise: whether both sides are brought to unit length first.
      hops: how often the mixture refines the query.
      block_items: catalogue rows that are scored at a time.
      block_positions: positions that are scored at a time.
      interests: k, vectors of a user, of which each item's best one counts; a user's vector is then `[k · D]`, one
        behind the other.
      neighbours: weight of the counts of neighbours in what is served; 0 leaves them out.
    """

    dim: int
    items: int
    temperature: float
    normalise: bool
    hops: int
    block_items: int
    block_positions: int
    interests: int = 1
    neighbours: float = 0.0

    @property
    def width(self) -> int:
        """Numbers of a user's vector."""
        return self.dim * self.interests

    @property
    def scale(self) -> float:
        """What multiplies u·v: `1 / (τ · sqrt(d_u + d_v))`."""
        return 1.0 / (self.temperature * (2 * self.dim) ** 0.5)

    @property
    def blocks(self) -> Blocks:
        """How the catalogue is streamed."""
        return Blocks(self.items, self.scale, self.block_items, self.block_positions)

    def unit(self, x: Array) -> Array:
        """`x`, at unit length over the last axis where the config asks for it. Zero stays zero."""
        if not self.normalise:
            return x
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))

    def query(
        self, u_PxD: Array, table_RxD: Table, count: Array | None = None, blocks: Blocks | None = None
    ) -> Array:
        """The query that is scored, after `hops` refinements; `table` as `unit` gives it.

        `count` is how many queries each device has, as `mixture` takes it; None says that all of them are real.
        `blocks` are other ones than `self.blocks`. Of several interests each is brought to unit length for itself.
        """
        if self.interests > 1:
            return self.unit(self.apart(u_PxD)).reshape(u_PxD.shape)
        u_PxD = self.unit(u_PxD)
        for _ in range(self.hops):
            u_PxD = self.unit(u_PxD + mixture(u_PxD, table_RxD, blocks or self.blocks, count))
        return u_PxD

    def recommend(self, u_BxD: Array, table_RxD: Array, seen_BxM: Array, k: int) -> Recommendation:
        """Top k of the attention, without the items of `seen` (int32[B, M], 0 names none).

        `table` holds the catalogue's vectors as `unit` gives them. It is the attention alone: counts of neighbours come
        in where lists are made for users (`evaluate.recommender`, `score.live`).
        """
        q_BxD = self.query(u_BxD, table_RxD)
        ids_BxK, scores_BxK = self.best(q_BxD, table_RxD, seen_BxM, k)
        mixed_PxD = mixture(q_BxD.reshape(-1, table_RxD.shape[-1]), table_RxD, self.blocks)
        mixed_BxD = mixed_PxD.reshape(q_BxD.shape[0], -1, mixed_PxD.shape[-1]).mean(axis=1)
        return Recommendation(ids_BxK, scores_BxK, mixed_BxD)

    def best(
        self,
        q_BxD: Array,
        table_RxD: Table,
        seen_BxM: Array,
        k: int,
        raised: Raised | None = None,
        allowed_Rx1: Array | None = None,
    ) -> tuple[Array, Array]:
        """ids and scores of `recommend`, without the mixture, for queries and a table that are ready.

        Where there is `allowed` (bool, rows as the table's), other items are in no list.

        An item's score is that of the interest that likes it best. What is among the k best of all is among the k best
        of that interest, so the interests' lists hold it. What is raised into the k best is among the `raised`, and
        what is not raised is among the k best of all as they were.
        """
        interests = q_BxD.shape[-1] // table_RxD.shape[-1]
        ids, scores = top_k(
            q_BxD.reshape(-1, table_RxD.shape[-1]),
            table_RxD,
            seen_BxM if interests == 1 else jnp.repeat(seen_BxM, interests, axis=0),
            k=k,
            items=self.items,
            scale=self.scale,
            rows=self.block_items,
            allowed_Rx1=allowed_Rx1,
        )
        if interests == 1 and raised is None:
            return ids, scores
        ids, scores = ids.reshape(q_BxD.shape[0], -1), scores.reshape(q_BxD.shape[0], -1)
        if raised is not None:
            assert not isinstance(table_RxD, Compressed), "what is raised is scored by exact vectors"
            ids = jnp.concatenate([ids, _left(raised.ids, seen_BxM, allowed_Rx1)], axis=1)
            scores = jnp.concatenate(
                [scores, self.scores_of(q_BxD, table_RxD, raised.ids) + raised.by], axis=1
            )
        return _merged(ids, scores, k)

    def among(
        self,
        q_BxD: Array,
        table_RxD: Array,
        ids_BxC: Array,
        seen_BxM: Array,
        k: int,
        raised: Raised | None = None,
    ) -> tuple[Array, Array]:
        """As `best`, of some items of each query alone: int32[B, C], 0 names none, in any order."""
        width = -(-max(ids_BxC.shape[1], k) // AMONG) * AMONG
        ids_BxC = jnp.pad(ids_BxC, ((0, 0), (0, width - ids_BxC.shape[1])))
        parts_PxBxA = ids_BxC.reshape(len(ids_BxC), -1, AMONG).swapaxes(0, 1)
        own_PxBxA = jax.lax.map(lambda part_BxA: self.scores_of(q_BxD, table_RxD, part_BxA), parts_PxBxA)
        scores_BxC = own_PxBxA.swapaxes(0, 1).reshape(ids_BxC.shape)
        if raised is not None:
            place_BxC, there_BxC, order_BxR = _found(ids_BxC, raised.ids)
            by_BxR = jnp.take_along_axis(raised.by, order_BxR, axis=1)
            scores_BxC += jnp.where(there_BxC, jnp.take_along_axis(by_BxR, place_BxC, axis=1), 0.0)
        _, out_BxC, _ = _found(ids_BxC, seen_BxM)
        ids_BxC = jnp.where(out_BxC, PAD, ids_BxC)
        return _merged(ids_BxC, scores_BxC, k)

    def scores_of(self, q_BxD: Array, table_RxD: Array, ids_BxC: Array) -> Array:
        """Scores `[B, C]` of some items of each query, which is ready, as the table is."""
        v_BxCxD = lookup(table_RxD, ids_BxC)
        each_BxIxD = q_BxD.reshape(q_BxD.shape[0], -1, table_RxD.shape[-1])
        return jnp.einsum("bid,bcd->bic", each_BxIxD, v_BxCxD).max(axis=1) * self.scale

    def candidates(
        self,
        q_BxD: Array,
        table_RxD: Compressed,
        seen_BxM: Array,
        number: int,
        raised: Raised | None = None,
        allowed_Rx1: Array | None = None,
    ) -> Raised:
        """Items that may be the best ones of some queries, `[B, C]`, and by how much each is raised; for `reranked`.

        They are the best `number` by a compressed table, and behind them all that is raised, where anything is: an
        item may come twice, and the second time counts.
        """
        ids, _ = self.best(q_BxD, table_RxD, seen_BxM, number, allowed_Rx1=allowed_Rx1)
        by = jnp.zeros(ids.shape)
        if raised is not None:
            ids = jnp.concatenate([ids, _left(raised.ids, seen_BxM, allowed_Rx1)], axis=1)
            by = jnp.concatenate([by, raised.by], axis=1)
        return Raised(ids, by)

    def reranked(self, q_BxD: Array, found: Raised, v_BxCxD: Array, k: int) -> tuple[Array, Array]:
        """ids and scores of the best k of `candidates`, by their exact vectors as `unit` gives them."""
        each_BxIxD = q_BxD.reshape(len(q_BxD), -1, v_BxCxD.shape[-1])
        # Added up item by item: a product of matrices may add up the last few rows in another order, and equal vectors
        # would differ in their last bit.
        s_BxIxC = jnp.sum(each_BxIxD[:, :, None] * v_BxCxD[:, None], axis=-1)
        return _merged(found.ids, s_BxIxC.max(axis=1) * self.scale + found.by, k)

    def apart(self, u: Array) -> Array:
        """A user's interests, `[..., k, D]`, from vectors `[..., k · D]`."""
        return u.reshape(*u.shape[:-1], -1, self.dim)

    def nearest(self, u: Array, vector: Array) -> Array:
        """Of each position's interests the one that scores its target highest, `[..., D]`.

        Args:
          u: `[..., k · D]`.
          vector: the targets' vectors as `unit` gives them, `[..., D]`.
        """
        each = self.apart(u)
        score = jnp.einsum("...kd,...d->...k", self.unit(each), vector)
        best = jnp.argmax(jax.lax.stop_gradient(score), axis=-1)
        return jnp.take_along_axis(each, best[..., None, None], axis=-2)[..., 0, :]

    def logits(self, q_PxD: Array, table_RxD: Array) -> Array:
        """All scores of some queries that are ready, `[P, R]`: for a few users and a catalogue that is small."""
        each_PxIxD = q_PxD.reshape(len(q_PxD), -1, table_RxD.shape[-1])
        return jnp.einsum("pid,rd->pir", each_PxIxD, table_RxD).max(axis=1) * self.scale


def _found(ids_BxC: Array, set_BxM: Array) -> tuple[Array, Array, Array]:
    """Where `ids` are in each row's `set`, in its order by id; whether they are there; and that order."""
    order_BxM = jnp.argsort(set_BxM, axis=1)
    sorted_BxM = jnp.take_along_axis(set_BxM, order_BxM, axis=1)
    place_BxC = jax.vmap(jnp.searchsorted)(sorted_BxM, ids_BxC)
    place_BxC = jnp.minimum(place_BxC, set_BxM.shape[1] - 1)
    return place_BxC, jnp.take_along_axis(sorted_BxM, place_BxC, axis=1) == ids_BxC, order_BxM


def _left(ids_BxC: Array, seen_BxM: Array, allowed_Rx1: Array | None) -> Array:
    """Items of each query, those that are to be left out as `PAD`."""
    out_BxC = (ids_BxC[:, :, None] == seen_BxM[:, None, :]).any(axis=-1)
    if allowed_Rx1 is not None:
        out_BxC |= lookup(allowed_Rx1.astype(jnp.int32), ids_BxC)[..., 0] == 0
    return jnp.where(out_BxC, PAD, ids_BxC)


def _merged(ids_BxK: Array, scores_BxK: Array, k: int) -> tuple[Array, Array]:
    """The k best of several lists of each row, every item once with its best score; equal scores by the lowest id."""
    ids_BxK, worse_BxK = jax.lax.sort((ids_BxK, -scores_BxK), dimension=1, num_keys=2)
    again_BxK = jnp.pad(ids_BxK[:, 1:] == ids_BxK[:, :-1], ((0, 0), (1, 0)))
    worse_BxK = jnp.where(again_BxK | (ids_BxK == PAD), jnp.inf, worse_BxK)
    # Stable: items lie in the order of their ids.
    worse_BxK, ids_BxK = jax.lax.sort((worse_BxK, ids_BxK), dimension=1, num_keys=1, is_stable=True)
    there_BxK = worse_BxK[:, :k] != jnp.inf  # a NaN stays one, and is found by those who look for it
    return jnp.where(there_BxK, ids_BxK[:, :k], PAD), jnp.where(there_BxK, -worse_BxK[:, :k], -jnp.inf)
