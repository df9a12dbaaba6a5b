"""What blocks are made of: dropout, norms and linear maps that are the same on any mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from dynrec_jax.models.attention import SAVED
from dynrec_jax.parallel.counters import mix

Array = jax.Array


def hash_bits(key: Array, counters_BxL: Array, features: int) -> Array:
    """Random uint32 bits [B, L, features] from (key, event, feature).

    The bits do not depend on how windows lie in rows or rows on devices, so dropout is the same on any mesh, and
    each device makes its own. One more round of `mix` for each element: some five times fewer instructions than
    threefry, on every backend.
    """
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    event_BxL = mix(counters_BxL ^ words[0]) + words[-1]
    feature_F = jnp.arange(features, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return mix(event_BxL[..., None] + feature_F[None, None, :])


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


@jax.custom_vjp
def linear(x_PxI: Array, kernel_IxO: Array) -> Array:
    """`x · kernel`, `[P, O]`, multiplied in the type of `x` and of that type.

    Everything is added up in float32. So is the gradient of the kernel, a float32 matrix, and it stays so: rounded to
    bfloat16 first, it would also be added up in bfloat16 over devices.
    """
    # Two axes each: of bfloat16 products into float32, XLA on CPU cannot run all that have more.
    return _sum("pi,io->po", x_PxI, kernel_IxO.astype(x_PxI.dtype)).astype(x_PxI.dtype)


def _linear_forward(x_PxI: Array, kernel_IxO: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x_PxI, kernel_IxO), (x_PxI, kernel_IxO)


def _linear_backward(saved: tuple[Array, Array], g_PxO: Array) -> tuple[Array, Array]:
    x_PxI, kernel_IxO = saved
    dx_PxI = _sum("po,io->pi", g_PxO, kernel_IxO.astype(x_PxI.dtype)).astype(x_PxI.dtype)
    return dx_PxI, _sum("pi,po->io", x_PxI, g_PxO)


def _sum(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


linear.defvjp(_linear_forward, _linear_backward)


class Dense(nn.Module):
    """A linear map of the last axes, without bias, whose kernel carries logical axis names.

    Attributes:
      features: sizes of the axes that come out.
      names: logical names of the kernel's axes, those that go in first.
      dtype: of the product.
      inputs: how many axes go in.
    """

    features: tuple[int, ...]
    names: tuple[str, ...]
    dtype: Any
    inputs: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        lead, contracted = x.shape[: -self.inputs], x.shape[-self.inputs :]

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            # fan_in of all axes that go in: those of a head and the heads.
            flat = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            return flat(key, (math.prod(contracted), math.prod(self.features)), dtype).reshape(shape)

        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.names),
            (*contracted, *self.features),
            jnp.float32,
        )
        # One axis of positions: with two, XLA's gradient of the kernel takes twice as long on CPU.
        x_PxI = x.reshape(-1, math.prod(contracted)).astype(self.dtype)
        y_PxO = linear(x_PxI, kernel.reshape(math.prod(contracted), -1))
        return checkpoint_name(y_PxO, SAVED).reshape(*lead, *self.features)
