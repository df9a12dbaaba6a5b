"""Ranking metrics from lists, in plain NumPy.

A metric is computed from the list that would be shown, not from a count of how many items score higher: a model
that gives every item the same score gets chance, because equal scores rank by item index.
"""

import numpy as np


def ranks(lists_UxK: np.ndarray, targets_U: np.ndarray) -> np.ndarray:
    """float64[U], the place of each target in its list, from 1; infinity where it is not there."""
    found_UxK = lists_UxK == targets_U[:, None]
    return np.where(found_UxK.any(axis=1), found_UxK.argmax(axis=1) + 1.0, np.inf)


def ranking_metrics(ranks_U: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """`recall@k`, `ndcg@k` for each k, and `mrr`, averaged over users; one relevant item each.

    recall@k = share of ranks ≤ k. ndcg@k = mean of 1 / log2(rank + 1) over ranks ≤ k (the ideal is 1). mrr = mean
    of 1 / rank over the whole list. The mean over no users is 0.
    """
    result: dict[str, float] = {}
    users = max(len(ranks_U), 1)
    gain_U = np.where(
        np.isfinite(ranks_U), 1.0 / np.log2(np.where(np.isfinite(ranks_U), ranks_U, 1.0) + 1.0), 0.0
    )
    for k in ks:
        within_U = ranks_U <= k
        result[f"recall@{k}"] = float(within_U.sum() / users)
        result[f"ndcg@{k}"] = float(gain_U[within_U].sum() / users)
    result["mrr"] = float((1.0 / ranks_U).sum() / users)
    return result


class Coverage:
    """`coverage@k`: share of the N items that stand in at least one user's first k."""

    def __init__(self, items: int, ks: tuple[int, ...]):
        self._shown = {k: np.zeros(items + 1, bool) for k in ks}

    def add(self, lists_UxK: np.ndarray) -> None:
        """Counts the items of some users' lists; 0 is none."""
        for k, shown in self._shown.items():
            shown[lists_UxK[:, :k].reshape(-1)] = True

    def metrics(self) -> dict[str, float]:
        """`coverage@k` for each k."""
        return {f"coverage@{k}": float(shown[1:].mean()) for k, shown in self._shown.items()}
