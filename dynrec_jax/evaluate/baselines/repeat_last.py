"""What a user took last, most recent first, and then what is popular.

Where seen items are masked nothing but the popular items is left of it.
"""

from collections.abc import Mapping

import numpy as np

from dynrec_jax.batch import PAD
from dynrec_jax.evaluate.baselines.learned import Learning, Scorer, recent
from dynrec_jax.evaluate.popular import popularity_counts
from dynrec_jax.evaluate.recommender import HistorySource

LATEST = 1_000  # events of a history


def repeat_last(learning: Learning) -> Mapping[str, Scorer]:
    """See above."""
    counts_N = popularity_counts(learning.histories, learning.splits, learning.config)["popularity"][1:]

    def score(source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        items_BxM, ago_BxM = recent(source, users_B, ends_B, LATEST)
        # Below 1 all that is popular, above it what was taken: most recent first.
        popular_N = counts_N / (counts_N.max(initial=1) + 1.0)
        scores_BxN = np.tile(popular_N, (len(users_B), 1))
        # Oldest first, so that an item taken again counts by its last time.
        for column in range(items_BxM.shape[1]):
            rows = np.flatnonzero(items_BxM[:, column] != PAD)
            scores_BxN[rows, items_BxM[rows, column] - 1] = 1.0 + 1.0 / ago_BxM[rows, column]
        return scores_BxN

    return {"": score}
