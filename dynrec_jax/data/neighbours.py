"""Which items are near each other in the histories that train: counts, for the loss and for what is served."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dynrec_jax.errors import DataError
from dynrec_jax.files import write_whole

REACH = 5  # places between two events at most, to be near
FADE = 0.7  # what one more place between two events leaves of a pair's weight
BACK = 0.5  # weight of what came before an item beside what came after it
OWN, OTHER = 0.5, 0.3  # powers of the events of an item, and of its neighbour, that weights are divided by
MOST = 64  # neighbours of an item
FILE = "neighbours.safetensors"  # of a run folder


class Neighbours(NamedTuple):
    """Of each item, row i - 1 being item i, those that were near it most.

    Attributes:
      ids: int32[N, M], the nearest first; 0 where there are no more.
      weights: float32[N, M]; 0 there.
      events: int32[N], of the item itself.
    """

    ids: np.ndarray
    weights: np.ndarray
    events: np.ndarray


def count_neighbours(users_E: np.ndarray, items_E: np.ndarray, items: int, most: int = MOST) -> Neighbours:
    """Adds up the pairs of events of the same user that are at most `REACH` places apart.

    `w_ij = (after_ij + BACK · after_ji) / (n_i^OWN · n_j^OTHER)`, where `after_ij` is the sum of `FADE^(places - 1)`
    over the events of j that came after one of i, and n the number of an item's events. An item is no neighbour of its
    own; of equal neighbours the one of the lower number is first.

    Args:
      users_E: int64[E], users one after the other.
      items_E: int32[E], each user's items, oldest first.
      items: N.
      most: M.
    """
    after = sparse.csr_matrix((items + 1, items + 1))
    for places in range(1, REACH + 1):
        first, second = items_E[:-places], items_E[places:]
        kept = (users_E[:-places] == users_E[places:]) & (first != second)
        weight = np.full(int(kept.sum()), FADE ** (places - 1))
        after = after + sparse.coo_matrix((weight, (first[kept], second[kept])), shape=after.shape).tocsr()
    own = np.bincount(items_E, minlength=items + 1)
    events = np.maximum(own, 1).astype(np.float64)
    near = (sparse.diags(events**-OWN) @ (after + BACK * after.T) @ sparse.diags(events**-OTHER)).tocsr()
    rows = np.repeat(np.arange(items + 1), np.diff(near.indptr))
    order = np.lexsort((near.indices, -near.data, rows))
    place = np.arange(len(order)) - near.indptr[rows]  # rows are in order as they were
    chosen, place = order[place < most], place[place < most]
    made = Neighbours(
        np.zeros((items, most), np.int32), np.zeros((items, most), np.float32), own[1:].astype(np.int32)
    )
    made.ids[rows[chosen] - 1, place] = near.indices[chosen]
    made.weights[rows[chosen] - 1, place] = near.data[chosen]
    return made


def write_neighbours(folder: Path, found: Neighbours) -> None:
    """Writes them whole into a run folder, for other processes, later starts, and what serves the model."""
    write_whole(folder / FILE, save(found._asdict(), {"sha256": _digest(found)}))


def read_neighbours(folder: Path, items: int, rows: int | None = None) -> Neighbours:
    """What `write_neighbours` wrote.

    Args:
      folder: of the run.
      items: N of the dataset.
      rows: rows wanted, where there are newer items; those are near nothing.

    Raises:
      DataError: there is none, it is not readable as that, or it is not what was written.
    """
    path = folder / FILE
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            found = Neighbours(*(file.get_tensor(name) for name in Neighbours._fields))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: {error}; {_AGAIN}") from None
    if about.get("sha256") != _digest(found) or len(found.ids) != items:
        raise DataError(f"{path}: is not what was written there for {items:,} items; {_AGAIN}")
    more = (0, (items if rows is None else rows) - items)
    return Neighbours(*(np.pad(array, (more, *((0, 0),) * (array.ndim - 1))) for array in found))


_AGAIN = "give the run's own `dynrec train` command again without that file: it counts anew and trains no step twice"


def _digest(found: Neighbours) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in found)).hexdigest()
