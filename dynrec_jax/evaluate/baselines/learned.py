"""What baselines learn from, and how their scores become lists."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np

from dynrec_jax.batch import PAD
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.cold import cold_items
from dynrec_jax.data.examples import Splits
from dynrec_jax.evaluate.recommender import HistorySource, Lists

CELLS = 8_000_000  # users x items that are scored at a time

# (histories, users int64[B], ends int64[B]) -> float[B, N], column i - 1 is item i; larger is better.
Scorer = Callable[[HistorySource, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Learning:
    """The training events of a dataset, and what a baseline may know besides.

    Attributes:
      histories: of all users.
      splits: where they are cut.
      config: of the run that the baseline stands beside.
      say: is told how far long work is.
    """

    histories: Histories
    splits: Splits
    config: ml_collections.ConfigDict
    say: Callable[[str], None] = lambda line: None

    @property
    def items(self) -> int:
        """N."""
        return self.histories.dataset.items

    def events(self) -> "Events":
        """All training events, users one after the other, each oldest first."""
        found = self.histories.events_before(self.splits.train_end)
        cold_N = cold_items(self.items, self.config.data.cold_items)
        if not cold_N.any():
            return Events(*found)
        kept = ~cold_N[found[1]]
        return Events(*(values[kept] for values in found))


class Events(NamedTuple):
    """Events of several histories, one after the other.

    Attributes:
      users: int64[E].
      items: int32[E].
      times: int32[E], seconds since the dataset's first event; zeros where the data has no times.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray


class Unable(Exception):
    """A baseline that cannot be made of a dataset; says why."""


def lists_of(
    scorer: Scorer, items: int, k: int, filter_seen: bool
) -> Callable[[HistorySource, np.ndarray, np.ndarray], Lists]:
    """A function (histories, users, ends) -> Lists of the best `k` items; equal scores rank by the lowest index."""

    def lists(source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        made = Lists(np.zeros((len(users_U), k), np.int32), np.full((len(users_U), k), -np.inf, np.float32))
        order_U = np.argsort(ends_U, kind="stable")
        size = max(1, CELLS // items)
        for start in range(0, len(order_U), size):
            place_B = order_U[start : start + size]
            users_B, ends_B = users_U[place_B], ends_U[place_B]
            scores_BxN = np.asarray(scorer(source, users_B, ends_B), np.float64)
            if filter_seen:
                seen_BxM = source.last_items(users_B, ends_B, int(ends_B.max(initial=1)))
                rows, columns = np.nonzero(seen_BxM != PAD)
                scores_BxN[rows, seen_BxM[rows, columns] - 1] = -np.inf
            best_BxK = top(scores_BxN, k)
            scores_BxK = np.take_along_axis(scores_BxN, best_BxK, axis=1)
            there = scores_BxK > -np.inf
            made.ids[place_B] = np.where(there, best_BxK + 1, 0)
            made.scores[place_B] = np.where(there, scores_BxK, -np.inf)
        return made

    return lists


def top(scores_BxN: np.ndarray, k: int) -> np.ndarray:
    """int64[B, k], columns of the largest, best first; of equal ones the first."""
    number = scores_BxN.shape[1]
    if k >= number:
        return np.argsort(-scores_BxN, axis=1, kind="stable")[:, :k]
    # Of those that tie with the last place, the lowest indices: all above it, and then they in order.
    last_Bx1 = -np.partition(-scores_BxN, k - 1, axis=1)[:, k - 1 : k]
    above_BxN = scores_BxN > last_Bx1
    level_BxN = scores_BxN == last_Bx1
    room_Bx1 = k - above_BxN.sum(axis=1, keepdims=True)
    chosen_BxN = above_BxN | (level_BxN & (np.cumsum(level_BxN, axis=1) <= room_Bx1))
    columns_BxK = np.nonzero(chosen_BxN)[1].reshape(len(scores_BxN), k)
    order_BxK = np.argsort(-np.take_along_axis(scores_BxN, columns_BxK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns_BxK, order_BxK, axis=1)


def recent(
    source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The last items of histories, int32[B, M], and how many events ago each was, from 1, float64[B, M]; 0 is none."""
    items_BxM = source.last_items(users_B, ends_B, max(1, min(size, int(ends_B.max(initial=1)))))
    length_Bx1 = (items_BxM != PAD).sum(axis=1, keepdims=True)
    ago_BxM = np.maximum(length_Bx1 - np.arange(items_BxM.shape[1])[None], 1).astype(np.float64)
    return items_BxM, ago_BxM
