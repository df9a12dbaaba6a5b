"""How much of an item's logit each event of a history has a share in: three ways to tell.

- "deletion": by how much the logit falls when the event had not been, the later ones moving up. What it says is true
  word for word, since the model is asked; but two events that say the same have small shares both, as either will do,
  so that shares do not add up to the score.
- "gradients": integrated gradients (Sundararajan, Taly & Yan 2017). The logit's gradient with respect to the vectors of
  the history's items, along the straight way from `BASELINE` to what they are; what neighbours' counts add is parted in
  closed form. Shares add up to the score less the baseline's, but for the integral's error.
- "exact": Shapley's values (1953), the only shares that add up to the score less that of no history, are equal for
  events that do the same and zero for those that do nothing, and add where scores are added. They ask for all 2^n
  subsets of the n events.

The weights of attention are none of them: they say where a layer looks, not what comes of it (Jain & Wallace 2019).
"""

import math
from typing import NamedTuple

import numpy as np

from dynrec_jax.explain.served import Past, Served

METHODS = ("exact", "gradients", "deletion")
MOST_EXACT = 10  # events of a history whose subsets are all asked for: 1,024
BASELINE = "history"


class Parted(NamedTuple):
    """A score in parts.

    Attributes:
      share_N: float64[n], of each event that the model reads.
      baseline: the score that they are added to.
    """

    share_N: np.ndarray
    baseline: float


def parted(served: Served, past: Past, item: int, method: str, steps: int) -> Parted:
    """An item's logit after a history, in parts.

    Args:
      served: the model.
      past: the history; events before the last `served.length` are only there to move up.
      item: its index.
      method: one of `METHODS`.
      steps: places along the way of gradients.
    """
    if method == "deletion":
        return _deleted(served, past, item)
    within = tail(past, served.length)
    return _shapley(served, within, item) if method == "exact" else _integrated(served, within, item, steps)


def tail(past: Past, length: int) -> Past:
    """The last events of a history."""
    return Past(past.items[-length:], past.times[-length:], past.events[-length:], past.asked)


def without(past: Past, length: int, places_KxM: np.ndarray) -> np.ndarray:
    """bool[K, n], which events are left when some of the last `length` have not been.

    Args:
      past: the history of n events.
      length: events that the model reads.
      places_KxM: int, which of these events each row leaves out, counted from the first that is read.
    """
    kept_KxN = np.ones((len(places_KxM), len(past.items)), bool)
    first = max(len(past.items) - length, 0)
    np.put_along_axis(kept_KxN, first + places_KxM, False, axis=1)
    return kept_KxN


def _deleted(served: Served, past: Past, item: int) -> Parted:
    number = min(len(past.items), served.length)
    kept_KxN = without(past, served.length, np.arange(number)[:, None])
    all_N, none_N = np.ones((1, len(past.items)), bool), np.zeros((1, len(past.items)), bool)
    scores = served.scores(past, np.concatenate([kept_KxN, all_N, none_N]), item)
    return Parted(scores[-2] - scores[:-2], float(scores[-1]))


def _integrated(served: Served, past: Past, item: int, steps: int) -> Parted:
    # Gauss-Legendre: exact for polynomials of degree 2 · steps - 1, and without the ends, where a norm may have none.
    place_S, weight_S = np.polynomial.legendre.leggauss(steps)
    slope_SxN, start = served.slopes(past, item, (place_S + 1) / 2)
    return Parted(weight_S / 2 @ slope_SxN + served.counts(past, item), start)


def _shapley(served: Served, past: Past, item: int) -> Parted:
    number = len(past.items)
    assert number <= MOST_EXACT, "subsets of long histories are too many"
    subset_K = np.arange(2**number)
    kept_KxN = (subset_K[:, None] >> np.arange(number)) & 1 == 1
    scores_K = served.scores(past, kept_KxN, item)
    size_K = kept_KxN.sum(axis=1)
    # Of all orders in which events may come, the part in which just these come before one that is not among them.
    part = np.array([1 / (number * math.comb(number - 1, size)) for size in range(number)])
    share_N = np.zeros(number)
    for event in range(number):
        before_K = subset_K[~kept_KxN[:, event]]
        gain = scores_K[before_K | 1 << event] - scores_K[before_K]
        share_N[event] = part[size_K[before_K]] @ gain
    return Parted(share_N, float(scores_K[0]))
