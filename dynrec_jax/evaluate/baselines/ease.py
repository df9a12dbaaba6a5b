"""EASE (Steck 2019): a linear model of items by items in closed form.

With `G = XᵀX` of the binary matrix of users and items and `P = (G + λI)⁻¹`: `B = I - P / diag(P)`, and a user's scores
are the sum of the rows of what they took.
"""

from collections.abc import Mapping

import numpy as np
import scipy.sparse as sparse

from dynrec_jax.batch import PAD
from dynrec_jax.evaluate.baselines.learned import Learning, Scorer, Unable
from dynrec_jax.evaluate.recommender import HistorySource

LAMBDAS = (50.0, 200.0, 500.0, 1_000.0)
MOST = 20_000  # items: the matrix is dense, 1.6 GB of them in float32, and as much again to invert it


def ease(learning: Learning) -> Mapping[str, Scorer]:
    """For several λ; raises Unable where the matrix would be too large."""
    if learning.items > MOST:
        raise Unable(f"a dense matrix of {learning.items:,} items; {MOST:,} at most")
    events = learning.events()
    taken = sparse.coo_matrix(
        (np.ones(len(events.users), np.float32), (events.users, events.items - 1)),
        shape=(learning.histories.users, learning.items),
    ).tocsr()
    taken.data[:] = 1.0
    gram_NxN = np.asarray((taken.T @ taken).todense(), np.float64)
    return {f"lambda={value:g}": _scorer(_weights(gram_NxN, value)) for value in LAMBDAS}


def _weights(gram_NxN: np.ndarray, penalty: float) -> np.ndarray:
    inverse_NxN = np.linalg.inv(gram_NxN + penalty * np.eye(len(gram_NxN)))
    weights_NxN = inverse_NxN / -np.diag(inverse_NxN)[None]
    np.fill_diagonal(weights_NxN, 0.0)
    return weights_NxN.astype(np.float32)


def _scorer(weights_NxN: np.ndarray) -> Scorer:
    def score(source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        items_BxM = source.last_items(users_B, ends_B, int(ends_B.max(initial=1)))
        taken_BxN = np.zeros((len(users_B), len(weights_NxN)), np.float32)
        rows, columns = np.nonzero(items_BxM != PAD)
        taken_BxN[rows, items_BxM[rows, columns] - 1] = 1.0
        return taken_BxN @ weights_NxN

    return score
