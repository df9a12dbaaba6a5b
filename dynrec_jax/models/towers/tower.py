"""What a tower is: one kind of thing that is known of an item, read from the dataset and made a vector.

A kind is one module with the functions of `Kind`, listed in `kinds.KINDS`; its keys are in `config.default_config`. It
gives, for each tower, a linen module and what the devices hold of every item. The step looks up what it needs of that,
by item, and calls the module with it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa

from dynrec_jax.data.dataset import Dataset

Array = jax.Array
Described = dict[str, Array]  # what was looked up of items: arrays [..., width] by name


@dataclasses.dataclass(frozen=True)
class Job:
    """What a tower is read from.

    Attributes:
      config: of the run.
      dataset: whose items the towers know: vocabularies and means are made of these alone.
      items: the items to be described, rows as in `Dataset.items_table`: the dataset's, or new ones.
      folder: the run folder, where what a run needs of other folders is kept; None where there is none yet.
      say: tells the user.
    """

    config: ml_collections.ConfigDict
    dataset: Dataset
    items: pa.Table
    folder: Path | None = None
    say: Callable[[str], None] = lambda line: None

    @property
    def new(self) -> bool:
        """Whether the items are not the dataset's own."""
        return self.items is not self.dataset.items_table()


class Module(Protocol):
    """A linen module: what was looked up of items -> their vectors [..., D], and which have one, bool[..., 1].

    Vectors have about unit length, and are zeros where there is none.
    """

    def __call__(self, described: Described) -> tuple[Array, Array]: ...


class Values(NamedTuple):
    """Numbers of every item, on the host; row i - 1 is item i.

    Attributes:
      array: [N, width], in memory or mapped from a file.
      mean: [width], what is taken away from each row that is not zero; None takes nothing.
      more: [M, width], of items that came later; their rows follow.
    """

    array: np.ndarray
    mean: np.ndarray | None = None
    more: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Numbers of an item."""
        return int(self.array.shape[1])

    @property
    def kind(self) -> str:
        """Their type's name."""
        return str(np.dtype(self.array.dtype).name)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Some rows."""
        if self.more is None:
            found = np.asarray(self.array[index])
        else:
            found = np.empty((len(index), self.width), self.array.dtype)
            first = index < len(self.array)
            found[first], found[~first] = self.array[index[first]], self.more[index[~first] - len(self.array)]
        if self.mean is None:
            return found
        return np.where(found.any(axis=1, keepdims=True), found - self.mean, 0).astype(found.dtype)


def parameter_name(kind: str, number: int, column: str) -> str:
    """What the parameters of a column's tower are called: letters that every file system takes."""
    return f"{kind}{number}_{re.sub(r'[^0-9A-Za-z_]', '_', column)}"


def centred(array: np.ndarray, known: np.ndarray) -> Values:
    """Vectors less the mean of the known ones: what all have in common tells none from another.

    Up to 100,000 of them, evenly spread, stand for all; a row of zeros is no vector.
    """
    some = np.asarray(known[:: max(-(-len(known) // 100_000), 1)])
    some = some[some.any(axis=1)]
    return Values(array, some.mean(axis=0) if len(some) else np.zeros(known.shape[1], known.dtype))


def summed(vector: Callable[..., tuple[Array, Array]], *slots: Array) -> tuple[Array, Array]:
    """The sum over an item's slots, and the number of those that hold something, `[..., D]` and int32[..., 1].

    One slot after the other, forward and back: an array items x slots x D of a whole catalogue would be many tables.

    Args:
      vector: of what a slot holds, [...] -> [..., D], zeros where there is nothing, and whether there is, [..., 1].
      slots: [..., A] each.
    """

    def of(*each: Array) -> tuple[Array, Array]:
        v, there = vector(*each)
        return v, there.astype(jnp.int32)

    def add(sums: tuple[Array, Array], each: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        return jax.tree.map(jnp.add, sums, of(*each)), None

    by_slot = tuple(jnp.moveaxis(x, -1, 0) for x in slots)
    first = of(*(x[0] for x in by_slot))
    sums, _ = jax.lax.scan(jax.checkpoint(add), first, tuple(x[1:] for x in by_slot))
    return sums


def looked_up(table_VxD: Array, ids: Array) -> tuple[Array, Array]:
    """Rows of a vocabulary, `[..., D]`, and whether they say anything, `[..., 1]`; 0 is no word.

    Words of items that training never sees have rows of zeros (`Tower.unused`), which stay so: they say nothing.
    """
    v = jnp.where((ids > 0)[..., None], jnp.take(table_VxD, ids, axis=0, mode="clip"), 0.0)
    return v, jnp.any(v != 0, axis=-1, keepdims=True)


Maker = Callable[[int, Any], Any]  # (D, dtype of products) -> a `Module`


class Tower(NamedTuple):
    """One tower, as it was read.

    Attributes:
      name: of its parameters.
      make: makes its module.
      values: what is known of the items, by name.
      made: name, width and type of what a run makes of the items itself, and makes anew.
      words: of parameters that are vocabularies: their rows, and the numbers of each item's words, [N, A].
    """

    name: str
    make: Maker
    values: dict[str, Values]
    made: tuple[tuple[str, int, str], ...] = ()
    words: dict[str, tuple[int, np.ndarray]] = {}  # noqa: RUF012 # never changed

    def unused(self, seen_N: np.ndarray) -> dict[str, np.ndarray]:
        """Of each vocabulary, bool[V]: the rows that no item has which training sees; those must not be random."""
        found = {}
        for name, (rows, words_NxA) in self.words.items():
            found[name] = np.ones(rows, bool)
            found[name][words_NxA[seen_N]] = False
        return found

    def followed_by(self, other: "Tower") -> "Tower":
        """The tower with the items of another, of the same kind, behind its own."""
        values = {name: x._replace(more=other.values[name].array) for name, x in self.values.items()}
        return self._replace(values=values)

    @property
    def shapes(self) -> tuple[tuple[str, int, str], ...]:
        """Name, width and type of what is known of an item."""
        read = ((name, x.width, x.kind) for name, x in self.values.items())
        return (*read, *self.made)


class Kind(Protocol):
    """A module of this package that reads towers."""

    def columns(self, config: ml_collections.ConfigDict) -> set[str]:
        """The item columns that a config's towers of this kind read."""
        ...

    def check(self, job: Job) -> None:
        """Raises ConfigError or DataError where the towers cannot be read, without long work."""
        ...

    def read(self, job: Job) -> Iterator[Tower]:
        """The towers of this kind that the config asks for."""
        ...
