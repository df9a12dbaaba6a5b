"""The best that any recommender can reach, where the source knows it: lists by the true distribution."""

from collections.abc import Callable

import numpy as np

from dynrec_jax.data import synthetic
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.evaluate.recommender import Lists

KIND = "synthetic"


def synthetic_spec(dataset: Dataset) -> synthetic.SyntheticSpec | None:
    """What a dataset was generated from; None where it was not, or where filters or new ids changed it since."""
    info = dataset.info
    kind, _, settings = dataset.source.partition(":")
    events_dropped = any(count for what, count in info["dropped"].items() if not what.startswith("item"))
    if kind != KIND or info["pseudonymised"] or events_dropped:
        return None
    return synthetic.parse(settings)


def oracle_lists(spec: synthetic.SyntheticSpec, dataset: Dataset, k: int) -> Callable[..., Lists]:
    """A function (histories, users, ends) -> Lists by the distribution that event number `end` was drawn from."""
    place = {item: i for i, item in enumerate(synthetic.item_ids(spec))}
    # Items that nobody took are not in the dataset, so its columns are a subset.
    column_N = np.array([place[item] for item in dataset.item_ids().to_pylist()], np.int64)

    def lists(histories: Histories, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        ids = histories.ids_of(users_U)
        chosen = np.zeros((len(ids), k), np.int32)
        scores = np.zeros((len(ids), k), np.float32)
        # In the order they were generated in: each block of users is then drawn once.
        order_U = np.argsort(np.array(ids))
        for start in range(0, len(ids), 512):
            part = order_U[start : start + 512]
            some = [ids[i] for i in part]
            true_BxN = synthetic.oracle_scores(spec, some, ends_U[part].tolist())[:, column_N]
            order_BxK = np.argsort(-true_BxN, axis=1, kind="stable")[:, :k]
            chosen[part] = order_BxK + 1
            scores[part] = np.take_along_axis(true_BxN, order_BxK, axis=1)
        return Lists(chosen, scores)

    return lists
