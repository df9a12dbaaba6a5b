"""Lists of several models as one: an item's score is the mean of its scores, an ensemble.

The mean of logits ranks as the product of the models' softmaxes does (Hinton, Training Products of Experts, 2002),
since what a softmax divides by is the same for all items of a user.
"""

from collections.abc import Sequence

import numpy as np

from dynrec_jax.batch import PAD
from dynrec_jax.evaluate.recommender import HistorySource, ListMaker, Lists

FEWEST_OFFERED = 200  # items that each model offers, at least: twice what evaluation looks at


def offered(k: int, items: int) -> int:
    """How long each model's lists must be, so that the first `k` of the joined ones hardly depend on it."""
    return min(max(FEWEST_OFFERED, 2 * k), items)


def joined(makers: Sequence[ListMaker], k: int, weights: Sequence[float] = ()) -> ListMaker:
    """A function like `Recommender.prepare`'s, whose lists are those of `makers` joined (`mean_of`).

    Args:
      makers: of each model, longer than `k` (`offered`), all with or all without the items of the history.
      k: length of the joined lists.
      weights: as `mean_of` takes them.
    """

    def make(source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        return mean_of([maker(source, users_U, ends_U) for maker in makers], k, weights)

    return make


def mean_of(several: Sequence[Lists], k: int, weights: Sequence[float] = ()) -> Lists:
    """The `k` best items of each user by the mean of the scores in several lists, `[U, k]`; or by their weighted sum.

    An item that a list does not hold counts there as the list's last one, which is at least what it would score. Equal
    means rank by the lowest item.

    Args:
      several: each model's lists of the same U users, `[U, K]`; together of `k` items or more.
      k: length of the joined lists.
      weights: of each model's scores, more than 0; empty for one part of their number each, which is the mean.
    """
    share_M = weights or [1 / len(several)] * len(several)
    lowest_MxU = [_lowest(lists) for lists in several]
    ids = np.concatenate([lists.ids for lists in several], axis=1)
    # How far each item of each list is above that list's last one; nothing where it is not there.
    above = np.concatenate(
        [
            np.where(lists.ids != PAD, (lists.scores - low_U[:, None]) * share, 0.0)
            for lists, low_U, share in zip(several, lowest_MxU, share_M, strict=True)
        ],
        axis=1,
        dtype=np.float64,
    )
    order = np.argsort(ids, axis=1, kind="stable")
    ids, above = np.take_along_axis(ids, order, axis=1), np.take_along_axis(above, order, axis=1)
    first = np.diff(ids, axis=1, prepend=-1) != 0  # of several places of an item, the first holds their sum
    total = np.zeros_like(above)
    if len(ids):
        total[first] = np.add.reduceat(above.reshape(-1), np.flatnonzero(first))
    mean = (total + np.tensordot(share_M, lowest_MxU, axes=1)[:, None]).astype(np.float32)
    mean = np.where(first & (ids != PAD), mean, -np.inf)
    best = np.argsort(-mean, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(mean, best, axis=1)
    return Lists(np.where(np.isfinite(scores), np.take_along_axis(ids, best, axis=1), PAD), scores)


def _lowest(lists: Lists) -> np.ndarray:
    """float64[U], the score of each list's last item; 0 of an empty one."""
    last_U = np.where(lists.ids != PAD, lists.scores, np.inf).min(axis=1, initial=np.inf)
    return np.where(np.isfinite(last_U), last_U, 0.0).astype(np.float64)
