"""Baselines that need no training: one score per item, the same for every user."""

import numpy as np


def popularity(counts_R: np.ndarray) -> np.ndarray:
    """float32[R], how often each item occurs in the training events."""
    return counts_R.astype(np.float32)


BASELINES = ("popularity", "recent_popularity")
