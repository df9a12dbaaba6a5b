"""The most popular items of all training events, and of the recent ones: the same list for everybody."""

from collections.abc import Mapping

import numpy as np

from dynrec_jax.evaluate.baselines.learned import Learning, Scorer
from dynrec_jax.evaluate.popular import popularity_counts
from dynrec_jax.evaluate.recommender import HistorySource

WINDOWS = (0.02, 0.05, 0.1, 0.3)  # shares of the latest events


def popularity(learning: Learning) -> Mapping[str, Scorer]:
    """By how many training events an item has."""
    counts = popularity_counts(learning.histories, learning.splits, learning.config)
    return {"": _same(counts["popularity"])}


def recent_popularity(learning: Learning) -> Mapping[str, Scorer]:
    """By how many an item has among the latest events; windows of several sizes."""
    found = {}
    for share in dict.fromkeys((learning.config.evaluation.recent, *WINDOWS)):
        config = learning.config.copy_and_resolve_references()
        with config.unlocked():
            config.evaluation.recent = share
        counts = popularity_counts(learning.histories, learning.splits, config)
        found[f"latest {100 * share:g} % of the events"] = _same(counts["recent_popularity"])
    return found


def _same(counts_N1: np.ndarray) -> Scorer:
    def score(source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        return np.tile(counts_N1[1:].astype(np.float64), (len(users_B), 1))

    return score
