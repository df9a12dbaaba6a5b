"""The user encoder: a vector of interest for every position of a history."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.batch import PAD
from dynrec_jax.models.layers import BLOCKS, Dropout, LayerNorm, token_counters
from dynrec_jax.parallel.rules import constrain

Array = jax.Array
Direction = Literal["forward", "backward"]


class Moments(NamedTuple):
    """Where each event of a history stands; everything the encoder knows of it besides the item.

    Attributes:
      segments: int32[B, L], which history of the row it belongs to, from 1; 0 is padding.
      positions: int32[B, L], how many events the traversal has read before it.
    """

    segments: Array
    positions: Array


def moments(items_BxL: Array) -> Moments:
    """Of rows that hold one history each, read forward."""
    at_L = jnp.arange(items_BxL.shape[1], dtype=jnp.int32)[None, :]
    real_BxL = items_BxL != PAD
    return Moments(real_BxL.astype(jnp.int32), jnp.where(real_BxL, at_L, 0))


def traversal_mask(segments_BxL: Array, direction: Direction) -> Array:
    """bool[B, L, L], which position (row) may look at which (column).

    Forward, a position looks at itself and what came before; backward, at itself and what came after; both within
    their history. Padding is looked at by nobody.
    """
    at_L = jnp.arange(segments_BxL.shape[1])
    earlier_LxL = at_L[:, None] >= at_L[None, :]
    may_LxL = earlier_LxL if direction == "forward" else earlier_LxL.T
    same_BxLxL = segments_BxL[:, :, None] == segments_BxL[:, None, :]
    return may_LxL[None] & same_BxLxL & (segments_BxL[:, None, :] != 0)


class UserEncoder(nn.Module):
    """A Transformer over item vectors; the same weights read a history in either direction.

    A learned direction vector tells the traversals apart; positions count from where a traversal starts.

    Call: `x_BxLxD` item vectors, `at` where they stand, `direction` -> `[B, L, D]`, in float32. Dropout is active
    where the rng stream "dropout" is given.
    """

    max_length: int
    layers: int
    heads: int
    block: str
    feedforward: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Array, at: Moments, direction: Direction = "forward") -> Array:
        dim = x_BxLxD.shape[-1]
        named = nn.with_logical_partitioning
        small = nn.initializers.normal(0.02)
        position_LxD = self.param(
            "position", named(small, ("length", "embed")), (self.max_length, dim), jnp.float32
        )
        direction_2xD = self.param("direction", named(small, (None, "embed")), (2, dim), jnp.float32)
        x_BxLxD = x_BxLxD.astype(jnp.float32) + jnp.take(position_LxD, at.positions, axis=0, mode="clip")
        x_BxLxD = x_BxLxD + direction_2xD[0 if direction == "forward" else 1].reshape(1, 1, dim)
        counters_BxL = token_counters(at.segments, at.positions)
        x_BxLxD = Dropout(self.dropout)(x_BxLxD, counters_BxL).astype(self.dtype)
        x_BxLxD = constrain(x_BxLxD, "batch", None, None)
        mask_BxLxL = traversal_mask(at.segments, direction)
        for layer in range(self.layers):
            block = BLOCKS[self.block](
                self.heads, self.feedforward, self.dropout, self.dtype, name=f"block_{layer}"
            )
            x_BxLxD = constrain(block(x_BxLxD, mask_BxLxL, counters_BxL), "batch", None, None)
        return LayerNorm(name="norm")(x_BxLxD).astype(jnp.float32)
