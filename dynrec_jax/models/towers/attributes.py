"""Towers of attribute sets: brands, categories, genres.

An item's vector is the sum of its attributes', over the root of their number.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
from flax import linen as nn

from dynrec_jax.errors import ConfigError
from dynrec_jax.models.towers.tower import (
    Described,
    Job,
    Tower,
    Values,
    looked_up,
    parameter_name,
    summed,
)

Array = jax.Array
MOST = 32  # attributes of an item that are looked at: the first ones
FEWEST_ITEMS = 2  # an attribute of one item alone says no more than its id


class AttributeTower(nn.Module):
    """The sum of the embeddings of an item's attributes, over the root of their number.

    Attributes:
      source: name of the attributes in what is looked up, int32[..., A], from 1; 0 is none.
      size: number of attributes, V.
      dim: D.
      dtype: not used; embeddings are float32.
    """

    source: str
    size: int
    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, described: Described) -> tuple[Array, Array]:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.dim**-0.5), (None, "embed"))
        table_VxD = self.param("embedding", init, (self.size + 1, self.dim), jnp.float32)
        total, count = summed(functools.partial(looked_up, table_VxD), described[self.source])
        # A sum of independent vectors grows with the root of their number.
        return total * jax.lax.rsqrt(jnp.maximum(count, 1).astype(jnp.float32)), count > 0


def columns(config: ml_collections.ConfigDict) -> set[str]:
    """The columns of sets that a config names."""
    return {name.partition(":")[0] for name in config.item.attributes}


def check(job: Job) -> None:
    """Raises ConfigError; see `read`."""
    list(read(job))


def read(job: Job) -> Iterator[Tower]:
    """A tower for each column that the config names.

    Raises:
      ConfigError: there is no such column, or no attribute is shared by two items.
    """
    for position, asked in enumerate(job.config.item.attributes):
        name, _, separator = asked.partition(":")
        if name not in job.dataset.items_table().column_names:
            there = ", ".join(job.dataset.items_table().column_names[2:]) or "none"
            raise ConfigError(
                f"config.item.attributes: {job.dataset.path} has no item column {name!r}; found {there}"
            )
        found_type = job.dataset.items_table().schema.field(name).type
        if pa.types.is_list(found_type) and pa.types.is_floating(found_type.value_type):
            raise ConfigError(
                f"config.item.attributes: item column {name!r} holds vectors; name it in item.vectors"
            )
        sets = sets_of(job.dataset.items_table(), name, separator)
        counts = Counter(value for each in sets for value in each)
        words = sorted(word for word, count in counts.items() if count >= FEWEST_ITEMS)
        if not words:
            raise ConfigError(
                f"config.item.attributes: no value of item column {name!r} is shared by two items; leave it out"
            )
        number = {word: i for i, word in enumerate(words, 1)}
        known = [[number[value] for value in each if value in number][:MOST] for each in sets]
        width = max(map(len, known))
        if job.new:
            found = (
                sets_of(job.items, name, separator)
                if name in job.items.column_names
                else [()] * job.items.num_rows
            )
            known = [[number[value] for value in each if value in number][:width] for each in found]
        values = np.zeros((len(known), width), np.int32)
        for row, each in zip(values, known, strict=True):
            row[: len(each)] = each
        source = f"attributes:{name}"
        made = functools.partial(AttributeTower, source, len(words))
        yield Tower(
            parameter_name("attributes", position, name),
            made,
            {source: Values(values)},
            words={"embedding": (len(words) + 1, values)},
        )


def sets_of(items: pa.Table, name: str, separator: str) -> list[tuple[str, ...]]:
    """Each item's attributes, without repetition, in their order."""
    found = items.column(name)
    rows = found.to_pylist()
    if pa.types.is_list(found.type):
        rows = [() if row is None else (str(value) for value in row) for row in rows]
    elif separator:
        rows = [() if row is None else (part.strip() for part in row.split(separator)) for row in rows]
    else:
        rows = [() if row is None else (row,) for row in rows]
    return [tuple(dict.fromkeys(value for value in row if value)) for row in rows]
