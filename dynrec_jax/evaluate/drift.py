"""The drift protocol: how good recommendations are in each part of the queries, for a model and baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynrec_jax.evaluate.bootstrap import interval, resampled_means
from dynrec_jax.evaluate.comparison import gains_of, main_metric, metric_names
from dynrec_jax.evaluate.slices import Queries, Slices

SHOWN = ("ndcg@10", "recall@10", "mrr")
RESAMPLES = 500


def measure_slices(
    slices: Sequence[Slices], queries: Queries, ranks: Mapping[str, np.ndarray], ks: Sequence[int]
) -> list[dict[str, Any]]:
    """Metrics with intervals of each bin, for JSON.

    Args:
      slices: ways to cut the queries.
      queries: what was asked.
      ranks: float64[Q] by name of the model or baseline, places of the targets in its lists.
      ks: cut-offs of the metrics.

    Returns:
      Of each way its `name`, `title` and `bins`: `label`, `queries`, and `metrics` by name of the model and of the
      metric, each with mean, low and high; empty where nobody is in the bin.
    """
    names = metric_names(ks)
    chosen = [
        names.index(metric) for metric in dict.fromkeys((main_metric(names), *SHOWN)) if metric in names
    ]
    gains = {name: gains_of(ranks_Q, ks)[:, chosen] for name, ranks_Q in ranks.items()}
    shown = [names[i] for i in chosen]
    return [
        {
            "name": way.name,
            "title": way.title,
            "bins": [
                _bin(label, way.bin_Q == number, queries, gains, shown)
                for number, label in enumerate(way.labels)
            ],
        }
        for way in slices
    ]


def _bin(
    label: str, here_Q: np.ndarray, queries: Queries, gains: Mapping[str, np.ndarray], shown: Sequence[str]
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name, gains_QxC in gains.items() if here_Q.any() else ():
        drawn = resampled_means(gains_QxC[here_Q], queries.users[here_Q], resamples=RESAMPLES)
        means = gains_QxC[here_Q].mean(axis=0)
        metrics[name] = {metric: interval(means[i], drawn[:, i]).as_dict() for i, metric in enumerate(shown)}
    return {"label": label, "queries": int(here_Q.sum()), "metrics": metrics}


def recovery(shift: Mapping[str, Any], name: str, metric: str, share: float = 0.9) -> int | None:
    """Events after a change of interest until a metric is back at a share of its level before; None where it never is.

    Args:
      shift: the way "shift" of `measure_slices`.
      name: of the model, the oracle or a baseline.
      metric: which.
      share: of the mean over the events before the change.
    """
    values = {int(each["label"]): each for each in shift["bins"] if each["metrics"]}
    before = [values[at] for at in values if at < 0]
    if not before:
        return None
    level = np.average(
        [each["metrics"][name][metric]["mean"] for each in before],
        weights=[each["queries"] for each in before],
    )
    if not level > 0:
        return None
    for at in sorted(offset for offset in values if offset >= 0):
        if values[at]["metrics"][name][metric]["mean"] >= share * level:
            return at
    return None
