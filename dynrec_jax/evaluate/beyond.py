"""What lists are like besides being right: how much of the catalogue they show, how new, how varied, how popular.

All of it is streamed: lists come some at a time, and what is kept is sums and one count per item.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynrec_jax.batch import PAD

GROUPS = ("niche", "diverse", "blockbuster")  # users in thirds, by how popular what they took is
ALL, NO_GROUP = "all", -1
HEAD, MIDDLE, TAIL = range(3)  # of items, by their events
KINDS = 3
CUTS = (0.2, 0.8)  # shares of all events where the head ends and the tail begins
SMOOTHING = 0.01  # α of calibration: how much of the history's spread a list's own is mixed with


class Known(NamedTuple):
    """What lists are measured by, counted on the training parts of histories alone.

    Attributes:
      share_N: float64[N + 1], the share of the histories that have each item: its popularity.
      information_N: float64[N + 1], `self_information` of each item.
      profile_U: float64[U], the mean popularity of what each user of the dataset took; NaN of one who took nothing.
      group_U: int64[U], which of `GROUPS` each of them is of; `NO_GROUP` for none.
      kind_N: int32[N + 1], whether each item is of the HEAD, the MIDDLE or the TAIL (`popularity_groups`).
      spread_UxG: float64[U, 3], how what each user took is spread over these; NaN of one who took nothing.
    """

    share_N: np.ndarray
    information_N: np.ndarray
    profile_U: np.ndarray
    group_U: np.ndarray
    kind_N: np.ndarray
    spread_UxG: np.ndarray


def shares(holders_N: np.ndarray, users: int) -> np.ndarray:
    """float64[N + 1], the share of `users` histories that have each item."""
    return holders_N / max(users, 1)


def self_information(holders_N: np.ndarray, users: int) -> np.ndarray:
    """float64[N + 1], `-log2 p` of each item in bits, `p` the share of the histories that have it.

    Its mean over a list is the list's novelty (Vargas and Castells, Rank and Relevance in Novelty and Diversity Metrics
    for Recommender Systems, RecSys 2011; Zhou et al., PNAS 2010). An item of no history counts as one of a single one.
    """
    return -np.log2(np.maximum(holders_N, 1) / max(users, 1))


def thirds(profile_U: np.ndarray) -> np.ndarray:
    """int64[U], users in three groups of one size by what `profile` says, the lowest first; `NO_GROUP` for NaN.

    The groups' names, and what is measured of them, are those of Abdollahpouri et al. (The Unfairness of Popularity
    Bias in Recommendation, RMSE 2019), who cut at 20 and 80 per cent by the share of popular items.
    """
    group_U = np.full(len(profile_U), NO_GROUP)
    there = np.flatnonzero(~np.isnan(profile_U))
    order = there[np.argsort(profile_U[there], kind="stable")]
    group_U[order] = np.arange(len(order)) * len(GROUPS) // max(len(order), 1)
    return group_U


def popularity_groups(counts_N: np.ndarray) -> np.ndarray:
    """int32[N + 1], HEAD, MIDDLE or TAIL of each item by its events.

    The most popular items that have a fifth of all events together are the head, the least popular ones that have a
    fifth the tail (Abdollahpouri et al., UMAP 2021); what has none is in the tail. Equal counts by the lowest index.

    Args:
      counts_N: int64[N + 1], events of each item; item 0 is none.
    """
    order = np.argsort(-counts_N[1:], kind="stable") + 1
    sorted_N = counts_N[order]
    before = (np.cumsum(sorted_N) - sorted_N) / max(int(sorted_N.sum()), 1)
    group_N = np.full(len(counts_N), TAIL, np.int32)
    group_N[order] = np.where(sorted_N > 0, np.searchsorted(CUTS, before, side="right"), TAIL)
    return group_N


def divergence(p_UxG: np.ndarray, q_UxG: np.ndarray) -> np.ndarray:
    """float64[U], `KL(p || 0.99 q + 0.01 p)` in nats: how far lists are from being spread as histories are.

    Steck's miscalibration (Calibrated Recommendations, RecSys 2018); NaN where either is.
    """
    mixed_UxG = (1 - SMOOTHING) * q_UxG + SMOOTHING * p_UxG
    there = p_UxG != 0
    ratio = np.where(there, p_UxG, 1.0) / np.where(there, mixed_UxG, 1.0)
    return (p_UxG * np.log(ratio)).sum(axis=1)


def gini(counts_N: np.ndarray) -> float:
    """How unevenly N items are recommended: 0 where all are as often, `1 - 1/N` where one takes it all.

    `Σ_i (2 i - N - 1) x_i / (N Σ_i x_i)` over the counts x in ascending order, i from 1; 0 where nothing is.
    """
    number, total = len(counts_N), int(counts_N.sum())
    if not total:
        return 0.0
    weights = 2 * np.arange(1, number + 1) - number - 1
    return float(weights @ np.sort(counts_N).astype(np.float64) / (number * total))


def list_means(values_N: np.ndarray, ids_UxK: np.ndarray) -> np.ndarray:
    """float64[U], the mean of `values[item]` over each list; NaN of an empty one."""
    real_UxK = ids_UxK != PAD
    total_U = np.where(real_UxK, values_N[ids_UxK], 0.0).sum(axis=1)
    return _over(total_U, real_UxK.sum(axis=1))


def vector_diversity(v_UxKxD: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """float64[len(ks), U], `1 - mean cosine` over the pairs of items in each list's first k.

    Intra-list diversity (Ziegler et al., WWW 2005; Vargas and Castells 2011). A zero vector stands for no item, or for
    one that nothing is known of, and makes no pair; NaN where there is no pair.
    """
    norm_UxK = np.linalg.norm(v_UxKxD, axis=-1)
    real_UxK = norm_UxK > 0
    unit_UxKxD = v_UxKxD / np.where(real_UxK, norm_UxK, 1.0)[..., None]

    def apart(k: int) -> np.ndarray:
        # The square of a sum of n unit vectors holds each pair twice, and each vector with itself.
        sum_UxD = unit_UxKxD[:, :k].sum(axis=1, dtype=np.float64)
        number_U = real_UxK[:, :k].sum(axis=1)
        return 1.0 - _over((sum_UxD**2).sum(axis=1) - number_U, number_U * (number_U - 1))

    return np.stack([apart(k) for k in ks])


class Sets(NamedTuple):
    """Attributes of items 0 … N, one item's after the other's.

    Attributes:
      starts: int64[N + 2], where those of each item begin.
      values: int32, attributes by number, from 1.
    """

    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, items: Iterable[Sequence[str]]) -> "Sets":
        """From the words of items 1 … N, each once in an item."""
        numbers: dict[str, int] = {}
        rows = [[numbers.setdefault(word, len(numbers) + 1) for word in words] for words in items]
        starts = np.concatenate([[0, 0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        return cls(starts, np.array([value for row in rows for value in row], np.int32))

    def of_lists(self, ids_UxK: np.ndarray) -> np.ndarray:
        """int32[U, K, A], those of the items in lists; 0 is none."""
        first_UxK = self.starts[ids_UxK]
        size_UxK = self.starts[ids_UxK + 1] - first_UxK
        at_A = np.arange(max(int(size_UxK.max(initial=0)), 1))
        inside = at_A < size_UxK[..., None]
        if not len(self.values):
            return np.zeros(inside.shape, np.int32)
        return np.where(inside, self.values[np.where(inside, first_UxK[..., None] + at_A, 0)], 0)


def set_diversity(sets_UxKxA: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """float64[len(ks), U], `1 - mean Jaccard index` over the pairs of items in each list's first k.

    Args:
      sets_UxKxA: attributes of each item, each once, by number from 1; 0 is none. An item without any makes no pair.
      ks: cut-offs.
    """
    real = sets_UxKxA > 0
    size_UxK = real.sum(axis=-1)
    user, place, _ = np.nonzero(real)
    # Numbered anew in each list, so that no more columns are needed than one list has attributes.
    most = int(sets_UxKxA.max(initial=0)) + 1
    keys, inverse = np.unique(user * most + sets_UxKxA[real], return_inverse=True)
    column = inverse - np.searchsorted(keys, user * most)
    has_UxKxV = np.zeros((*size_UxK.shape, int(column.max(initial=0)) + 1), np.float32)
    has_UxKxV[user, place, column] = 1.0
    both_UxKxK = has_UxKxV @ has_UxKxV.transpose(0, 2, 1)
    either_UxKxK = size_UxK[:, :, None] + size_UxK[:, None, :] - both_UxKxK
    alike_UxKxK = both_UxKxK / np.maximum(either_UxKxK, 1.0)

    def apart(k: int) -> np.ndarray:
        number_U = (size_UxK[:, :k] > 0).sum(axis=1)
        total_U = alike_UxKxK[:, :k, :k].sum(axis=(1, 2), dtype=np.float64) - number_U
        return 1.0 - _over(total_U, number_U * (number_U - 1))

    return np.stack([apart(k) for k in ks])


class Beyond:
    """Sums over lists, and the metrics that they make.

    Attributes:
      ks: cut-offs.
      users: lists counted.
      unknown: those of users that the dataset has not.
      without: those of users of the dataset who have no training event.
    """

    def __init__(self, by: Known, ks: Sequence[int]):
        self.ks = tuple(ks)
        self.users = self.unknown = self.without = 0
        self._by = by
        self._shown = {k: np.zeros(len(by.share_N), np.int64) for k in self.ks}
        self._means: dict[str, _Mean] = {}
        self._groups: dict[str, dict[str, _Mean]] = {name: {} for name in (ALL, *GROUPS)}

    def add(self, ids_UxK: np.ndarray, users_U: np.ndarray, apart: Mapping[str, np.ndarray]) -> None:
        """Counts some lists.

        Args:
          ids_UxK: best first; 0 is none.
          users_U: the dataset's number of each user, -1 of one whom it has not.
          apart: by name, how varied each list is at each cut-off, `[len(ks), U]`.
        """
        group_U = np.where(users_U >= 0, self._by.group_U[users_U], NO_GROUP)
        profile_U, spread_UxG = self._by.profile_U[users_U], self._by.spread_UxG[users_U]
        self.users += len(users_U)
        self.unknown += int((users_U < 0).sum())
        self.without += int(((users_U >= 0) & (group_U == NO_GROUP)).sum())
        for at, k in enumerate(self.ks):
            ids = ids_UxK[:, :k]
            self._shown[k] += np.bincount(ids.reshape(-1), minlength=len(self._by.share_N))
            share_U = list_means(self._by.share_N, ids)
            _add(self._means, f"novelty@{k}", list_means(self._by.information_N, ids))
            _add(self._means, f"popularity@{k}", share_U)
            q_UxG = np.stack([list_means(self._by.kind_N == kind, ids) for kind in range(KINDS)], axis=1)
            apart_U = divergence(spread_UxG, q_UxG)
            for name, values in apart.items():
                _add(self._means, f"{name}@{k}", values[at])
            for name, group in self._groups.items():
                inside_U = group_U != NO_GROUP if name == ALL else group_U == GROUPS.index(name)
                here_U = inside_U & ~np.isnan(share_U)
                _add(group, f"popularity@{k}", share_U[here_U])
                _add(group, f"history@{k}", profile_U[here_U])
                _add(group, f"miscalibration@{k}", apart_U[here_U])

    def metrics(self) -> dict[str, Any]:
        """By name: means over lists, and `groups`, those of each group of users and of all who are of one.

        `coverage@k` and `gini@k` of the whole catalogue, `novelty@k` in bits, what was given as `apart`, and
        `popularity@k`, the mean share of histories that have a list's items. Of groups, `history_popularity` too, the
        same of what they took, and `lift@k`, the group average popularity lift `(GAP_r - GAP_p) / GAP_p` of
        Abdollahpouri et al. 2019, with `popularity@k` as GAP_r and `history_popularity` as GAP_p; and
        `miscalibration@k`, the `divergence` of lists from histories in what is of the HEAD, the MIDDLE and the TAIL.
        """
        result: dict[str, Any] = {}
        for k, shown in self._shown.items():
            result[f"coverage@{k}"] = float((shown[1:] > 0).mean())
            result[f"gini@{k}"] = gini(shown[1:])
        result |= {name: mean.value for name, mean in self._means.items()}
        result["groups"] = {name: self._lifts(group) for name, group in self._groups.items()}
        return result

    def _lifts(self, means: Mapping[str, "_Mean"]) -> dict[str, float]:
        """Of one group; users with an empty list are left out."""
        result: dict[str, float] = {}
        for k in self.ks:
            if not (now := means.get(f"popularity@{k}")) or not now.count:
                continue
            before = means[f"history@{k}"].value
            result |= {"users": now.count, "history_popularity": before, f"popularity@{k}": now.value}
            result[f"lift@{k}"] = (now.value - before) / before if before else 0.0
            result[f"miscalibration@{k}"] = means[f"miscalibration@{k}"].value
        return result


class _Mean:
    """A mean that is added to; NaN is left out."""

    total, count = 0.0, 0

    @property
    def value(self) -> float:
        return self.total / max(self.count, 1)


def _add(means: dict[str, _Mean], name: str, values_U: np.ndarray) -> None:
    real = values_U[~np.isnan(values_U)]
    mean = means.setdefault(name, _Mean())
    mean.total += float(real.sum())
    mean.count += len(real)


def _over(total_U: np.ndarray, count_U: np.ndarray) -> np.ndarray:
    """`total / count`; NaN where the count is 0."""
    return np.where(count_U > 0, total_U / np.maximum(count_U, 1), np.nan)
