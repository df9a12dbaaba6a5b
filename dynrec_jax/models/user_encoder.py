"""The user encoder: a vector of interest for every position of a history."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.batch import PAD
from dynrec_jax.models.attention import Direction
from dynrec_jax.models.layers import BLOCKS, Dropout, LayerNorm, Places, token_counters
from dynrec_jax.parallel.rules import constrain

Array = jax.Array


class Moments(NamedTuple):
    """Where each event of a history stands; everything the encoder knows of it besides the item.

    Attributes:
      segments: int32[B, L], which history of the row it belongs to, from 1; 0 is padding.
      positions: int32[B, L], how many events of its history the traversal has read before it. A history lies in one
        piece, so these are also the positions next to it that it may look at: they alone keep histories apart.
    """

    segments: Array
    positions: Array


def moments(items_BxL: Array) -> Moments:
    """Of rows that hold one history each, read forward."""
    at_L = jnp.arange(items_BxL.shape[1], dtype=jnp.int32)[None, :]
    real_BxL = items_BxL != PAD
    return Moments(real_BxL.astype(jnp.int32), jnp.where(real_BxL, at_L, 0))


class UserEncoder(nn.Module):
    """A Transformer over item vectors; the same weights read a history in either direction.

    A learned direction vector tells the traversals apart; positions count from where a traversal starts.

    Call: `x_BxLxD` item vectors, `at` where they stand, `direction` -> `[B, L, D]`, in float32. Where `read_B` names
    one position of each row, only its vector `[B, 1, D]` is made: the last block then spends nothing on the others.
    Dropout is active where the rng stream "dropout" is given.
    """

    max_length: int
    layers: int
    heads: int
    block: str
    feedforward: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxLxD: Array, at: Moments, direction: Direction = "forward", read_B: Array | None = None
    ) -> Array:
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
        places = Places(at.positions, counters_BxL, direction)
        for layer in range(self.layers):
            block = BLOCKS[self.block](
                self.heads, self.feedforward, self.dropout, self.dtype, name=f"block_{layer}"
            )
            if layer == self.layers - 1:
                places = places._replace(read=read_B)
            x_BxLxD = constrain(block(x_BxLxD, places), "batch", None, None)
        return LayerNorm(name="norm")(x_BxLxD).astype(jnp.float32)
