"""The user encoder: a vector of interest for every position of a history."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.batch import PAD, History
from dynrec_jax.models.attention import SAVED, Direction
from dynrec_jax.models.bias import time_bucket
from dynrec_jax.models.blocks import BLOCKS, MEMORY, BlockSettings, Places, Ring
from dynrec_jax.models.layers import Dense, Dropout, LayerNorm
from dynrec_jax.models.time import hands, turns
from dynrec_jax.parallel.counters import token_counters
from dynrec_jax.parallel.rules import constrain

Array = jax.Array


CLOCKS = 24  # of absolute times: periods from a minute to 68 years, each about twice the one before
GAPS = 64  # kinds of gaps between an event and the request: half an octave each


class Moments(NamedTuple):
    """Where each event of a history stands; everything the encoder knows of it besides the item.

    Attributes:
      segments: int32[B, L], which history of the row it belongs to, from 1; 0 is padding.
      positions: int32[B, L], how many events of its history the traversal has read before it. A history lies in one
        piece, so these are also the positions next to it that it may look at: they alone keep histories apart.
      times: int32[B, L], seconds from 0; needed by an encoder that knows of time.
      events: int32[B, L], event types, 0 for none; needed by an encoder that knows of them.
      asked: int32[B, L], the moment at which each position is asked for the next event; needed by an encoder that is
        told of it. Others ask at the event's own time.
    """

    segments: Array
    positions: Array
    times: Any = None
    events: Any = None
    asked: Any = None


def moments(history: History) -> Moments:
    """Of rows that hold one history each, read forward.

    Each event asks at the time of the next, as in training, and the last at `history.asked`.
    """
    items_BxL = history.items
    at_1xL = jnp.arange(items_BxL.shape[1], dtype=jnp.int32)[None, :]
    real_BxL = items_BxL != PAD
    asked_BxL = None
    if history.asked is not None:
        last_BxL = at_1xL == real_BxL.sum(axis=1, keepdims=True) - 1
        asked_BxL = jnp.where(last_BxL, history.asked[:, None], jnp.roll(history.times, -1, axis=1))
    positions_BxL = jnp.where(real_BxL, at_1xL, 0)
    return Moments(real_BxL.astype(jnp.int32), positions_BxL, history.times, history.events, asked_BxL)


@dataclasses.dataclass(frozen=True)
class Sight:
    """What an encoder knows of its events besides their items.

    Attributes:
      positions: "absolute", a learned vector of each position; "relative", attention's bias by the events between two;
        or "none".
      time: any of "bias", attention's bias by the time between events; "rotary", queries and keys turned by it; and
        "sinusoidal", clocks' hands that are added to what is read.
      time_buckets: T, of the bias by time.
      query_time: whether each position is told when it is asked.
      event_types: E, how many types of events there are besides none; 0 where they do not count.
      window: W, positions that attention looks at, itself included; 0 for all.
    """

    positions: str = "absolute"
    time: tuple[str, ...] = ()
    time_buckets: int = 0
    query_time: bool = False
    event_types: int = 0
    window: int = 0

    @property
    def needs_times(self) -> bool:
        """Whether events must have times."""
        return bool(self.time) or self.query_time

    def shapes(self, users: int, length: int, make: Callable[..., Any]) -> History:
        """What the encoder reads of some histories, each array as `make(*shape)` gives it."""
        return History(
            make(users, length),
            make(users, length) if self.needs_times else None,
            make(users, length) if self.event_types else None,
            make(users) if self.query_time else None,
        )


class UserEncoder(nn.Module):
    """A Transformer over item vectors; the same weights read a history in either direction.

    A learned direction vector tells the traversals apart; positions count from where a traversal starts.

    Call: `x_BxLxD` item vectors, `at` where they stand, `direction` -> `[B, L, D]`, in float32. Where `read_B` names
    one position of each row, only its vector `[B, 1, D]` is made: the last block then spends nothing on the others.
    Where a `ring` is given, L is 1, and the block's keys and values of earlier events are in the collection "memory".
    Dropout is active where the rng stream "dropout" is given.

    Attributes:
      max_length: positions that have a vector, or a distance of their own.
      layers: blocks.
      heads: of each block's attention.
      block: one of `blocks.BLOCKS`.
      feedforward: hidden width as a multiple of D.
      dropout: rate.
      dtype: of activations and products.
      sight: what is known of the events besides their items.
      interests: k, vectors that are read out of a position, one behind the other; each is the position's vector and a
        linear map of it.
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
    sight: Sight
    interests: int
    remat: str
    scan_layers: bool

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Array,
        at: Moments,
        direction: Direction = "forward",
        read_B: Array | None = None,
        ring: Ring | None = None,
    ) -> Array:
        self._check(at)
        x_BxLxD = self._read(x_BxLxD.astype(jnp.float32), at, direction)
        counters_BxL = token_counters(at.segments, at.positions)
        x_BxLxD = Dropout(self.dropout)(x_BxLxD, counters_BxL).astype(self.dtype)
        x_BxLxD = constrain(x_BxLxD, "batch", None, None)
        places = self._places(at, counters_BxL, direction, x_BxLxD.shape[-1] // self.heads, ring)
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
        u_BxLxD = LayerNorm(name="norm")(x_BxLxD).astype(jnp.float32)
        if self.interests == 1:
            return u_BxLxD
        more = Dense((self.interests, u_BxLxD.shape[-1]), ("embed", None, None), self.dtype, name="interests")
        each_BxLxIxD = u_BxLxD[:, :, None] + more(u_BxLxD).astype(jnp.float32)
        return each_BxLxIxD.reshape(*u_BxLxD.shape[:2], -1)

    def _check(self, at: Moments) -> None:
        s = self.sight
        for wanted, name in (
            (s.needs_times, "times"),
            (s.event_types, "events"),
            (s.query_time, "asked"),
        ):
            if wanted and getattr(at, name) is None:
                raise ValueError(f"Moments.{name} is None; expected int32[B, L] for {s}")

    def _read(self, x_BxLxD: Array, at: Moments, direction: Direction) -> Array:
        """What is known of each event, added up."""
        s, dim = self.sight, x_BxLxD.shape[-1]

        def table(name: str, rows: int, axis: str | None) -> Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
            return self.param(name, init, (rows, dim), jnp.float32)

        def looked_up(name: str, rows: int, axis: str | None, index_BxL: Array) -> Array:
            # Whole on each device: looked up where its features lie apart, the result would have to be put together.
            return jnp.take(constrain(table(name, rows, axis), None, None), index_BxL, axis=0, mode="clip")

        if s.positions == "absolute":
            x_BxLxD = x_BxLxD + looked_up("position", self.max_length, "length", at.positions)
        direction_2xD = table("direction", 2, None)
        x_BxLxD = x_BxLxD + direction_2xD[0 if direction == "forward" else 1].reshape(1, 1, dim)
        if s.event_types:
            x_BxLxD = x_BxLxD + looked_up("event", s.event_types + 1, None, at.events)
        if s.query_time:
            gap_BxL = time_bucket(jnp.abs(at.asked - at.times), GAPS)
            x_BxLxD = x_BxLxD + looked_up("gap", GAPS, None, gap_BxL)
        if "sinusoidal" in s.time:
            clocks = [*hands(at.times, CLOCKS), *(hands(at.asked, CLOCKS) if s.query_time else ())]
            kernel = Dense((dim,), (None, "embed"), self.dtype, name="clocks")
            x_BxLxD = x_BxLxD + kernel(jnp.concatenate(clocks, axis=-1)).astype(jnp.float32)
        return x_BxLxD

    def _places(
        self, at: Moments, counters_BxL: Array, direction: Direction, features: int, ring: Ring | None
    ) -> Places:
        s = self.sight
        reach_BxL = jnp.minimum(at.positions, s.window - 1) if s.window else at.positions
        places = Places(reach_BxL, at.positions, counters_BxL, direction, ring=ring)
        if not s.time:
            return places
        asked_BxL = at.asked if s.query_time else at.times
        if "bias" in s.time:
            places = dataclasses.replace(places, times=at.times, asked=asked_BxL)
        if "rotary" in s.time:
            places = dataclasses.replace(places, turns=turns(asked_BxL, at.times, features))
        return places

    @property
    def settings(self) -> BlockSettings:
        """Of all blocks."""
        s = self.sight
        return BlockSettings(
            heads=self.heads,
            feedforward=self.feedforward,
            dropout=self.dropout,
            dtype=self.dtype,
            window=s.window,
            time_buckets=s.time_buckets if "bias" in s.time else 0,
            distances=(s.window or self.max_length) if s.positions == "relative" else 0,
        )

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
        return block(self.settings, parent=self, name=name)

    def _scanned(self, x_BxLxD: Array, places: Places, layers: int) -> Array:
        def step(block: nn.Module, x_BxLxD: Array, places: Places) -> tuple[Array, None]:
            return constrain(block(x_BxLxD, places), "batch", None, None), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0, MEMORY: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self._block("blocks", scanned=True), x_BxLxD, places)[0]
