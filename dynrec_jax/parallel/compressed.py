"""Item tables in fewer bits, for ranking: bfloat16, or int8 with a scale for each row.

Rows are turned back to float32 block by block while they are scored (`blocks.in_turn`), so that no float copy of the
table is ever held. An int8 row is symmetric: `v ≈ scale · q`, `scale = max |v| / 127`, `q` in -127 .. 127, so an
element is off by half a scale at most, a row of zeros stays one, and a row's scale may multiply its score instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

KINDS = ("float32", "bfloat16", "int8")  # how numbers may be kept
LARGEST = 127  # of an int8 row; -128 is not used, so that both signs reach as far


class Compressed(NamedTuple):
    """A compressed table; it lies over devices as the table did.

    Attributes:
      values: int8[R, D], or the bits of bfloat16, uint16[R, D]: of an array of bfloat16 XLA on CPU would make float32,
        whole, before it cuts a block out of it.
      scales: float32[R], what multiplies each row; None of bfloat16.
    """

    values: Array
    scales: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[R, D]."""
        return self.values.shape

    @property
    def bytes(self) -> int:
        """Of all devices together."""
        return sum(x.size * x.dtype.itemsize for x in self if x is not None)


Table = Array | Compressed  # what can be ranked


def compressed(table_RxD: Array, kind: str) -> Compressed:
    """A table in fewer bits: "bfloat16" or "int8"."""
    if kind == "bfloat16":
        return Compressed(jax.lax.bitcast_convert_type(table_RxD.astype(jnp.bfloat16), jnp.uint16))
    if kind != "int8":
        raise ValueError(f"{kind!r} compresses no table; expected one of {', '.join(KINDS[1:])}")
    return Compressed(*rounded(table_RxD, (1,)))


def rounded(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """int8 values of `x`, and float32 scales, one for all that lies along `axes`, which it lacks."""
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / LARGEST
    values = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    return values.astype(jnp.int8), jnp.squeeze(scale, axes)
