"""What a tower is: one kind of thing that is known of an item, read from the dataset and made a vector.

A kind is one module with a function `read(job)`, listed in `kinds.KINDS`. It gives, for each tower, a linen module
and what the devices hold of every item. The step looks up what it needs of that, by item, and calls the module with it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
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
    some = np.asarray(known[:: max(len(known) // 100_000, 1)])
    some = some[some.any(axis=1)]
    return Values(array, some.mean(axis=0) if len(some) else np.zeros(known.shape[1], known.dtype))


Maker = Callable[[int, Any], Any]  # (D, dtype of products) -> a `Module`


class Tower(NamedTuple):
    """One tower, as it was read.

    Attributes:
      name: of its parameters.
      make: makes its module.
      values: what is known of the items, by name.
      made: name, width and type of what a run makes of the items itself, and makes anew.
    """

    name: str
    make: Maker
    values: dict[str, Values]
    made: tuple[tuple[str, int, str], ...] = ()

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

    def read(self, job: Job) -> Iterator[Tower]:
        """The towers of this kind that the config asks for."""
        ...
