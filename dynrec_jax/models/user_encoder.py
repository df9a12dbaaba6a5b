"""The user encoder: a vector of interest for every position of a history."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.batch import PAD
from dynrec_jax.models.attention import SAVED, Direction
from dynrec_jax.models.layers import BLOCKS, Dropout, LayerNorm, Places
from dynrec_jax.parallel.counters import token_counters
from dynrec_jax.parallel.rules import constrain

Array = jax.Array


class Moments(NamedTuple):
    """Where each event of a history stands; everything the encoder knows of it besides the item.

    Attributes:
      segments: int32[B, L], which history of the row it belongs to, from 1; 0 is padding.
      positions: int32[B, L], how many events of its history the traversal has read before it. A history lies in one
        piece, so these are also the positions next to it that it may look at: they alone keep histories apart.
      times: int32[B, L], seconds from 0; needed by an encoder that knows of time.
    """

    segments: Array
    positions: Array
    times: Array | None = None


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

    Attributes:
      max_length: positions that have a vector.
      layers: blocks.
      heads: of each block's attention.
      block: one of `layers.BLOCKS`.
      feedforward: hidden width as a multiple of D.
      dropout: rate.
      dtype: of activations and products.
      time_buckets: T of attention's bias by the time between events, which then needs `Moments.times`; 0 for none.
      remat: what the gradient computes again: "none" nothing; "block" all of a block, of which only the input is kept;
        "products" all but products of matrices and attention's means.
      scan_layers: one program for all blocks but the last, whose parameters "blocks" are stacked along "layers".
    """

    max_length: int
    layers: int
    heads: int
    block: str
    feedforward: float
    dropout: float
    dtype: Any
    time_buckets: int
    remat: str
    scan_layers: bool

    @nn.compact
    def __call__(
        self, x_BxLxD: Array, at: Moments, direction: Direction = "forward", read_B: Array | None = None
    ) -> Array:
        if self.time_buckets and at.times is None:
            raise ValueError(f"time_buckets={self.time_buckets}: Moments.times is None; expected int32[B, L]")
        dim = x_BxLxD.shape[-1]
        named = nn.with_logical_partitioning
        small = nn.initializers.normal(0.02)
        position_LxD = self.param(
            "position", named(small, ("length", "embed")), (self.max_length, dim), jnp.float32
        )
        direction_2xD = self.param("direction", named(small, (None, "embed")), (2, dim), jnp.float32)
        # Whole on each device: looked up where its features lie apart, the result would have to be put together.
        position_LxD = constrain(position_LxD, None, None)
        x_BxLxD = x_BxLxD.astype(jnp.float32) + jnp.take(position_LxD, at.positions, axis=0, mode="clip")
        x_BxLxD = x_BxLxD + direction_2xD[0 if direction == "forward" else 1].reshape(1, 1, dim)
        counters_BxL = token_counters(at.segments, at.positions)
        x_BxLxD = Dropout(self.dropout)(x_BxLxD, counters_BxL).astype(self.dtype)
        x_BxLxD = constrain(x_BxLxD, "batch", None, None)
        places = Places(at.positions, counters_BxL, direction, times=at.times if self.time_buckets else None)
        before_last = self.layers - 1
        if self.scan_layers and before_last:
            x_BxLxD = self._scanned(x_BxLxD, places, before_last)
        else:
            for layer in range(before_last):
                x_BxLxD = self._block(f"block_{layer}")(x_BxLxD, places)
                x_BxLxD = constrain(x_BxLxD, "batch", None, None)
        # The last one is apart: its shape changes where a single position is wanted.
        places = dataclasses.replace(places, read=read_B)
        x_BxLxD = constrain(self._block(f"block_{before_last}")(x_BxLxD, places), "batch", None, None)
        return LayerNorm(name="norm")(x_BxLxD).astype(jnp.float32)

    def _block(self, name: str, scanned: bool = False) -> nn.Module:
        block = BLOCKS[self.block]
        if self.remat != "none":
            policies = jax.checkpoint_policies
            # By name rather than by shape: the bias of each tile is a product without batch axes too, L × L in all.
            policy = {
                "block": policies.nothing_saveable,
                "products": policies.save_only_these_names(SAVED),
            }[self.remat]
            # A loop's body is not merged with the loop of the gradient, so nothing need be done against that.
            block = nn.remat(block, prevent_cse=not scanned, policy=policy)
        return block(
            self.heads, self.feedforward, self.dropout, self.dtype, self.time_buckets, parent=self, name=name
        )

    def _scanned(self, x_BxLxD: Array, places: Places, layers: int) -> Array:
        def step(block: nn.Module, x_BxLxD: Array, places: Places) -> tuple[Array, None]:
            return constrain(block(x_BxLxD, places), "batch", None, None), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self._block("blocks", scanned=True), x_BxLxD, places)[0]
