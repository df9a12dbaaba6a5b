"""The best that any recommender can reach, where the source knows it: lists by the true distribution."""

from collections.abc import Callable

import numpy as np

from dynrec_jax.data import synthetic
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.evaluate.recommender import Lists

KIND = "synthetic:"


def synthetic_spec(dataset: Dataset) -> synthetic.SyntheticSpec | None:
    """What a dataset was generated from; None where it was not, or where filters or new ids changed it since."""
    info = dataset.info
    if not dataset.source.startswith(KIND) or info["pseudonymised"] or any(info["dropped"].values()):
        return None
    return synthetic.parse(dataset.source.removeprefix(KIND))


def oracle_lists(spec: synthetic.SyntheticSpec, dataset: Dataset, k: int) -> Callable[..., Lists]:
    """A function (histories, users, ends) -> Lists by the distribution that event number `end` was drawn from."""
    place = {item: i for i, item in enumerate(synthetic.item_ids(spec))}
    # Items that nobody took are not in the dataset, so its columns are a subset.
    column_N = np.array([place[item] for item in dataset.item_ids().to_pylist()], np.int64)

    def lists(histories: Histories, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        ids = histories.ids_of(users_U)
        chosen = np.zeros((len(ids), k), np.int32)
        scores = np.zeros((len(ids), k), np.float32)
        for start in range(0, len(ids), 512):
            part = slice(start, start + 512)
            true_BxN = synthetic.oracle_scores(spec, ids[part], ends_U[part].tolist())[:, column_N]
            order_BxK = np.argsort(-true_BxN, axis=1, kind="stable")[:, :k]
            chosen[part] = order_BxK + 1
            scores[part] = np.take_along_axis(true_BxN, order_BxK, axis=1)
        return Lists(chosen, scores)

    return lists
