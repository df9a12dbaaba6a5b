"""The user encoder in fewer bits, and with fewer weights: what is left of a trained model where it only reads.

Its matrices alone change, those that multiply what flows through it; biases, norms, positions and what else is added
stay as they are, and so does the item encoder, which makes the items' vectors once.

- bfloat16, or int8 with a scale for each output channel (symmetric, as `parallel.compressed`). They are turned back to
  float32 inside the program that reads histories (`restored`), which multiplies in the model's own type.
- Pruning by magnitude (Han et al., NeurIPS 2015), without training anew: of each matrix, the stated share of weights
  that are nearest to 0 is set to 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.parallel.compressed import rounded

Array = jax.Array

ENCODER = "user"  # what its weights are called, in an ensemble those of both parts
MATRICES = ("kernel", "recurrent")
STACKED = "blocks"  # a module whose first axis is that of the layers
JOINS = "out"  # a map to one axis from all others; other maps are from one axis to all others


class Rounded(NamedTuple):
    """An int8 matrix.

    Attributes:
      values: int8, of the matrix's shape.
      scales: float32, one for each output channel, 1 along the axes that go in.
    """

    values: Array
    scales: Array


@functools.partial(jax.jit, static_argnums=1)
def pruned(params: Any, share: float) -> Any:
    """Weights with `share` of each of the encoder's matrices set to 0; of equal magnitudes the first ones."""

    def prune(kernel: Array, inputs: tuple[int, ...]) -> Array:
        del inputs
        flat = kernel.reshape(-1)
        none = round(share * flat.size)
        return flat.at[jnp.argsort(jnp.abs(flat))[:none]].set(0.0).reshape(kernel.shape)

    return _changed(params, prune)


@functools.partial(jax.jit, static_argnums=1)
def compressed_encoder(params: Any, kind: str) -> Any:
    """Weights whose encoder's matrices are "bfloat16" or "int8"; `restored` makes them numbers to compute with."""

    def compress(kernel: Array, inputs: tuple[int, ...]) -> Any:
        if kind == "bfloat16":
            return kernel.astype(jnp.bfloat16)
        values, scales = rounded(kernel, inputs)
        return Rounded(values, jnp.expand_dims(scales, inputs))

    return params if kind == "float32" else _changed(params, compress)


def restored(params: Any) -> Any:
    """Weights in float32; those that are so stay as they are."""

    def restore(leaf: Any) -> Any:
        if isinstance(leaf, Rounded):
            return leaf.values.astype(jnp.float32) * leaf.scales
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(restore, params, is_leaf=_is_rounded)


def encoder_bytes(params: Any) -> int:
    """Bytes of the encoder's weights."""
    leaves = jax.tree.leaves_with_path(params)
    return sum(leaf.size * leaf.dtype.itemsize for path, leaf in leaves if ENCODER in _names(path))


def _is_rounded(leaf: Any) -> bool:
    return isinstance(leaf, Rounded)


def _names(path: Any) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


def _changed(params: Any, change: Callable[[Array, tuple[int, ...]], Any]) -> Any:
    """`change(matrix, axes that go in)` of each of the encoder's matrices; of stacked layers each for itself."""

    def leaf(path: Any, x: Array) -> Any:
        names = _names(path)
        if ENCODER not in names or names[-1] not in MATRICES:
            return x
        axes = x.ndim - (STACKED in names)
        inputs = tuple(range(axes - 1)) if names[-2] == JOINS else (0,)
        return jax.vmap(lambda each: change(each, inputs))(x) if STACKED in names else change(x, inputs)

    return jax.tree.map_with_path(leaf, params)
