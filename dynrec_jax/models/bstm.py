"""BSTM, the bi-directional sequence transversal model: user encoder, item encoder and ABRA, trained together.

Each history is traversed in both directions with shared weights and opposite causal masks: forward, position t
predicts item t+1 from what came up to t; backward, position t predicts item t-1 from what came at t and after.
Prediction uses the forward traversal alone.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from dynrec_jax import losses
from dynrec_jax.batch import PAD, Batch
from dynrec_jax.models.abra import Abra, Recommendation
from dynrec_jax.models.attention import Direction
from dynrec_jax.models.item_encoder import ID_TABLE, ItemEncoder, init_tables
from dynrec_jax.models.user_encoder import Moments, UserEncoder, moments
from dynrec_jax.negatives import Negatives

Array = jax.Array


class Rows(NamedTuple):
    """Table rows that the step looked up for a batch; the loss is a function of (params, rows).

    Attributes:
      items: float[B, L + 1, D], of `Batch.items`.
      catalogue: float[R, D], the whole table where the loss needs it; otherwise None.
      negatives: float[K, D] where the loss is sampled; otherwise None.
    """

    items: Array
    catalogue: Array | None = None
    negatives: Array | None = None


class Towers(nn.Module):
    """The dense weights: user encoder and item encoder."""

    user: UserEncoder
    item: ItemEncoder

    def __call__(
        self, rows_BxLxD: Array, at: Moments, direction: Direction = "forward", read_B: Array | None = None
    ) -> Array:
        """User vectors `[B, L, D]` from the rows of a history's items, or `[B, 1, D]`, those of `read` alone."""
        v_BxLxD = self.item(rows_BxLxD)
        # Rows have about unit length; the encoder's residual stream wants about unit elements.
        return self.user(v_BxLxD * v_BxLxD.shape[-1] ** 0.5, at, direction, read_B)

    def items(self, rows: Array) -> Array:
        """Item vectors `[..., D]` from table rows."""
        return self.item(rows)


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
    """

    towers: Towers
    abra: Abra
    max_length: int
    dtype: Any
    loss_kind: str
    calibration: float
    forward_weight: float
    backward_weight: float

    @property
    def sampled(self) -> bool:
        """Whether the loss samples negatives instead of using the whole catalogue."""
        return self.loss_kind != "full"

    def init(self, key: Array) -> dict[str, Any]:
        """Boxed variables `{'params': dense weights, 'tables': {name: [R, D]}}`."""
        dense_key, table_key = jax.random.split(key)
        rows = jnp.zeros((1, self.max_length, self.abra.dim))
        params = self.towers.init(dense_key, rows, moments(jnp.ones((1, self.max_length), jnp.int32)))
        return {
            "params": params.get("params", {}),
            "tables": init_tables(table_key, self.abra.items, self.abra.dim),
        }

    def user_vectors(
        self, params: Any, rows_BxLxD: Array, at: Moments, direction: Direction = "forward", key: Any = None
    ) -> Array:
        """The interest at every moment, `[B, L, D]`; dropout is on where a `key` is given."""
        rngs = None if key is None else {"dropout": key}
        return self.towers.apply({"params": params}, rows_BxLxD, at, direction, rngs=rngs)

    def item_vectors(self, params: Any, rows: Array) -> Array:
        """Vectors of items in ABRA's space from their table rows, `[..., D]`."""
        return self.abra.unit(self.towers.apply({"params": params}, rows, method=Towers.items))

    @property
    def table_is_catalogue(self) -> bool:
        """Whether `catalogue` is the id table as it stands, so that nobody needs to hold a second one."""
        return not self.abra.normalise

    def catalogue(self, params: Any, tables: dict[str, Array]) -> Array:
        """All item vectors, `[R, D]`, ready to be scored."""
        return self.item_vectors(params, tables[ID_TABLE])

    def loss(
        self, params: Any, rows: Rows, batch: Batch, negatives: Negatives | None, key: Array
    ) -> tuple[Array, Array]:
        """Weighted sum of both traversals' losses over all targets, and the number of (forward) targets.

        Both are scored together, so that the catalogue has one gradient and not one for each traversal.
        """
        weights: dict[Direction, float] = {"forward": self.forward_weight, "backward": self.backward_weight}
        keys = dict(zip(weights, jax.random.split(key), strict=True))
        read = [
            self._traverse(params, rows, batch, direction, weight, keys[direction])
            for direction, weight in weights.items()
            if weight
        ]
        at = losses.gather_positions(*(jnp.concatenate(parts, axis=1) for parts in zip(*read, strict=True)))
        return self._scored(params, rows, at, negatives), jnp.sum(_pairs(batch), dtype=jnp.float32)

    def _traverse(
        self, params: Any, rows: Rows, batch: Batch, direction: Direction, weight: float, key: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Of each position of a traversal: the user's vector, the target's vector and index, and its weight."""
        early, late = slice(None, -1), slice(1, None)
        read, predict = (early, late) if direction == "forward" else (late, early)
        positions = batch.positions if direction == "forward" else batch.remaining
        moment = Moments(batch.segments[:, read], positions[:, read])
        u_BxLxD = self.user_vectors(params, rows.items[:, read], moment, direction, key)
        vector_BxLxD = self.item_vectors(params, rows.items[:, predict])
        return u_BxLxD, vector_BxLxD, batch.items[:, predict], jnp.where(_pairs(batch), weight, 0.0)

    def _scored(self, params: Any, rows: Rows, at: losses.Positions, negatives: Negatives | None) -> Array:
        """The loss of some positions."""
        if rows.catalogue is not None:
            table_RxD = self.item_vectors(params, rows.catalogue)
            at = at._replace(query=self.abra.query(at.query, table_RxD, at.number))
            return losses.full_softmax(at, table_RxD, self.abra.blocks, self.dtype)
        if rows.negatives is None or negatives is None:
            raise ValueError(
                "a sampled loss needs rows.negatives and their ids; a full one needs rows.catalogue"
            )
        at = at._replace(query=self.abra.unit(at.query))
        drawn = self.item_vectors(params, rows.negatives)
        if self.loss_kind == "gbce":
            return losses.generalised_bce(
                at, drawn, negatives, self.abra.blocks, self.dtype, self.calibration
            )
        return losses.sampled_softmax(at, drawn, negatives, self.abra.blocks, self.dtype)

    def last_vector(self, params: Any, rows_BxLxD: Array, items_BxL: Array) -> Array:
        """The interest after the last event of each history, `[B, D]`; an empty history gives zeros."""
        length_B = (items_BxL != PAD).sum(axis=1, dtype=jnp.int32)
        last_B = jnp.maximum(length_B - 1, 0)
        u_Bx1xD = self.towers.apply({"params": params}, rows_BxLxD, moments(items_BxL), read_B=last_B)
        u_BxD = u_Bx1xD[:, 0]
        return jnp.where(length_B[:, None] > 0, u_BxD, 0.0)

    def recommend(
        self, params: Any, rows_BxLxD: Array, items_BxL: Array, table_RxD: Array, seen_BxM: Array, k: int
    ) -> Recommendation:
        """ABRA's answer to what comes after each history; `table` is what `catalogue` gives."""
        return self.abra.recommend(self.last_vector(params, rows_BxLxD, items_BxL), table_RxD, seen_BxM, k)


def _pairs(batch: Batch) -> Array:
    """bool[R, L], where an event and its successor belong to the same window: both directions have a target there."""
    return (batch.segments[:, :-1] == batch.segments[:, 1:]) & (batch.segments[:, :-1] != 0)


def make_bstm(config: ml_collections.ConfigDict, items: int) -> Bstm:
    """The model that a config describes, for a catalogue of N items."""
    m = config.model
    dtype = jnp.dtype(m.dtype)
    user = UserEncoder(
        max_length=config.data.max_length,
        layers=m.layers,
        heads=m.heads,
        block=m.block,
        feedforward=m.feedforward,
        dropout=m.dropout,
        dtype=dtype,
        time_buckets=0,
        remat=m.remat,
        scan_layers=m.scan_layers,
    )
    abra = Abra(
        dim=m.dim,
        items=items,
        temperature=m.temperature,
        normalise=m.normalise,
        hops=m.hops,
        block_items=config.loss.block_items,
        block_positions=config.loss.block_positions,
    )
    return Bstm(
        towers=Towers(user=user, item=ItemEncoder()),
        abra=abra,
        max_length=config.data.max_length,
        dtype=dtype,
        loss_kind=config.loss.kind,
        calibration=config.loss.calibration,
        forward_weight=m.forward_weight,
        backward_weight=m.backward_weight,
    )


MODELS = {"bstm": make_bstm}
