"""Item-kNN on sessions with decay: items that were taken near each other, scored from what a user took last.

`sim(i, j) = Σ w / sqrt((n_i + s)(n_j + s))` over the events of i and j at most 50 places apart in one history, where
`w = 1 / places · 2^(-days between / 30)`, i before j or in either order; n is the number of events, s = 20. A user's
score of j is `Σ 1 / ago^p · sim(i, j)` over the last 50 events, `ago` counted from 1.
"""

from collections.abc import Mapping

import numpy as np
import scipy.sparse as sparse

from dynrec_jax.batch import PAD
from dynrec_jax.evaluate.baselines.learned import Events, Learning, Scorer, recent
from dynrec_jax.evaluate.recommender import HistorySource

NEAR = 50  # places between two events that count as near, and events of a history that are looked at
HALF_LIFE = 30 * 86_400.0  # seconds between two events after which they count half
SHRINK = 20.0  # keeps rare pairs from being certain
NEIGHBOURS = 300  # kept of each item
POWERS = (0.5, 1.0, 2.0)  # p


def item_knn(learning: Learning) -> Mapping[str, Scorer]:
    """Neighbours by order and by nearness alone, each with several decays."""
    followed = _followed(learning.events(), learning.items)
    both = followed + followed.T
    counts_N = np.asarray(learning.histories.item_counts(learning.splits.train_end), np.float64)
    scale = sparse.diags(1.0 / np.sqrt(counts_N + SHRINK))
    kinds = {
        name: _nearest(sparse.csr_matrix(scale @ pairs @ scale))
        for name, pairs in (("what followed", followed), ("what was near", both))
    }
    return {f"{name}, ago^-{p:g}": _scorer(similar, p) for name, similar in kinds.items() for p in POWERS}


def _followed(events: Events, items: int) -> sparse.csr_matrix:
    """float64[N + 1, N + 1], how near j came after i, added up."""
    total = sparse.csr_matrix((items + 1, items + 1))
    for places in range(1, NEAR + 1):
        same = events.users[places:] == events.users[:-places]
        first, second = events.items[:-places][same], events.items[places:][same]
        gap = (events.times[places:] - events.times[:-places])[same].astype(np.float64)
        weight = 0.5 ** (gap / HALF_LIFE) / places
        different = first != second
        pairs = (weight[different], (first[different], second[different]))
        total = total + sparse.coo_matrix(pairs, shape=total.shape).tocsr()
    return total


def _nearest(similar: sparse.csr_matrix) -> sparse.csr_matrix:
    """The largest `NEIGHBOURS` of each row."""
    rows = np.repeat(np.arange(similar.shape[0]), np.diff(similar.indptr))
    order = np.lexsort((-similar.data, rows))
    place = np.arange(len(order)) - similar.indptr[rows]
    kept = order[place < NEIGHBOURS]
    return sparse.csr_matrix((similar.data[kept], (rows[kept], similar.indices[kept])), shape=similar.shape)


def _scorer(similar: sparse.csr_matrix, power: float) -> Scorer:
    def score(source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        items_BxM, ago_BxM = recent(source, users_B, ends_B, NEAR)
        rows, columns = np.nonzero(items_BxM != PAD)
        weight = ago_BxM[rows, columns] ** -power
        taken = sparse.coo_matrix(
            (weight, (rows, items_BxM[rows, columns])), shape=(len(users_B), similar.shape[0])
        )
        return np.asarray((taken.tocsr() @ similar).todense())[:, 1:]

    return score
