"""Several runs and all baselines on the same queries, with intervals."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynrec_jax.evaluate.baselines.known import BASELINES
from dynrec_jax.evaluate.baselines.learned import Learning, Scorer, Unable, lists_of
from dynrec_jax.evaluate.bootstrap import Interval, interval, resampled_means
from dynrec_jax.evaluate.evaluator import Evaluator
from dynrec_jax.evaluate.metrics import rank_counts, ranking_metrics


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
      name: of the run or the baseline.
      ranks_SxQ: float64, places of the targets in the lists, a row a run; infinity where they are not there.
      about: what else the output says of it.
      baseline: whether it is one.
    """

    name: str
    ranks_SxQ: np.ndarray
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    baseline: bool = False


@dataclasses.dataclass(frozen=True)
class Compared:
    """An entry with its metrics.

    Attributes:
      entry: what was measured.
      metrics: by name.
      differences: to the first entry's metrics, on the same users; of the first itself all 0.
    """

    entry: Entry
    metrics: dict[str, Interval]
    differences: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.entry.name,
            "baseline": self.entry.baseline,
            "metrics": {name: value.as_dict() for name, value in self.metrics.items()},
            "difference": {name: value.as_dict() for name, value in self.differences.items()},
            **self.entry.about,
        }


def compare(entries: Sequence[Entry], users_Q: np.ndarray, ks: Sequence[int]) -> list[Compared]:
    """Means and paired intervals; users are drawn alike for all entries.

    Args:
      entries: the first is what the others are compared with.
      users_Q: whose each query is; ascending.
      ks: cut-offs of the metrics.
    """
    names = metric_names(ks)
    gains = [np.mean([gains_of(ranks_Q, ks) for ranks_Q in entry.ranks_SxQ], axis=0) for entry in entries]
    drawn = [resampled_means(gains_QxC, users_Q) for gains_QxC in gains]
    compared = []
    for entry, own, own_drawn in zip(entries, gains, drawn, strict=True):
        means, ahead = own.mean(axis=0), own_drawn - drawn[0]
        apart = means - gains[0].mean(axis=0)
        metrics = {name: interval(means[i], own_drawn[:, i]) for i, name in enumerate(names)}
        compared.append(
            Compared(entry, metrics, {name: interval(apart[i], ahead[:, i]) for i, name in enumerate(names)})
        )
    return compared


def main_metric(names: Iterable[str]) -> str:
    """The metric that tables and plots are about: ndcg@10, or of shorter lists that of the longest, or mrr."""
    names = list(names)
    ndcg = [name for name in names if name.startswith("ndcg@")]
    return "ndcg@10" if "ndcg@10" in names else ndcg[-1] if ndcg else "mrr"


def metric_names(ks: Sequence[int]) -> list[str]:
    """Names of the columns of `gains_of`."""
    return [f"{metric}@{k}" for k in ks for metric in ("ndcg", "recall")] + ["mrr"]


def gains_of(ranks_Q: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """float64[Q, C], what each query adds to ndcg and recall of each cut-off, and to the mean reciprocal rank."""
    gained_Q = 1 / np.log2(ranks_Q + 1)
    columns = [column for k in ks for column in (np.where(ranks_Q <= k, gained_Q, 0.0), ranks_Q <= k)]
    return np.stack([*columns, 1 / ranks_Q], axis=1).astype(np.float64)


def baseline_entries(
    names: Iterable[str],
    learning: Learning,
    test: Evaluator,
    validation: Evaluator | None,
    say: Callable[[str], None],
) -> list[Entry]:
    """Baselines, each with the setting that is best on validation by `evaluation.metric`.

    Args:
      names: which.
      learning: what they learn from.
      test: asks for what is reported.
      validation: chooses; None where nobody is asked, and then the first setting is taken.
      say: is told what is done and what cannot be.
    """
    entries = []
    for name in names:
        try:
            scorers = BASELINES[name](learning)
        except Unable as error:
            say(f"{name} is left out: {error}")
            continue
        setting = chosen_setting(scorers, learning, validation)
        scorer = scorers[setting]
        ranks_Q = test.ranks_of(scored_lists(scorer, learning, test))
        about: dict[str, Any] = {"setting": setting} if setting else {}
        if (accuracy := getattr(scorer, "accuracy", None)) is not None:
            about["accuracy"] = accuracy(learning.histories, test.users_U, test.ends_U, test.targets_U)
        say(f"{name} is measured" + (f": {setting}" if setting else ""))
        entries.append(Entry(name, ranks_Q[None], about, baseline=True))
    return entries


def scored_lists(scorer: Scorer, learning: Learning, evaluator: Evaluator) -> Callable[..., Any]:
    """A function (histories, users, ends) -> Lists by a baseline's scores, as long as the evaluator's."""
    return lists_of(
        scorer, learning.items, evaluator.recommender.k, bool(learning.config.evaluation.filter_seen)
    )


def chosen_setting(scorers: Mapping[str, Scorer], learning: Learning, validation: Evaluator | None) -> str:
    """The setting of a baseline that is best on validation; the first where there is none to choose or to choose by."""
    if len(scorers) == 1 or validation is None:
        return str(next(iter(scorers)))
    values = {}
    for setting, scorer in scorers.items():
        ranks_Q = validation.ranks_of(scored_lists(scorer, learning, validation))
        counts = rank_counts(ranks_Q, validation.recommender.k)
        metrics = ranking_metrics(counts, validation.ks)
        metric = learning.config.evaluation.metric
        values[setting] = metrics.get(metric, metrics["mrr"])  # coverage chooses no baseline
    return str(max(values, key=lambda setting: values[setting]))
