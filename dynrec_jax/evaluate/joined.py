"""Lists of several models as one: an item's score is the mean of its scores, an ensemble.

The mean of logits ranks as the product of the models' softmaxes does (Hinton, Training Products of Experts, 2002),
since what a softmax divides by is the same for all items of a user.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dynrec_jax.batch import PAD
from dynrec_jax.evaluate.recommender import HistorySource, Lists

ListMaker = Callable[[HistorySource, np.ndarray, np.ndarray], Lists]

FEWEST_OFFERED = 200  # items that each model offers, at least: twice what evaluation looks at


def offered(k: int, items: int) -> int:
    """How long each model's lists must be, so that the first `k` of the joined ones hardly depend on it."""
    return min(max(FEWEST_OFFERED, 2 * k), items)


def joined(makers: Sequence[ListMaker], k: int) -> ListMaker:
    """A function like `Recommender.prepare`'s, whose lists are those of `makers` joined.

    What a model does not offer counts there as its last one that it does: at least what it would score. Equal means
    rank by the lowest item.

    Args:
      makers: of each model, longer than `k` (`offered`), all with or all without the items of the history.
      k: length of the joined lists.
    """

    def make(source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        return mean_of([maker(source, users_U, ends_U) for maker in makers], k)

    return make


def mean_of(several: Sequence[Lists], k: int) -> Lists:
    """The `k` best items of each user by the mean of the scores in several lists, as `joined` says."""
    users = len(several[0].ids)
    result = Lists(np.full((users, k), PAD, np.int32), np.full((users, k), -np.inf, np.float32))
    if users == 0:
        return result
    there = [lists.ids != PAD for lists in several]
    lowest = [
        np.where(some, lists.scores, np.inf).min(axis=1) for lists, some in zip(several, there, strict=True)
    ]
    lowest = [np.where(np.isfinite(each), each, 0.0).astype(np.float64) for each in lowest]
    user = np.concatenate([np.nonzero(some)[0] for some in there])
    item = np.concatenate([lists.ids[some] for lists, some in zip(several, there, strict=True)])
    # How far each item of each list is above that list's last one; nothing where it is not there.
    above = [
        (lists.scores - last[:, None])[some] for lists, last, some in zip(several, lowest, there, strict=True)
    ]
    beyond = int(item.max(initial=0)) + 1
    pair, place = np.unique(user * beyond + item, return_inverse=True)
    user, item = np.divmod(pair, beyond)
    mean = np.bincount(place, weights=np.concatenate(above), minlength=len(pair))
    mean = (mean + np.sum(lowest, axis=0)[user]) / len(several)
    order = np.lexsort((item, -mean, user))
    item, mean = item[order], mean[order]
    rank = np.arange(len(user)) - np.searchsorted(user, user)  # its place among those of the same user
    kept = rank < k
    result.ids[user[kept], rank[kept]] = item[kept]
    result.scores[user[kept], rank[kept]] = mean[kept]
    return result
