"""A digest of an array that any machine can verify: the same for any sharding, computed where the array lies.

Every element is mixed with its row and column and the results are added up modulo 2^32, in several lanes. Addition
does not care about order, so devices add up what they hold. One element that changes always changes the first
lane, because the mix is a bijection of the element's bits; other changes go unnoticed once in 2^128.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynrec_jax.parallel.counters import mix

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
    place = mix(mix(row + jnp.uint32(0x9E3779B9)) + column)
    first = mix(bits ^ place)
    second = mix(first + place + jnp.uint32(0x85EBCA6B))
    third = first * (second | jnp.uint32(1))
    fourth = second ^ (third >> 15)
    # One reduction of all lanes: four by themselves would first write each lane out, as large as the array.
    lanes = (first, second, third, fourth)
    return jnp.stack(jax.lax.reduce(lanes, (jnp.uint32(0),) * LANES, _add, tuple(range(bits.ndim))))


def _add(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(one, other, strict=True))


def digests(arrays: Sequence[Any]) -> list[str]:
    """The digest of each array, 32 hex digits.

    Arrays on a mesh that spans processes are digested by all processes together, and each gets the result.
    """
    if not arrays:
        return []
    meshes = {x.sharding.mesh for x in arrays if isinstance(getattr(x, "sharding", None), NamedSharding)}
    mesh = meshes.pop() if len(meshes) == 1 else None
    lanes = np.asarray(_compiled(mesh)(list(arrays)), np.uint32)
    return [row.astype(">u4").tobytes().hex() for row in lanes]


@functools.cache
def _compiled(mesh: Mesh | None) -> Any:
    """Digests of a list of arrays, uint32[len, LANES], whole on every device of a mesh."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def run(arrays: list[Array]) -> Array:
        return jnp.stack([digest(x) for x in arrays])

    return jax.jit(run, out_shardings=whole)


def tree_digest(tree: Any) -> str:
    """32 hex digits that stand for all leaves of a tree, in its order."""
    return hashlib.sha256("".join(digests(jax.tree.leaves(tree))).encode()).hexdigest()[:32]
