"""A digest of an array that any machine can verify: the same for any sharding, computed where the array lies.

Every element is mixed with its row and column and the results are added up modulo 2^32, in several lanes. Addition
does not care about order, so devices add up what they hold. One element that changes always changes the first
lane, because the mix is a bijection of the element's bits; other changes go unnoticed once in 2^128.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
LANES = 4
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digest(x: Array) -> Array:
    """uint32[LANES] of an array of numbers of up to 32 bits; shape and type are not part of it.

    Raises:
      ValueError: elements of another size.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize not in WORDS:
        raise ValueError(f"a digest of {x.dtype}: expected elements of 1, 2 or 4 bytes")
    bits = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    bits = bits.reshape(bits.shape or (1,))
    row = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0)
    column = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(1, bits.ndim)):
        column += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    place = _mix(_mix(row + jnp.uint32(0x9E3779B9)) + column)
    first = _mix(bits ^ place)
    second = _mix(first + place + jnp.uint32(0x85EBCA6B))
    third = first * (second | jnp.uint32(1))
    fourth = second ^ (third >> 15)
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in (first, second, third, fourth)])


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def tree_digest(tree: Any) -> str:
    """32 hex digits that stand for all leaves of a tree, in its order."""
    lanes = np.asarray(jax.jit(lambda leaves: [digest(x) for x in leaves])(jax.tree.leaves(tree)), np.uint32)
    return hashlib.sha256(lanes.tobytes()).hexdigest()[:32]
