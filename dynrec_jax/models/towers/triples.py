"""The tower of a knowledge graph: triples (head, relation, tail) between items and other things.

An item is described by what it is related to: the sum of its neighbours' vectors, each seen through its relation
(DistMult's product, Yang et al. 2015), over the root of their number. Neighbours along a triple's direction and against
it are told apart.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
from flax import linen as nn

from dynrec_jax.errors import ConfigError
from dynrec_jax.models.towers.tower import Described, Job, Tower, Values, looked_up, summed

Array = jax.Array
MOST = 32  # neighbours of an item that are looked at: those with the fewest others, which say most
SOURCE = "triples"


class TripleTower(nn.Module):
    """The sum of an item's neighbours, seen through relations, over the root of their number.

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

        def neighbour(relation: Array, entity: Array) -> tuple[Array, Array]:
            v, there = looked_up(table_ExD, entity)
            return v * jnp.take(table_PxD, relation, axis=0, mode="clip"), there

        total, count = summed(neighbour, pairs[..., 0], pairs[..., 1])
        return total * jax.lax.rsqrt(jnp.maximum(count, 1).astype(jnp.float32)), count > 0


def columns(config: ml_collections.ConfigDict) -> set[str]:
    """None: triples lie beside the items."""
    return set()


def check(job: Job) -> None:
    """Raises ConfigError; see `read`."""
    list(read(job))


def read(job: Job) -> Iterator[Tower]:
    """The tower, where the config asks for it.

    Only what an item of the dataset is related to, and something else too, has a vector: what one item alone is
    related to says no more than its id.

    Raises:
      ConfigError: the dataset has no triples, or nothing in them is shared.
    """
    if not job.config.item.triples:
        return
    triples = job.dataset.triples()
    if triples is None:
        raise ConfigError(
            f"config.item.triples: {job.dataset.path} has no triples; prepare it with --triples=FILE"
        )
    head, relation, tail = (
        np.asarray(triples.column(name).to_pylist(), object).astype(str)
        for name in ("head", "relation", "tail")
    )
    # Both ways: as the head sees the tail, and as the tail sees the head.
    source, target = np.concatenate([head, tail]), np.concatenate([tail, head])
    names, kind = np.unique(
        np.concatenate([np.char.add("+", relation), np.char.add("-", relation)]), return_inverse=True
    )
    _, number, degrees = np.unique(target, return_inverse=True, return_counts=True)
    degree = degrees[number]
    row = _places(job.dataset.items_table(), source)
    kept = (row >= 0) & (degree > 1)
    words = np.unique(target[kept])
    if not len(words):
        raise ConfigError(
            f"config.item.triples: nothing in the triples of {job.dataset.path} is related to an item and to something "
            "else too; leave them out"
        )
    word = np.searchsorted(words, target).clip(max=len(words) - 1)
    word = np.where(words[word] == target, word + 1, 0)
    edges = np.stack([kind + 1, word], axis=1)
    values = _nearest(edges, row, degree, kept, job.dataset.items, MOST)
    if job.new:
        row = _places(job.items, source)
        values = _nearest(edges, row, degree, (row >= 0) & (word > 0), job.items.num_rows, values.shape[1])
    yield Tower(
        "triples",
        functools.partial(TripleTower, len(words), len(names)),
        {SOURCE: Values(values.reshape(len(values), -1))},
        words={"entity": (len(words) + 1, values[..., 1])},
    )


def _places(items: pa.Table, names: np.ndarray) -> np.ndarray:
    """The row of each name among some items; -1 for what is none of them."""
    place = {item: row for row, item in enumerate(items.column("item_id").to_pylist())}
    return np.array([place.get(name, -1) for name in names])


def _nearest(
    edges_Fx2: np.ndarray, row_F: np.ndarray, degree_F: np.ndarray, kept_F: np.ndarray, items: int, most: int
) -> np.ndarray:
    """int32[N, A, 2]: of each item up to `most` of its kept edges, those to what has the fewest others first."""
    chosen = np.flatnonzero(kept_F)
    chosen = chosen[np.lexsort((edges_Fx2[chosen, 1], degree_F[chosen], row_F[chosen]))]
    row = row_F[chosen]
    nth = np.arange(len(row)) - np.searchsorted(row, row)
    width = min(int(nth.max(initial=0)) + 1, most)
    near = nth < width
    values = np.zeros((items, width, 2), np.int32)
    values[row[near], nth[near]] = edges_Fx2[chosen[near]]
    return values
