"""Blocks of the user encoder.

A block maps `[B, L, D]` to `[B, L, D]`, or to the vectors that are wanted alone, `[B, 1, D]`, given where the events
stand. The config names it; `BLOCKS` at the end lists the names.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.models.attention import Direction, Way, attention, attention_at, bounds
from dynrec_jax.models.bias import Bias, distance_bias_of, time_bias_of
from dynrec_jax.models.layers import Dense, Dropout, LayerNorm, RmsNorm
from dynrec_jax.models.time import Turns, turned

Array = jax.Array
MEMORY = "memory"  # collection of the keys and values that a user's state keeps
# Attention's bias is so many times its parameters. Adam moves a parameter by the learning rate a step, so that of some
# hundred steps a bias would stay below 1, which singles nothing out; events of the same page need 3 and more.
BIAS_SCALE = 10.0


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What all blocks of an encoder have in common.

    Attributes:
      heads: H.
      feedforward: hidden width as a multiple of D.
      dropout: rate.
      dtype: of activations and products.
      window: positions that a query looks at, itself included; 0 for all of its history.
      time_buckets: T of attention's bias by the time between events; 0 for none.
      distances: P of its bias by the events between them; 0 for none.
    """

    heads: int
    feedforward: float
    dropout: float
    dtype: Any
    window: int = 0
    time_buckets: int = 0
    distances: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """Where keys and values of a user's last W events lie, for one more event of each user.

    Attributes:
      slot: int32[B], where those of the new event go; -1 where a user has none.
      inside: bool[B, W], slots that the new event looks at, its own included.
      distance: int32[B, W], events between each slot's event and the new one; of its own 0.
      times: int32[B, W], seconds; the new event's own included.
    """

    slot: Array
    inside: Array
    distance: Array
    times: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """What a block knows of the events besides their vectors; a tree, so that blocks can be scanned and computed again.

    Attributes:
      reach: int32[B, L], how many events before it (backward: behind it) an event may look at.
      first: int32[B, L], how many events of its history the traversal has read before it: 0 begins a history.
      counters: uint32[B, L], numbers of the events that dropout's bits are made from.
      direction: of the traversal.
      read: int32[B], the only position of each row whose vector is wanted; None for all of them.
      times: int32[B, L], seconds, where attention's bias knows of time; otherwise None.
      asked: int32[B, L], the moment at which each position asks; given where `times` are.
      turns: of queries and of keys, where time turns them (`models.time`); otherwise None.
      ring: given where L is 1 and the rest of the history is in memory.
    """

    reach: Array
    first: Array
    counters: Array
    direction: Direction = dataclasses.field(metadata={"static": True})
    read: Array | None = None
    times: Array | None = None
    asked: Array | None = None
    turns: Turns | None = None
    ring: Ring | None = None

    def wanted(self, x: Array) -> Array:
        """What is wanted of an array `[B, L, …]`: all of it, or `[B, 1, …]`."""
        if self.read is None:
            return x
        return jnp.take_along_axis(x, self.read.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


class Attention(nn.Module):
    """Multi-head attention of a history over itself; gives what is wanted of it.

    By the softmax of scaled products (Vaswani et al. 2017); or pointwise, in HSTU's manner (Zhai et al. 2024): queries,
    keys, values and a gate go through SiLU, scores too instead of a softmax, and `norm(means) · gate` is what comes
    out. Reads one event after the other where `Places.ring` is given, and then keeps keys and values in the collection
    "memory", `[B, H, W, E]` each.

    Attributes:
      settings: of all blocks.
      pointwise: in HSTU's manner.
      uniform: no weights at all: the mean of what is read, as it is.
    """

    settings: BlockSettings
    pointwise: bool = False
    uniform: bool = False

    @nn.compact
    def __call__(self, x_BxLxD: Array, at: Places) -> Array:
        dim, heads = x_BxLxD.shape[-1], self.settings.heads
        dtype = self.settings.dtype
        if self.uniform:
            zero_Bx1xLx1 = jnp.zeros((*x_BxLxD.shape[:2], 1), dtype)[:, None]
            y_Bx1xQxD = self._look(at.wanted(zero_Bx1xLx1[:, 0])[:, None], zero_Bx1xLx1, x_BxLxD[:, None], at)
            return y_Bx1xQxD[:, 0]

        def project(name: str, x: Array) -> Array:
            # Heads before length: the products are then plain batched matrix products, which run two to three
            # times faster on CPU than with the head axis inside.
            kernel = Dense((heads, dim // heads), ("embed", "heads", "head_dim"), dtype, name=name)
            y = kernel(x).swapaxes(1, 2)
            return nn.silu(y) if self.pointwise else y

        wanted = at.wanted(x_BxLxD)
        q_BxHxQxE = project("query", wanted)
        if not self.pointwise:
            q_BxHxQxE = q_BxHxQxE * (dim // heads) ** -0.5
        k_BxHxLxE, v_BxHxLxE = project("key", x_BxLxD), project("value", x_BxLxD)
        if at.turns is not None:
            q_BxHxQxE = turned(q_BxHxQxE, *(at.wanted(x) for x in at.turns.queries))
            k_BxHxLxE = turned(k_BxHxLxE, *at.turns.keys)
        y_BxQxHxE = self._look(q_BxHxQxE, k_BxHxLxE, v_BxHxLxE, at).swapaxes(1, 2)
        if self.pointwise:
            gate_BxQxHxE = project("gate", wanted).swapaxes(1, 2)
            y_BxQxD = LayerNorm(name="norm")(y_BxQxHxE.reshape(*y_BxQxHxE.shape[:2], dim))
            y_BxQxHxE = y_BxQxD.reshape(y_BxQxHxE.shape) * gate_BxQxHxE
        return Dense((dim,), ("heads", "head_dim", "embed"), dtype, inputs=2, name="out")(y_BxQxHxE)

    def _look(self, q: Array, k: Array, v: Array, at: Places) -> Array:
        """`[B, H, Q, E]`."""
        bias = self._bias(at)
        if at.ring is not None:
            return self._remember(q, k, v, at, at.ring, bias)
        if at.read is None:
            way = Way(at.direction, self.settings.window, self.pointwise)
            return attention(q, k, v, at.reach, way, bias)
        low_B, high_B = (at.wanted(bound_BxL)[:, 0] for bound_BxL in bounds(at.reach, at.direction))
        key_1xL = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
        inside_BxL = (low_B[:, None] <= key_1xL) & (key_1xL <= high_B[:, None])
        distance_BxL = jnp.abs(at.read[:, None] - key_1xL)
        added = self._added(bias, at, at.times, distance_BxL)
        return attention_at(q[:, :, 0], k, v, inside_BxL, added, self.pointwise)[:, :, None]

    def _remember(self, q: Array, k: Array, v: Array, at: Places, ring: Ring, bias: Bias | None) -> Array:
        """Puts the event's key and value where they belong, and looks at all that are there."""
        rows = k.shape[0]
        row_B = jnp.arange(rows)
        slot_B = jnp.where(ring.slot < 0, ring.inside.shape[1], ring.slot)  # beyond the last: nowhere

        def keep(name: str, new_BxHx1xE: Array) -> Array:
            shape = (*new_BxHx1xE.shape[:2], ring.inside.shape[1], new_BxHx1xE.shape[3])
            kept = self.variable(MEMORY, name, jnp.zeros, shape, new_BxHx1xE.dtype)
            # In place where the state is donated: one slot is written, and not all of them copied.
            kept.value = kept.value.at[row_B, :, slot_B].set(new_BxHx1xE[:, :, 0], mode="drop")
            return kept.value

        k_BxHxWxE, v_BxHxWxE = keep("keys", k), keep("values", v)
        added = self._added(bias, at, ring.times, ring.distance)
        return attention_at(q[:, :, 0], k_BxHxWxE, v_BxHxWxE, ring.inside, added, self.pointwise)[:, :, None]

    def _added(
        self, bias: Bias | None, at: Places, times_BxK: Array | None, distance_BxK: Array
    ) -> Array | None:
        """What the bias adds to the scores of single queries, float32[B, H, K]."""
        if bias is None:
            return None
        parts = []
        if bias.time is not None:
            assert at.asked is not None
            assert times_BxK is not None
            parts.append(time_bias_of(bias, at.wanted(at.asked)[:, 0], times_BxK))
        if bias.distance is not None:
            parts.append(distance_bias_of(bias, distance_BxK))
        return sum(parts[1:], parts[0])

    def _bias(self, at: Places) -> Bias | None:
        s = self.settings
        if self.uniform:
            return None
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads", None))
        time = distance = None
        if s.time_buckets:
            if at.times is None or at.asked is None:
                raise ValueError(
                    f"time_buckets={s.time_buckets}: attention needs the events' times; found none"
                )
            time = BIAS_SCALE * self.param("time_bias", init, (s.heads, s.time_buckets), jnp.float32)
        if s.distances:
            distance = BIAS_SCALE * self.param("distance_bias", init, (s.heads, s.distances), jnp.float32)
        return None if time is None and distance is None else Bias(time, at.asked, at.times, distance)


def hidden_width(block: str, dim: int, feedforward: float) -> int:
    """Units of a block's feed-forward. A gate doubles the first product: two thirds of them make as many weights.

    HSTU's block and the GRU's have none; their gates are as wide as a vector.
    """
    if block in ("hstu", "gru"):
        return dim
    if block == "seed":
        return round(dim * feedforward)
    return max(8, round(dim * feedforward * 2 / 3 / 8) * 8)


class SeedBlock(nn.Module):
    """Attention with a residual, then a ReLU feed-forward with a residual, each normalised behind the sum."""

    settings: BlockSettings

    @nn.compact
    def __call__(self, x_BxLxD: Array, at: Places) -> Array:
        s, dim = self.settings, x_BxLxD.shape[-1]
        hidden = hidden_width("seed", dim, s.feedforward)
        a_BxLxD = Attention(s, name="attention")(x_BxLxD, at)
        x_BxLxD, counters_BxL = at.wanted(x_BxLxD), at.wanted(at.counters)
        x_BxLxD = LayerNorm(name="attention_norm")(x_BxLxD + Dropout(s.dropout)(a_BxLxD, counters_BxL))
        h_BxLxF = nn.relu(Dense((hidden,), ("embed", "hidden"), s.dtype, name="up")(x_BxLxD))
        y_BxLxD = Dense((dim,), ("hidden", "embed"), s.dtype, name="down")(h_BxLxF)
        return LayerNorm(name="feedforward_norm")(x_BxLxD + Dropout(s.dropout)(y_BxLxD, counters_BxL))


class PrenormBlock(nn.Module):
    """Normalise, attend, add; normalise, SiLU-gated feed-forward (Shazeer 2020), add.

    The gate doubles the first product, so the hidden width is two thirds of `feedforward · D`.
    """

    settings: BlockSettings

    @nn.compact
    def __call__(self, x_BxLxD: Array, at: Places) -> Array:
        s, dim = self.settings, x_BxLxD.shape[-1]
        hidden = hidden_width("prenorm", dim, s.feedforward)
        a_BxLxD = Attention(s, name="attention")(RmsNorm(name="attention_norm")(x_BxLxD), at)
        x_BxLxD, counters_BxL = at.wanted(x_BxLxD), at.wanted(at.counters)
        x_BxLxD = x_BxLxD + Dropout(s.dropout)(a_BxLxD, counters_BxL)
        h_BxLxD = RmsNorm(name="feedforward_norm")(x_BxLxD)
        gate_BxLxF = nn.silu(Dense((hidden,), ("embed", "hidden"), s.dtype, name="gate")(h_BxLxD))
        h_BxLxF = gate_BxLxF * Dense((hidden,), ("embed", "hidden"), s.dtype, name="up")(h_BxLxD)
        y_BxLxD = Dense((dim,), ("hidden", "embed"), s.dtype, name="down")(h_BxLxF)
        return x_BxLxD + Dropout(s.dropout)(y_BxLxD, counters_BxL)


class HstuBlock(nn.Module):
    """Normalise, attend pointwise behind a gate, add (Zhai et al. 2024); there is no feed-forward."""

    settings: BlockSettings

    @nn.compact
    def __call__(self, x_BxLxD: Array, at: Places) -> Array:
        y_BxLxD = Attention(self.settings, pointwise=True, name="attention")(
            LayerNorm(name="attention_norm")(x_BxLxD), at
        )
        return at.wanted(x_BxLxD) + Dropout(self.settings.dropout)(y_BxLxD, at.wanted(at.counters))


class MeanBlock(nn.Module):
    """The mean of all that a position may look at, and a gated feed-forward: an interest that does not move.

    What a dynamic model is compared with: no event of a history counts more than another.
    """

    settings: BlockSettings

    @nn.compact
    def __call__(self, x_BxLxD: Array, at: Places) -> Array:
        s, dim = self.settings, x_BxLxD.shape[-1]
        hidden = hidden_width("mean", dim, s.feedforward)
        x_BxLxD = Attention(s, uniform=True, name="attention")(x_BxLxD, at)
        h_BxLxD = RmsNorm(name="feedforward_norm")(x_BxLxD)
        gate_BxLxF = nn.silu(Dense((hidden,), ("embed", "hidden"), s.dtype, name="gate")(h_BxLxD))
        h_BxLxF = gate_BxLxF * Dense((hidden,), ("embed", "hidden"), s.dtype, name="up")(h_BxLxD)
        y_BxLxD = Dense((dim,), ("hidden", "embed"), s.dtype, name="down")(h_BxLxF)
        return x_BxLxD + Dropout(s.dropout)(y_BxLxD, at.wanted(at.counters))


class GruBlock(nn.Module):
    """Normalise, read with a GRU (Cho et al. 2014) in the traversal's direction, add; GRU4Rec (Hidasi et al. 2016).

    It begins anew with each history, and knows nothing of windows: what it remembers is one vector.
    """

    settings: BlockSettings

    @nn.compact
    def __call__(self, x_BxLxD: Array, at: Places) -> Array:
        dim, dtype = x_BxLxD.shape[-1], self.settings.dtype
        init = nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1.0, "fan_in", "normal"), ("embed", None)
        )
        back_DxG = self.param("recurrent", init, (dim, 3 * dim), jnp.float32).astype(dtype)
        read = Dense((3 * dim,), ("embed", None), dtype, name="input")
        gates_BxLxG = read(RmsNorm(name="gru_norm")(x_BxLxD))

        def step(h_BxD: Array, event: tuple[Array, Array]) -> tuple[Array, Array]:
            gates_BxG, begins_B = event
            h_BxD = jnp.where(begins_B[:, None], jnp.zeros_like(h_BxD), h_BxD)
            from_x, from_h = jnp.split(gates_BxG, 3, axis=-1), jnp.split(h_BxD @ back_DxG, 3, axis=-1)
            reset, keep = (nn.sigmoid(x + h) for x, h in zip(from_x[:2], from_h[:2], strict=True))
            new_BxD = jnp.tanh(from_x[2] + reset * from_h[2])
            h_BxD = keep * h_BxD + (1 - keep) * new_BxD
            return h_BxD, h_BxD

        if at.ring is not None:
            y_BxLxD = self._remember(step, gates_BxLxG, at, at.ring)
        else:
            zero_BxD = jnp.zeros((x_BxLxD.shape[0], dim), dtype)
            events = gates_BxLxG.swapaxes(0, 1), (at.first == 0).swapaxes(0, 1)
            _, h_LxBxD = jax.lax.scan(step, zero_BxD, events, reverse=at.direction == "backward")
            y_BxLxD = h_LxBxD.swapaxes(0, 1)
        y_BxLxD = Dense((dim,), (None, "embed"), dtype, name="out")(at.wanted(y_BxLxD))
        return at.wanted(x_BxLxD) + Dropout(self.settings.dropout)(y_BxLxD, at.wanted(at.counters))

    def _remember(self, step: Any, gates_Bx1xG: Array, at: Places, ring: Ring) -> Array:
        rows, dim = gates_Bx1xG.shape[0], gates_Bx1xG.shape[-1] // 3
        # As wide as keys are, so that all blocks' memory has the users on one axis.
        kept = self.variable(MEMORY, "state", jnp.zeros, (rows, 1, 1, dim), gates_Bx1xG.dtype)
        h_BxD = kept.value[:, 0, 0]
        after_BxD, _ = step(h_BxD, (gates_Bx1xG[:, 0], at.first[:, 0] == 0))
        here_Bx1 = (ring.slot >= 0)[:, None]
        kept.value = jnp.where(here_Bx1, after_BxD, h_BxD)[:, None, None]
        return after_BxD[:, None]


BLOCKS: dict[str, Any] = {
    "prenorm": PrenormBlock,
    "seed": SeedBlock,
    "hstu": HstuBlock,
    "gru": GruBlock,
    "mean": MeanBlock,
}
