"""The tower of a knowledge graph: triples (head, relation, tail) between items and other things.

An item is described by what it is related to: the mean of its neighbours' vectors, each seen through its relation
(DistMult's product, Yang et al. 2015). Neighbours along a triple's direction and against it are told apart.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynrec_jax.errors import ConfigError
from dynrec_jax.models.towers.tower import Described, Job, Tower, Values

Array = jax.Array
MOST = 32  # neighbours of an item that are looked at: those with the fewest others, which say most
SOURCE = "triples"


class TripleTower(nn.Module):
    """The mean of an item's neighbours, seen through relations.

    Attributes:
      entities: number of things that triples relate, E.
      relations: number of relations in both directions, P.
      dim: D.
      dtype: not used; embeddings are float32.
    """

    entities: int
    relations: int
    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, described: Described) -> tuple[Array, Array]:
        flat = described[SOURCE]
        pairs = flat.reshape(*flat.shape[:-1], -1, 2)
        named = nn.with_logical_partitioning
        table_ExD = self.param(
            "entity",
            named(nn.initializers.normal(self.dim**-0.5), (None, "embed")),
            (self.entities + 1, self.dim),
            jnp.float32,
        )
        table_PxD = self.param(
            "relation",
            named(nn.initializers.ones_init(), (None, "embed")),
            (self.relations + 1, self.dim),
            jnp.float32,
        )
        there = (pairs[..., 1] > 0)[..., None]
        seen = jnp.take(table_ExD, pairs[..., 1], axis=0, mode="clip")
        seen = seen * jnp.take(table_PxD, pairs[..., 0], axis=0, mode="clip")
        count = there.sum(axis=-2)
        total = jnp.where(there, seen, 0.0).sum(axis=-2)
        return total * jax.lax.rsqrt(jnp.maximum(count, 1).astype(jnp.float32)), count > 0


def read(job: Job) -> Iterator[Tower]:
    """The tower, where the config asks for it.

    Raises:
      ConfigError: the dataset has no triples.
    """
    if not job.config.item.triples:
        return
    triples = job.dataset.triples()
    if triples is None:
        raise ConfigError(
            f"config.item.triples: {job.dataset.path} has no triples; prepare it with --triples=FILE"
        )
    head, relation, tail = (
        np.asarray(triples.column(name).to_pylist(), object) for name in ("head", "relation", "tail")
    )
    # Both ways: as the head sees the tail, and as the tail sees the head.
    source, target = np.concatenate([head, tail]), np.concatenate([tail, head])
    kinds = np.concatenate([np.char.add("+", relation.astype(str)), np.char.add("-", relation.astype(str))])
    words, target_number = np.unique(target.astype(str), return_inverse=True)
    names, kind_number = np.unique(kinds, return_inverse=True)
    degree = np.bincount(target_number, minlength=len(words))
    shared = degree[target_number] > 1  # a thing that one item alone is related to says no more than its id
    place = {item: i for i, item in enumerate(job.items.column("item_id").to_pylist())}
    row = np.array([place.get(word, -1) for word in source])
    chosen = np.flatnonzero((row >= 0) & shared)
    chosen = chosen[np.lexsort((target_number[chosen], degree[target_number[chosen]], row[chosen]))]
    rows = row[chosen]
    nth = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = nth < MOST
    values = np.zeros((job.items.num_rows, MOST, 2), np.int32)
    values[rows[kept], nth[kept], 0] = kind_number[chosen[kept]] + 1
    values[rows[kept], nth[kept], 1] = target_number[chosen[kept]] + 1
    values = values.reshape(job.items.num_rows, -1)
    yield Tower("triples", functools.partial(TripleTower, len(words), len(names)), {SOURCE: Values(values)})
