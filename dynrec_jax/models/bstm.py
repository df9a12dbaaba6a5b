"""BSTM, the bi-directional sequence transversal model: user encoder, item encoder and ABRA, trained together.

Each history is traversed forward and, where `backward_weight` says so, backward, with shared weights and opposite
causal masks: forward, position t predicts item t+1 from what came up to t; backward, position t predicts item t-1 from
what came at t and after. Prediction uses the forward traversal alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax import losses
from dynrec_jax.batch import PAD, Batch, History
from dynrec_jax.models.abra import Abra, Recommendation
from dynrec_jax.models.attention import Direction
from dynrec_jax.models.blocks import Ring
from dynrec_jax.models.item_encoder import ItemEncoder, init_tables
from dynrec_jax.models.neighbours import IDS, WEIGHTS, shared_targets
from dynrec_jax.models.text_encoder import BERT, Text, TextEncoder
from dynrec_jax.models.towers.ids import ID_TABLE, INDEX, SEEN
from dynrec_jax.models.towers.tower import Described
from dynrec_jax.models.user_encoder import Moments, Sight, UserEncoder, moments
from dynrec_jax.negatives import Negatives
from dynrec_jax.parallel.blocks import Blocks

Array = jax.Array


class Rows(NamedTuple):
    """What the step looked up for a batch; the loss is a function of (params, rows).

    Each is a dict of arrays by name: rows of the id table, and what else describes the items.

    Attributes:
      items: [B, L + 1, width] each, of `Batch.items`.
      catalogue: [R, width] each, of the whole table where the loss needs it; otherwise None.
      negatives: [K, width] each where the loss is sampled; otherwise None.
    """

    items: Described
    catalogue: Described | None = None
    negatives: Described | None = None


class Towers(nn.Module):
    """The dense weights: user encoder and item encoder."""

    user: UserEncoder
    item: ItemEncoder

    def __call__(
        self,
        v_BxLxD: Array,
        at: Moments,
        direction: Direction = "forward",
        read_B: Array | None = None,
        ring: Ring | None = None,
    ) -> Array:
        """User vectors `[B, L, D]` from the vectors of a history's items, or `[B, 1, D]`, those of `read` alone.

        Or those of one more event, L = 1, given where the others lie in memory.
        """
        # Rows have about unit length; the encoder's residual stream wants about unit elements.
        return self.user(v_BxLxD * v_BxLxD.shape[-1] ** 0.5, at, direction, read_B, ring)

    def items(self, described: Described, key: Array | None = None) -> Array:
        """Item vectors `[..., D]`."""
        return self.item(described, key)

    def aligned(self, described: Described) -> tuple[Array, Array, Array]:
        """Of items: the id's vector, the other towers', both `[..., D]`, and whether there are both, `[..., 1]`."""
        (own, known), (content, there) = self.item.apart(described)
        return own, content, known & there

    def everything(self, described: Described, at: Moments) -> Array:
        """Uses all weights, so that they can be made."""
        return self(self.items(described), at)


@dataclasses.dataclass(frozen=True)
class Bstm:
    """Settings and modules of one model; all methods are pure functions of the variables given.

    Attributes:
      towers: the linen module of the dense weights.
      abra: the attention over the catalogue.
      max_length: L.
      dtype: of matrix products.
      loss_kind: "full", "sampled" or "gbce".
      calibration: gBCE's t.
      forward_weight: weight of the forward traversal in the loss.
      backward_weight: weight of the backward traversal; 0 leaves it out.
      alignment: weight of telling an item's id by its other vector.
      neighbours: share of a forward target that goes to the neighbours of the user's last items.
      shrinkage: events of an item that the mean of its neighbours' vectors counts as much as, in what is served.
      event_weights: of targets by their event type, E + 1 of them; empty where all weigh the same.
      shapes: of what describes an item besides its id: name, width and type.
      text: BERT, where it is trained with the rest.
    """

    towers: Towers
    abra: Abra
    max_length: int
    dtype: Any
    loss_kind: str
    calibration: float
    forward_weight: float
    backward_weight: float
    alignment: float = 0.0
    neighbours: float = 0.0
    shrinkage: float = 0.0
    event_weights: tuple[float, ...] = ()
    shapes: tuple[tuple[str, int, str], ...] = ()
    text: TextEncoder | None = None

    @property
    def sampled(self) -> bool:
        """Whether the loss samples negatives instead of using the whole catalogue."""
        return self.loss_kind != "full"

    @property
    def ids(self) -> bool:
        """Whether there is a table of ids."""
        return self.towers.item.ids

    @property
    def sight(self) -> Sight:
        """What the user encoder knows of events besides their items."""
        return self.towers.user.sight

    def init(self, key: Array, bert: Any = None) -> dict[str, Any]:
        """Boxed variables `{'params': dense weights, 'tables': {name: [R, D]}}`; BERT's are those given, if any."""
        dense_key, table_key = jax.random.split(key)
        shape = (1, self.max_length)
        described = {name: jnp.zeros((*shape, width), kind) for name, width, kind in self.shapes}
        described[INDEX] = jnp.zeros((*shape, 1), jnp.int32)
        if self.ids:
            described[ID_TABLE] = jnp.zeros((*shape, self.abra.dim))
        one = jnp.ones(shape, jnp.int32)
        at = moments(History(one, one, one, one[:, 0]))
        params = self.towers.init(dense_key, described, at, method=Towers.everything).get("params", {})
        if self.text is not None:
            made = self.text.init(jax.random.fold_in(dense_key, 1))
            params = {**params, BERT: made if bert is None else nn.meta.replace_boxed(made, bert)}
        tables = init_tables(table_key, self.abra.items, self.abra.dim) if self.ids else {}
        return {"params": params, "tables": tables}

    def encode(
        self, params: Any, text: Text, key: Array | None = None, parts: Sequence[int] | None = None
    ) -> Array:
        """Text vectors `[U, E]` of items by their tokens; dropout is on where a `key` is given."""
        assert self.text is not None
        return self.text.encode(params[BERT], text, key, parts)

    def user_vectors(
        self, params: Any, v_BxLxD: Array, at: Moments, direction: Direction = "forward", key: Any = None
    ) -> Array:
        """The interest at every moment, `[B, L, D]`, from item vectors; dropout is on where a `key` is given."""
        rngs = None if key is None else {"dropout": key}
        return self.towers.apply({"params": params}, v_BxLxD, at, direction, rngs=rngs)

    def item_vectors(self, params: Any, described: Described, key: Array | None = None) -> Array:
        """Vectors of items, `[..., D]`, as the user encoder reads them; with a key, some go without their id."""
        return self.towers.apply({"params": params}, described, key, method=Towers.items)

    @property
    def normalises(self) -> bool:
        """Whether `ready` changes a vector."""
        return self.abra.normalise

    @property
    def rows_are_vectors(self) -> bool:
        """Whether `catalogue` is the id table as it stands, so that nobody needs to hold a second one."""
        return not self.towers.item.unseen

    def catalogue(self, params: Any, described: Described) -> Array:
        """All item vectors, `[R, D]`, as the user encoder reads them, from what describes each row."""
        return self.item_vectors(params, described)

    def ready(self, v: Array) -> Array:
        """Item vectors as ABRA scores them."""
        return self.abra.unit(v)

    def loss(
        self, params: Any, rows: Rows, batch: Batch, negatives: Negatives | None, key: Array
    ) -> tuple[Array, Array]:
        """Weighted sum of both traversals' losses over all targets, and the number of (forward) targets.

        Where event types weigh differently, a target counts by its weight in both.

        Both are scored together, so that the catalogue has one gradient and not one for each traversal.
        """
        weights: dict[Direction, float] = {"forward": self.forward_weight, "backward": self.backward_weight}
        keys = dict(zip(weights, jax.random.split(key), strict=True))
        item_key = jax.random.fold_in(key, 2)
        v_BxMxD = self.item_vectors(params, rows.items, item_key)
        catalogue_RxD = None
        if rows.catalogue is not None:
            catalogue_RxD = self.ready(self.item_vectors(params, rows.catalogue, item_key))
        read = [
            self._traverse(params, v_BxMxD, batch, direction, weight, keys[direction])
            for direction, weight in weights.items()
            if weight
        ]
        if self.neighbours and self.forward_weight:
            assert catalogue_RxD is not None
            early = {name: rows.items[name][:, :-1] for name in (IDS, WEIGHTS)}
            u, vector, target, weight = read[0]
            vector = shared_targets(vector, early, batch.positions[:, :-1], catalogue_RxD, self.neighbours)
            read[0] = u, vector, target, weight
        at = losses.gather_positions(*(jnp.concatenate(parts, axis=1) for parts in zip(*read, strict=True)))
        total = self._scored(params, rows, catalogue_RxD, at, negatives, item_key)
        if self.alignment:
            total += self.alignment * self._aligned(params, rows, batch, negatives)
        return total, jnp.sum(self._weights(batch, "forward"), dtype=jnp.float32)

    def _traverse(
        self, params: Any, v_BxMxD: Array, batch: Batch, direction: Direction, weight: float, key: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Of each position of a traversal: the user's vector, the target's vector and index, and its weight."""
        early, late = slice(None, -1), slice(1, None)
        read, predict = (early, late) if direction == "forward" else (late, early)
        positions = batch.positions if direction == "forward" else batch.remaining
        moment = Moments(
            batch.segments[:, read],
            positions[:, read],
            batch.times[:, read],
            batch.events[:, read],
            # Mirrored: backward, an event is asked at the moment of the one before it.
            jnp.where(_pairs(batch), batch.times[:, predict], batch.times[:, read]),
        )
        u_BxLxD = self.user_vectors(params, v_BxMxD[:, read], moment, direction, key)
        vector_BxLxD = self.ready(v_BxMxD[:, predict])
        if self.abra.interests > 1:
            u_BxLxD = self.abra.nearest(u_BxLxD, vector_BxLxD)
        return u_BxLxD, vector_BxLxD, batch.items[:, predict], weight * self._weights(batch, direction)

    def _weights(self, batch: Batch, direction: Direction) -> Array:
        """float32[B, L], how much the target of each position of a traversal counts; 0 where there is none."""
        weights_BxL = jnp.where(_pairs(batch), 1.0, 0.0)
        if not self.event_weights:
            return weights_BxL
        types_BxL = batch.events[:, 1:] if direction == "forward" else batch.events[:, :-1]
        return weights_BxL * jnp.asarray(self.event_weights, jnp.float32)[types_BxL]

    def _scored(
        self,
        params: Any,
        rows: Rows,
        catalogue_RxD: Array | None,
        at: losses.Positions,
        negatives: Negatives | None,
        key: Array,
    ) -> Array:
        """The loss of some positions."""
        if rows.catalogue is not None and catalogue_RxD is not None:
            table_RxD, blocks = self._seen(catalogue_RxD, rows.catalogue)
            at = at._replace(query=self.abra.query(at.query, table_RxD, at.number, blocks))
            return losses.full_softmax(at, table_RxD, blocks, self.dtype)
        if rows.negatives is None or negatives is None:
            raise ValueError(
                "a sampled loss needs rows.negatives and their ids; a full one needs rows.catalogue"
            )
        negatives = _seen_negatives(negatives, rows.negatives)
        at = at._replace(query=self.abra.unit(at.query))
        drawn = self.ready(self.item_vectors(params, rows.negatives, key))
        if self.loss_kind == "gbce":
            return losses.generalised_bce(
                at, drawn, negatives, self.abra.blocks, self.dtype, self.calibration
            )
        return losses.sampled_softmax(at, drawn, negatives, self.abra.blocks, self.dtype)

    def _seen(self, table_RxD: Array, catalogue: Described) -> tuple[Array, Blocks]:
        """A table as training sees it, and how it is streamed.

        What comes later is not there yet: nobody may learn that it is never the next one.
        """
        if SEEN not in catalogue:
            return table_RxD, self.abra.blocks
        return jnp.where(catalogue[SEEN] > 0, table_RxD, 0.0), self.abra.blocks._replace(given=True)

    def _aligned(self, params: Any, rows: Rows, batch: Batch, negatives: Negatives | None) -> Array:
        """How badly the items of a batch are told by what the towers say of them: their id against others' ids."""

        def apart(described: Described) -> tuple[Array, Array, Array]:
            return self.towers.apply({"params": params}, described, method=Towers.aligned)

        own, content, both = apart(rows.items)
        weight = jnp.where(both[..., 0] & (batch.segments != 0), 1.0, 0.0)
        at = losses.gather_positions(self.abra.unit(content), self.abra.unit(own), batch.items, weight)
        if rows.catalogue is not None:
            table_RxD, blocks = self._seen(self.abra.unit(rows.catalogue[ID_TABLE]), rows.catalogue)
            return losses.full_softmax(at, table_RxD, blocks, self.dtype)
        assert rows.negatives is not None
        assert negatives is not None
        negatives = _seen_negatives(negatives, rows.negatives)
        drawn = self.abra.unit(rows.negatives[ID_TABLE])
        return losses.sampled_softmax(at, drawn, negatives, self.abra.blocks, self.dtype)

    def last_vector(self, params: Any, v_BxLxD: Array, history: History) -> Array:
        """The interest after the last event of each history, `[B, D]`; an empty history gives zeros."""
        length_B = (history.items != PAD).sum(axis=1, dtype=jnp.int32)
        last_B = jnp.maximum(length_B - 1, 0)
        u_Bx1xD = self.towers.apply({"params": params}, v_BxLxD, moments(history), read_B=last_B)
        u_BxD = u_Bx1xD[:, 0]
        return jnp.where(length_B[:, None] > 0, u_BxD, 0.0)

    def recommend(
        self, params: Any, v_BxLxD: Array, history: History, table_RxD: Array, seen_BxM: Array, k: int
    ) -> Recommendation:
        """ABRA's answer to what comes after each history; `table` is `ready` for it."""
        return self.abra.recommend(self.last_vector(params, v_BxLxD, history), table_RxD, seen_BxM, k)


def _pairs(batch: Batch) -> Array:
    """bool[R, L], where an event and its successor belong to the same window: both directions have a target there."""
    return (batch.segments[:, :-1] == batch.segments[:, 1:]) & (batch.segments[:, :-1] != 0)


def _seen_negatives(negatives: Negatives, drawn: Described) -> Negatives:
    """The negatives without those that training does not see."""
    if SEEN not in drawn:
        return negatives
    return negatives._replace(ids=jnp.where(drawn[SEEN][:, 0] > 0, negatives.ids, PAD))
