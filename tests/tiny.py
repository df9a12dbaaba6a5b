"""Models, batches and meshes so small that a test compiles them in a second."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from dynrec_jax.batch import Batch
from dynrec_jax.config import default_config, flat, validate
from dynrec_jax.models.bstm import Bstm
from dynrec_jax.models.model import make_bstm
from dynrec_jax.parallel.mesh import make_mesh

Row = Sequence[tuple[int, Sequence[int]]]  # windows of one row: (its number in the batch, its items)

SMALL: dict[str, Any] = {
    "data.max_length": 8,
    "data.windows": "last",
    "model.dim": 8,
    "model.layers": 1,
    "model.dropout": 0.0,
    "model.positions": "absolute",
    "model.backward_weight": 0.5,
    "model.temperature": 0.5,
    "loss.block_items": 16,
    "loss.block_positions": 8,
    "loss.negatives": 6,
    "train.steps": 12,
    "train.batch_size": 8,
    "train.learning_rate": 1e-2,
    "evaluation.ks": (1, 5, 10),
    "evaluation.batch_size": 16,
}


# Keys of models that no weight depends on.
FREE = ("dropout", "temperature", "normalise", "hops", "forward_weight", "backward_weight", "dtype", "remat")
WITHOUT_WEIGHTS = {f"model.{name}" for name in FREE}


def config(**changes: Any) -> ml_collections.ConfigDict:
    """A small config; `changes` are keys with `__` for the dot, as in `model__block="seed"`."""
    c = default_config()
    c.update_from_flattened_dict(
        {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    )
    validate(c)
    return c


def bstm(
    items: int, seed: int = 0, event_types: tuple[str, ...] = (), **changes: Any
) -> tuple[Bstm, Any, Any]:
    """A small model with its params and tables."""
    c = config(**changes)
    kept = {
        key: value
        for key, value in flat(c).items()
        if key.startswith(("model.", "data.max_length")) and key not in WITHOUT_WEIGHTS
    }
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in kept.items())
    variables = _variables(items, seed, event_types, frozen)
    return make_bstm(c, items, event_types=event_types), variables["params"], variables["tables"]


@functools.cache
def _variables(items: int, seed: int, event_types: tuple[str, ...], keys: tuple[tuple[str, Any], ...]) -> Any:
    """Fresh variables: they depend on these keys alone, so models that share them compile `init` once."""
    c = config(**{key.replace(".", "__"): value for key, value in keys})
    model = make_bstm(c, items, event_types=event_types)
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(seed)))


def shaken(params: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """The params with noise, those that begin as zeros too."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [leaf + rng.normal(0.0, scale, leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, noisy)


def batch(rows: Sequence[Row], width: int) -> Batch:
    """A batch whose windows lie in the rows as told, written out event by event."""
    arrays = {name: np.zeros((len(rows), width), np.int32) for name in Batch._fields}
    for r, windows in enumerate(rows):
        at = 0
        for number, items in windows:
            for place, item in enumerate(items):
                arrays["items"][r, at] = item
                arrays["segments"][r, at] = number
                arrays["positions"][r, at] = place
                arrays["remaining"][r, at] = len(items) - 1 - place
                at += 1
    return Batch(**{name: jnp.asarray(array) for name, array in arrays.items()})


def mesh(*sizes: int, slices: int = 1) -> Mesh:
    """A mesh of (data, fsdp, tensor) devices in each slice, the first of those there are."""
    return make_mesh(*sizes, slices=slices, devices=jax.devices()[: slices * math.prod(sizes)])
