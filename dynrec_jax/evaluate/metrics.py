"""Ranking metrics from lists, in plain NumPy.

A metric is computed from the list that would be shown, not from a count of how many items score higher: a model
that gives every item the same score gets chance, because equal scores rank by item index.
"""

import numpy as np


def ranks(lists_UxK: np.ndarray, targets_U: np.ndarray) -> np.ndarray:
    """float64[U], the place of each target in its list, from 1; infinity where it is not there."""
    found_UxK = lists_UxK == targets_U[:, None]
    return np.where(found_UxK.any(axis=1), found_UxK.argmax(axis=1) + 1.0, np.inf)


def rank_counts(ranks_U: np.ndarray, k: int) -> np.ndarray:
    """int64[k + 1], how many targets stand at place 1 … k of their lists (place 0 counts those that do not)."""
    found_U = np.where(ranks_U <= k, ranks_U, 0).astype(np.int64)
    return np.bincount(found_U, minlength=k + 1)


def ranking_metrics(counts: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """`recall@k`, `ndcg@k` for each k, and `mrr`, averaged over users; one relevant item each.

    recall@k = share of ranks ≤ k. ndcg@k = mean of 1 / log2(rank + 1) over ranks ≤ k (the ideal is 1). mrr = mean
    of 1 / rank over the whole list. The mean over no users is 0.

    Args:
      counts: as `rank_counts` gives them. Whole numbers, so that the metrics are the same to the last bit in
        whatever order, and in however many processes, the users were ranked.
      ks: cut-offs.
    """
    users = max(int(counts.sum()), 1)
    found = counts[1:]
    rank = np.arange(1, len(counts), dtype=np.float64)
    gained = found / np.log2(rank + 1.0)
    result: dict[str, float] = {}
    for k in ks:
        result[f"recall@{k}"] = float(found[:k].sum() / users)
        result[f"ndcg@{k}"] = float(gained[:k].sum() / users)
    result["mrr"] = float((found / rank).sum() / users)
    return result


class Coverage:
    """`coverage@k`: share of the N items that stand in at least one user's first k.

    Attributes:
      shown: bool[N + 1] by k, items that stand in a list.
    """

    def __init__(self, items: int, ks: tuple[int, ...]):
        self.shown = {k: np.zeros(items + 1, bool) for k in ks}

    def add(self, lists_UxK: np.ndarray) -> None:
        """Counts the items of some users' lists; 0 is none."""
        for k, shown in self.shown.items():
            shown[lists_UxK[:, :k].reshape(-1)] = True

    def metrics(self) -> dict[str, float]:
        """`coverage@k` for each k."""
        return {f"coverage@{k}": float(shown[1:].mean()) for k, shown in self.shown.items()}
