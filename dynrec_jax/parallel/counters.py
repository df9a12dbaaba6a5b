"""Random bits from counters: the same however windows are packed into rows and rows lie on devices."""

import jax
import jax.numpy as jnp

Array = jax.Array


def mix(x: Array) -> Array:
    """The 32-bit finaliser "lowbias32" (C. Wellons, Hash Prospector, 2018), of uint32 of any shape."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def token_counters(segments: Array, positions: Array) -> Array:
    """uint32, a number for each event of a batch that depends on its window and place in it alone."""
    return mix(mix(segments.astype(jnp.uint32)) + positions.astype(jnp.uint32))


def token_bits(key: Array, counters: Array) -> Array:
    """32 random bits of each event, from a key and its counter."""
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    return mix(mix(counters ^ words[0]) + words[-1])
