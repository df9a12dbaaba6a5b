"""Blocks of the user encoder and what they are made of.

A block maps `[B, L, D]` to `[B, L, D]` under a mask `[B, L, L]` that says which positions may look at which, with
counters `[B, L]` for dropout. The config names it; `BLOCKS` at the end lists the names.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


def token_counters(segments_BxL: Array, positions_BxL: Array) -> Array:
    """uint32[B, L], a number for each event of a batch that depends on its window and place in it alone."""
    segments = segments_BxL.astype(jnp.uint32)
    return _mix(_mix(segments) + positions_BxL.astype(jnp.uint32))


def hash_bits(key: Array, counters_BxL: Array, features: int) -> Array:
    """Random uint32 bits [B, L, features] from (key, event, feature).

    The bits do not depend on how windows lie in rows or rows on devices, so dropout is the same on any mesh, and
    each device makes its own. One more round of the 32-bit finaliser "lowbias32" (C. Wellons, Hash Prospector,
    2018) for each element: some five times fewer instructions than threefry, on every backend.
    """
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    event_BxL = _mix(counters_BxL ^ words[0]) + words[-1]
    feature_F = jnp.arange(features, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return _mix(event_BxL[..., None] + feature_F[None, None, :])


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Dropout(nn.Module):
    """Sets elements to zero with probability `rate` and scales the others by 1 / (1 - rate).

    Active where the rng stream "dropout" is given, and only there.
    """

    rate: float

    @nn.compact
    def __call__(self, x_BxLxD: Array, counters_BxL: Array) -> Array:
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x_BxLxD
        threshold = jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        kept = hash_bits(self.make_rng("dropout"), counters_BxL, x_BxLxD.shape[-1]) >= threshold
        return jnp.where(kept, x_BxLxD * jnp.asarray(1.0 / (1.0 - self.rate), x_BxLxD.dtype), 0)


class RmsNorm(nn.Module):
    """`x / rms(x) · scale` over the last axis (Zhang & Sennrich 2019), computed in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale_D = self.param("scale", init, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean) / deviation · scale + bias` over the last axis (Ba et al. 2016), computed in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        named = nn.with_logical_partitioning
        scale_D = self.param(
            "scale", named(nn.initializers.ones_init(), ("embed",)), (x.shape[-1],), jnp.float32
        )
        bias_D = self.param(
            "bias", named(nn.initializers.zeros_init(), ("embed",)), (x.shape[-1],), jnp.float32
        )
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        lead = (1,) * (x.ndim - 1) + (-1,)
        return (y * scale_D.reshape(lead) + bias_D.reshape(lead)).astype(x.dtype)


def dense(
    features: int | tuple[int, ...], names: tuple[str, ...], dtype: Any, name: str, axis: Any = -1
) -> Any:
    """A linear map without bias whose kernel carries logical axis names."""
    init = nn.with_logical_partitioning(nn.initializers.variance_scaling(1.0, "fan_in", "normal"), names)
    return nn.DenseGeneral(
        features, axis=axis, use_bias=False, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, name=name
    )


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017); softmax in float32.

    A position that may look at nothing (padding in the backward traversal) gets a mean that nobody reads.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Array, mask_BxLxL: Array) -> Array:
        dim = x_BxLxD.shape[-1]
        each = dim // self.heads
        names = ("embed", "heads", "head_dim")

        def project(name: str) -> Array:
            # Heads before length: the products below are then plain batched matrix products, which run two to
            # three times faster on CPU than with the head axis inside.
            return dense((self.heads, each), names, self.dtype, name)(x_BxLxD).swapaxes(1, 2)

        q_BxHxLxE = project("query") * each**-0.5
        s_BxHxLxL = jnp.einsum(
            "bhqe,bhke->bhqk", q_BxHxLxE, project("key"), preferred_element_type=jnp.float32
        )
        s_BxHxLxL = jnp.where(mask_BxLxL[:, None], s_BxHxLxL, -1e30)
        p_BxHxLxL = jax.nn.softmax(s_BxHxLxL, axis=-1).astype(self.dtype)
        y_BxLxHxE = jnp.einsum("bhqk,bhke->bhqe", p_BxHxLxL, project("value")).swapaxes(1, 2)
        return dense(dim, ("heads", "head_dim", "embed"), self.dtype, "out", axis=(-2, -1))(y_BxLxHxE)


class SeedBlock(nn.Module):
    """Attention with a residual, then a ReLU feed-forward with a residual, each normalised behind the sum."""

    heads: int
    feedforward: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Array, mask_BxLxL: Array, counters_BxL: Array) -> Array:
        dim = x_BxLxD.shape[-1]
        hidden = round(dim * self.feedforward)
        a_BxLxD = Attention(self.heads, self.dtype, name="attention")(x_BxLxD, mask_BxLxL)
        x_BxLxD = LayerNorm(name="attention_norm")(x_BxLxD + Dropout(self.dropout)(a_BxLxD, counters_BxL))
        h_BxLxF = nn.relu(dense(hidden, ("embed", "hidden"), self.dtype, "up")(x_BxLxD))
        y_BxLxD = dense(dim, ("hidden", "embed"), self.dtype, "down")(h_BxLxF)
        return LayerNorm(name="feedforward_norm")(x_BxLxD + Dropout(self.dropout)(y_BxLxD, counters_BxL))


class PrenormBlock(nn.Module):
    """Normalise, attend, add; normalise, SiLU-gated feed-forward (Shazeer 2020), add.

    The gate doubles the first product, so the hidden width is two thirds of `feedforward · D`.
    """

    heads: int
    feedforward: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Array, mask_BxLxL: Array, counters_BxL: Array) -> Array:
        dim = x_BxLxD.shape[-1]
        hidden = max(8, round(dim * self.feedforward * 2 / 3 / 8) * 8)
        a_BxLxD = Attention(self.heads, self.dtype, name="attention")(
            RmsNorm(name="attention_norm")(x_BxLxD), mask_BxLxL
        )
        x_BxLxD = x_BxLxD + Dropout(self.dropout)(a_BxLxD, counters_BxL)
        h_BxLxD = RmsNorm(name="feedforward_norm")(x_BxLxD)
        gate_BxLxF = nn.silu(dense(hidden, ("embed", "hidden"), self.dtype, "gate")(h_BxLxD))
        h_BxLxF = gate_BxLxF * dense(hidden, ("embed", "hidden"), self.dtype, "up")(h_BxLxD)
        y_BxLxD = dense(dim, ("hidden", "embed"), self.dtype, "down")(h_BxLxF)
        return x_BxLxD + Dropout(self.dropout)(y_BxLxD, counters_BxL)


BLOCKS: dict[str, Any] = {"prenorm": PrenormBlock, "seed": SeedBlock}
