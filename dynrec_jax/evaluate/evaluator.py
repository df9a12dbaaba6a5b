"""Evaluation: the whole catalogue ranked for every user that has a target, with its protocol and baselines."""

from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.cold import cold_items
from dynrec_jax.data.examples import Asked, Splits
from dynrec_jax.data.pipeline import time_cuts
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.evaluate.metrics import Coverage, rank_counts, ranking_metrics, ranks
from dynrec_jax.evaluate.popular import popularity_counts
from dynrec_jax.evaluate.recommender import ListMaker, Recommender, fixed_lists, groups
from dynrec_jax.models.features import Items
from dynrec_jax.models.model import Model
from dynrec_jax.parallel.mesh import sum_of_parts
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.parallel.table import in_rows, rows_for

LIST_LENGTH = 100  # what scoring writes by default: the metrics are those of that list


def asked(splits: Splits, which: str) -> Asked:
    """The events that "validation" or "test" asks for."""
    return splits.validation if which == "validation" else splits.test


def measured_ks(config: ml_collections.ConfigDict, items: int) -> tuple[int, ...]:
    """Those of `evaluation.ks` that a catalogue of `items` has lists for.

    Raises:
      ConfigError: one exceeds the lists that are made, or `evaluation.metric` exceeds the catalogue.
    """
    if max(config.evaluation.ks) > LIST_LENGTH:
        raise ConfigError(
            f"config.evaluation.ks: {max(config.evaluation.ks)}; lists have {LIST_LENGTH} items, expected no more"
        )
    ks = tuple(k for k in config.evaluation.ks if k <= items)
    _, _, k = config.evaluation.metric.partition("@")
    if k and int(k) not in ks:
        raise ConfigError(
            f"config.evaluation.metric: {config.evaluation.metric!r}, and the catalogue has {items} items; "
            "choose a metric of a shorter list, or mrr"
        )
    return ks


class Evaluator:
    """Metrics of one split of a dataset; each of several processes brings the users of its shards.

    Attributes:
      histories: of this process's shards.
      splits: of these histories.
      which: "validation" or "test".
      users: how many are asked, in all processes; one who is asked for several events counts as often.
      users_U: int64[U], those that this process brings.
      ends_U: int64[U], the event that each is asked for.
      targets_U: int32[U], its item.
      ks: cut-offs of the metrics.
      recommender: makes the lists.
    """

    def __init__(
        self,
        histories: Histories,
        splits: Splits,
        which: str,
        model: Model,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        processes: Processes = ALONE,
        items: Items | None = None,
    ):
        """`histories` and `splits` are those of this process's shards; `items` as `Recommender` takes them.

        Raises:
          ConfigError: a metric is of longer lists than there are.
          DataError: no user has such a target.
        """
        self.histories = histories
        self.splits = splits
        self._config = config
        self._processes = processes
        self._items = histories.dataset.items
        self.which = which
        self.ks = measured_ks(config, self._items)
        k = min(LIST_LENGTH, self._items)
        self.recommender = Recommender(
            model, mesh, config.evaluation.batch_size, k, config.evaluation.filter_seen, processes, items
        )
        self.users_U, self.ends_U = asked(splits, which)
        self.targets_U = histories.item_at(self.users_U, self.ends_U)
        self.users = self._in_all(len(self.users_U))
        if self.users == 0:
            raise DataError(
                f"{histories.dataset.path}: no user has a {which} target; a user needs three events or more"
            )
        parts = [slice(*np.searchsorted(self.users_U, [g.start, g.stop])) for g in groups(histories)]
        # As many in every process: lists are made by all together.
        short = max(processes.exchange(len(parts))) - len(parts)
        self._parts = parts + [slice(0, 0)] * short

    def before_batch(self, work: Callable[[], None]) -> None:
        """Has `work` done before each batch of users, in all processes; what it raises ends the measuring."""
        self.recommender.before_batch = work

    def _in_all(self, own: int) -> int:
        """A count of this process's users, added up over the processes."""
        return sum(self._processes.exchange(own if self.recommender.own.lead else 0))

    def _sum(self, counts: np.ndarray) -> np.ndarray:
        return sum_of_parts(self.recommender.mesh, self.recommender.own, counts)

    def metrics(self, params: Any, tables: Any) -> dict[str, float]:
        """The model's metrics; raises NonFiniteScores where it gives NaN."""
        return self.metrics_of(self.recommender.prepare(params, tables))

    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of `popularity` and `recent_popularity`, counted on training events alone."""
        result = {}
        for name, own in popularity_counts(self.histories, self.splits, self._config).items():
            counts = self._sum(own)
            # Their ranks: counts above 2^24 would tie in float32.
            ranks = np.unique(counts, return_inverse=True)[1].astype(np.float32)
            scores_R = in_rows(ranks, rows_for(self._items))
            lists = fixed_lists(self.recommender, scores_R, self._items, self._config.loss.block_items)
            result[name] = self.metrics_of(lists)
        return result

    def cold(self, lists: ListMaker) -> dict[str, float]:
        """How items are found that no training history has: metrics of the users whose target is one, and `users`.

        Empty where the config keeps no items apart, or nobody is asked for one.
        """
        share = self._config.data.cold_items
        if not share:
            return {}
        only_U = cold_items(self._items, share)[self.targets_U]
        users = self._in_all(int(only_U.sum()))
        return {"users": users, **self.metrics_of(lists, only_U)} if users else {}

    def ranks_of(self, lists: ListMaker) -> np.ndarray:
        """float64, the place of each target that this process brings in its list, from 1; infinity where it is not."""
        found_U = np.full(len(self.users_U), np.inf)
        for part in self._parts:
            made = lists(self.histories, self.users_U[part], self.ends_U[part])
            found_U[part] = ranks(made.ids, self.targets_U[part])
        return found_U

    def metrics_of(self, lists: ListMaker, only_U: np.ndarray | None = None) -> dict[str, float]:
        """Metrics of what a function (histories, users, ends) -> Lists recommends; to some users alone, if told so."""
        k = self.recommender.k
        counts, coverage = np.zeros(k + 1, np.int64), Coverage(self._items, self.ks)
        for part in self._parts:
            users, ends, targets = self.users_U[part], self.ends_U[part], self.targets_U[part]
            if only_U is not None:
                chosen = only_U[part]
                users, ends, targets = users[chosen], ends[chosen], targets[chosen]
            made = lists(self.histories, users, ends)
            counts += rank_counts(ranks(made.ids, targets), k)
            coverage.add(made.ids)
        counts = self._sum(counts)
        shown = self._sum(np.stack(list(coverage.shown.values())).astype(np.int64)) > 0
        coverage.shown = dict(zip(coverage.shown, shown, strict=True))
        return {**ranking_metrics(counts, self.ks), **coverage.metrics()}

    def protocol(self) -> dict[str, Any]:
        """What a number of this evaluation means, for the output."""
        dataset, split = self.histories.dataset, self._config.evaluation.split
        result: dict[str, Any] = {
            "split": split,
            "ties": dataset.info["ties"],
            "ranked": "whole catalogue",
            "filter_seen": bool(self._config.evaluation.filter_seen),
            "query_time": bool(self._config.model.query_time),
            "target_events": list(self._config.data.target_events) or "all",
            "cold_items": float(self._config.data.cold_items),
            "list_length": self.recommender.k,
            "equal_scores": "lowest item index first",
            "targets_in_history": self._in_all(self._targets_in_history()),
            "leak": "none",
        }
        if split == "leave_one_out":
            result["leak"] = "training events of some users are later than targets of others"
            if not dataset.has_times:
                result["leak"] = "unknown: the data has no times"
        else:
            validation, test = time_cuts(self.histories, self._config.evaluation)
            result["validation_from"], result["test_from"] = validation, test
            result["targets"] = str(self._config.evaluation.targets)
        return result

    def _targets_in_history(self) -> int:
        """Users whose target is in their history; where seen items are masked, each is a miss."""
        count = 0
        size = self._config.evaluation.batch_size
        order = np.argsort(self.ends_U, kind="stable")
        for start in range(0, len(order), size):
            place = order[start : start + size]
            longest = int(self.ends_U[place].max())
            seen = self.histories.last_items(self.users_U[place], self.ends_U[place], longest)
            count += int((seen == self.targets_U[place][:, None]).any(axis=1).sum())
        return count
