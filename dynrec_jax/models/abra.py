"""ABRA, the attention-based recommendation algorithm: attention of the user over the whole catalogue.

`a_i = softmax_i(u·v_i / (τ · sqrt(d_u + d_v)))`, `r = Σ a_i v_i`. The list is the attention's top k; the mixture r
can be fed back, so that the next attention asks with `u + r` ("hops"). The scores are the logits before the
softmax, and they are the logits of the training loss.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.parallel.blocks import Blocks
from dynrec_jax.parallel.mixture import mixture
from dynrec_jax.parallel.topk import top_k

Array = jax.Array


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
    """

    dim: int
    items: int
    temperature: float
    normalise: bool
    hops: int
    block_items: int
    block_positions: int

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
        self, u_PxD: Array, table_RxD: Array, count: Array | None = None, blocks: Blocks | None = None
    ) -> Array:
        """The query that is scored, after `hops` refinements; `table` as `unit` gives it.

        `count` is how many queries each device has, as `mixture` takes it; None says that all of them are real.
        `blocks` are other ones than `self.blocks`.
        """
        u_PxD = self.unit(u_PxD)
        for _ in range(self.hops):
            u_PxD = self.unit(u_PxD + mixture(u_PxD, table_RxD, blocks or self.blocks, count))
        return u_PxD

    def recommend(self, u_BxD: Array, table_RxD: Array, seen_BxM: Array, k: int) -> Recommendation:
        """Top k of the attention, without the items of `seen` (int32[B, M], 0 names none).

        `table` holds the catalogue's vectors as `unit` gives them.
        """
        q_BxD = self.query(u_BxD, table_RxD)
        ids_BxK, scores_BxK = self.best(q_BxD, table_RxD, seen_BxM, k)
        return Recommendation(ids_BxK, scores_BxK, mixture(q_BxD, table_RxD, self.blocks))

    def best(self, q_BxD: Array, table_RxD: Array, seen_BxM: Array, k: int) -> tuple[Array, Array]:
        """ids and scores of `recommend`, without the mixture, for queries and a table that are ready."""
        return top_k(
            q_BxD, table_RxD, seen_BxM, k=k, items=self.items, scale=self.scale, rows=self.block_items
        )
