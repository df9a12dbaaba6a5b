"""How popular items are, in training events alone."""

import ml_collections
import numpy as np

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.cold import cold_items
from dynrec_jax.data.examples import Splits
from dynrec_jax.data.pipeline import time_cuts
from dynrec_jax.evaluate.beyond import KINDS, Known, popularity_groups, self_information, shares, thirds


def popularity_counts(
    histories: Histories, splits: Splits, config: ml_collections.ConfigDict
) -> dict[str, np.ndarray]:
    """int64[N + 1] by baseline, counted on training events.

    `recent_popularity` counts those from the moment on after which the latest share (`evaluation.recent`) of all
    events lies, or, in data without times, the latest share of each user's training events.
    """
    share = config.evaluation.recent
    result = {"popularity": histories.item_counts(splits.train_end)}
    cold_N = cold_items(histories.dataset.items, config.data.cold_items)
    dataset = histories.dataset
    if dataset.has_times:
        quantiles = dataset.info["time_quantiles"]
        last = len(quantiles) - 1
        trained = 1.0
        if config.evaluation.split == "global_time":
            trained = float(np.searchsorted(quantiles, time_cuts(histories, config.evaluation)[0]) / last)
        since = int(quantiles[round(trained * (1 - share) * last)])
        result["recent_popularity"] = histories.item_counts(splits.train_end, since=since)
    else:
        recent_U = np.maximum(np.ceil(splits.train_end * share).astype(np.int64), 1)
        result["recent_popularity"] = histories.item_counts(splits.train_end, splits.train_end - recent_U)
    return {name: np.where(cold_N, 0, counts) for name, counts in result.items()}


def known_of(histories: Histories, splits: Splits, config: ml_collections.ConfigDict) -> Known:
    """What lists are measured by (`evaluate.beyond`), of the events that train; all shards are held."""
    end_U = splits.train_end
    cold_N = cold_items(histories.dataset.items, config.data.cold_items)
    holders_N = np.where(cold_N, 0, histories.holders(end_U))
    users = int((end_U > 0).sum())
    share_N = shares(holders_N, users)
    profile_U = histories.means(share_N, end_U)
    kind_N = popularity_groups(np.where(cold_N, 0, histories.item_counts(end_U)))
    return Known(
        share_N=share_N,
        information_N=self_information(holders_N, users),
        profile_U=profile_U,
        group_U=thirds(profile_U),
        kind_N=kind_N,
        spread_UxG=np.stack([histories.means(kind_N == kind, end_U) for kind in range(KINDS)], axis=1),
    )
