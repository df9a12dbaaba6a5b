"""Towers of dense vectors made elsewhere: of images, of sound, of a language model. Columns of lists of numbers."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
from flax import linen as nn

from dynrec_jax.data.arrow import numbers
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.models.layers import Dense, LayerNorm
from dynrec_jax.models.towers.tower import Described, Job, Tower, centred, parameter_name

Array = jax.Array


class VectorTower(nn.Module):
    """A vector of E numbers, normalised and mapped to D. A vector of zeros is none.

    Attributes:
      source: name of the vectors in what is looked up.
      dim: D.
      dtype: of the product.
    """

    source: str
    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, described: Described) -> tuple[Array, Array]:
        x = described[self.source].astype(jnp.float32)
        present = jnp.any(x != 0, axis=-1, keepdims=True)
        h = LayerNorm(name="norm")(x)
        v = Dense((self.dim,), (None, "embed"), self.dtype, name="project")(h).astype(jnp.float32)
        return jnp.where(present, v * self.dim**-0.5, 0.0), present


def columns(config: ml_collections.ConfigDict) -> set[str]:
    """The columns of vectors that a config names."""
    return set(config.item.vectors)


def check(job: Job) -> None:
    """Raises ConfigError or DataError; see `read`."""
    list(read(job))


def read(job: Job) -> Iterator[Tower]:
    """A tower for each column that the config names.

    Raises:
      ConfigError: there is no such column, or it holds no vectors, or such of one number.
      DataError: new items' vectors have another length than the dataset's.
    """
    for number, name in enumerate(job.config.item.vectors):
        known = column(job.dataset.items_table(), name, job)
        size = known.shape[1]
        if size < 2:
            raise ConfigError(
                f"config.item.vectors: item column {name!r} holds {'one number' if size else 'nothing'} an item; "
                "expected vectors of two numbers and more, for it is their direction that tells"
            )
        values = known
        if job.new:
            values = column(job.items, name, job) if name in job.items.column_names else known[:0]
            if not values.any():
                values = np.zeros((job.items.num_rows, size), np.float32)
            if values.shape[1] != size:
                raise DataError(
                    f"new items: vectors of {name!r} have {values.shape[1]} numbers; expected {size}, as the dataset's"
                )
        source = f"vector:{name}"
        made = functools.partial(VectorTower, source)
        yield Tower(parameter_name("vector", number, name), made, {source: centred(values, known)})


def column(items: pa.Table, name: str, job: Job) -> np.ndarray:
    """float32[items, E]; zeros where an item has none."""
    if name not in items.column_names:
        there = ", ".join(items.column_names[2:]) or "none"
        raise ConfigError(
            f"config.item.vectors: {job.dataset.path} has no item column {name!r}; found {there}"
        )
    found = items.column(name).combine_chunks()
    if not (pa.types.is_list(found.type) and pa.types.is_floating(found.type.value_type)):
        raise ConfigError(
            f"config.item.vectors: item column {name!r} is {found.type}; expected lists of numbers"
        )
    lengths = np.diff(numbers(found.offsets))
    size = int(lengths.max(initial=0))
    if wrong := np.flatnonzero((lengths != 0) & (lengths != size)).tolist():
        raise DataError(
            f"item column {name!r}: a vector of {lengths[wrong[0]]} numbers (item "
            f"{items.column('item_id')[wrong[0]]}), and others of {size}; expected one length"
        )
    values = np.zeros((len(found), size), np.float32)
    values[lengths > 0] = numbers(found.flatten()).reshape(np.count_nonzero(lengths), size)
    return values
