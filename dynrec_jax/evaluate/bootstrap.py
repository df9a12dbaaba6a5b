"""Intervals of means over users, by the bootstrap: paired, since all models are asked the same.

Users are drawn with replacement (Efron 1979), and with them all that they are asked for; an interval holds the middle
95 % of the means that such draws give (percentiles).
"""

from typing import NamedTuple

import numpy as np

RESAMPLES = 2_000
TOGETHER = 100  # draws that are held at a time
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and where it would lie with other users.

    Attributes:
      mean: over all that was asked.
      low: of the interval.
      high: of the interval.
    """

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return self._asdict()


def resampled_means(
    gains_QxC: np.ndarray, users_Q: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """float64[resamples, C], the mean of each column with users drawn anew each time.

    Args:
      gains_QxC: what each query gained, a column a model and metric.
      users_Q: whose query it is; ascending.
      seed: of the draws: equal seeds draw the same users.
      resamples: how many, a multiple of 100.
    """
    first = np.flatnonzero(np.diff(users_Q, prepend=-1))
    sums_UxC = np.add.reduceat(gains_QxC, first, axis=0)
    count_U = np.diff(np.append(first, len(users_Q))).astype(np.float64)
    users = len(first)
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(resamples // TOGETHER):
        drawn_RxU = rng.multinomial(users, np.full(users, 1 / users), size=TOGETHER).astype(np.float64)
        parts.append((drawn_RxU @ sums_UxC) / (drawn_RxU @ count_U)[:, None])
    return np.concatenate(parts)


def interval(mean: float, resampled_R: np.ndarray) -> Interval:
    """The interval of one column, or of a difference of two."""
    low, high = np.quantile(resampled_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(mean), float(low), float(high))
