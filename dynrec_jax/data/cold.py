"""Cold items: a share of the catalogue that training never sees in a history, chosen by a hash of the item's number.

What a model makes of items that came after training can so be measured on any data set.
"""

import numpy as np

from dynrec_jax.data.examples import splitmix

CHOICE = np.uint64(0x636F6C64)  # apart from all other draws


def cold_items(items: int, share: float) -> np.ndarray:
    """bool[N + 1], which items are cold; about `share` of them, the same in every run."""
    numbers = np.arange(items + 1, dtype=np.uint64)
    chosen = splitmix(numbers ^ splitmix(CHOICE)) < np.uint64(min(int(share * 2**64), 2**64 - 1))
    chosen[0] = False
    return chosen


def without(items_BxW: np.ndarray, lengths_B: np.ndarray, cold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where what is left of each row goes, int64[B, W] for `take_along_axis`, and how much is left, int64[B]."""
    real_BxW = np.arange(items_BxW.shape[1]) < lengths_B[:, None]
    kept_BxW = real_BxW & ~cold[items_BxW]
    return np.argsort(~kept_BxW, axis=1, kind="stable"), kept_BxW.sum(axis=1)
