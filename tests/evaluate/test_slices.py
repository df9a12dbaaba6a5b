"""Ways to cut queries into bins, against the same in plain Python, and how soon a metric comes back."""

from pathlib import Path

import numpy as np
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.pipeline import make_splits, time_cuts
from dynrec_jax.evaluate.baselines.learned import Learning
from dynrec_jax.evaluate.drift import measure_slices, recovery
from dynrec_jax.evaluate.evaluator import asked
from dynrec_jax.evaluate.slices import (
    LENGTHS,
    NO_BIN,
    NONE_NEAR,
    SPANS,
    Queries,
    all_slices,
    events_since_change,
)

from .. import tiny


@pytest.fixture(scope="module", params=["leave_one_out", "global_time"])
def learning(request: pytest.FixtureRequest, timed_dataset: Dataset, cache_dir: Path) -> Learning:
    held = Histories(timed_dataset, cache_dir)
    config = tiny.config(evaluation__split=request.param, evaluation__holdout=0.2, evaluation__targets="all")
    return Learning(held, make_splits(held, config), config)


def test_bins_are_those_of_plain_python(learning: Learning):
    held, splits = learning.histories, learning.splits
    users, ends = asked(splits, "test")
    queries = Queries(users, ends, held.item_at(users, ends))
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(learning.items, 5))
    found = {way.name: way for way in all_slices(learning, queries, lambda: vectors)}
    assert set(found) == {"history", "item_popularity", "user", "since_training", "item_age", "recent_change"}
    rows = [row for shard in range(held.dataset.shards) for row in held.dataset.read_shard(shard).to_pylist()]
    trained = [
        (item, time)
        for row, end in zip(rows, splits.train_end, strict=True)
        for item, time in zip(row["items"][:end], row["times"][:end], strict=True)
    ]
    counts = np.bincount([item for item, _ in trained], minlength=learning.items + 1)
    order = sorted(range(1, learning.items + 1), key=lambda item: -counts[item])
    before = dict(zip(order, np.cumsum([0] + [counts[item] for item in order]).tolist(), strict=False))
    changes = {}
    for q, (user, end, target) in enumerate(zip(users, ends, queries.targets, strict=True)):
        row = rows[user]
        length_bin = sum(end > limit for limit in LENGTHS)
        assert found["history"].bin_Q[q] == length_bin
        share = 3 if counts[target] == 0 else before[target] * 3 // len(trained)
        assert found["item_popularity"].bin_Q[q] == share
        assert found["user"].bin_Q[q] == int(splits.train_end[user] == 0)
        now = row["times"][end]
        since = row["times"][splits.train_end[user] - 1]
        if learning.config.evaluation.split == "global_time":
            since = time_cuts(held, learning.config.evaluation)[0]
        assert found["since_training"].bin_Q[q] == sum(now - since > limit for limit, _ in SPANS)
        first = min((time for item, time in trained if item == target), default=None)
        age = len(SPANS) + 1 if first is None else sum(now - first > limit for limit, _ in SPANS)
        assert found["item_age"].bin_Q[q] == age
        assert max(length_bin, age) < len(found["item_age"].labels)
        if end >= 10:
            history = vectors[np.array(row["items"][:end]) - 1][-55:]
            a, b = history[-5:].mean(axis=0), history[:-5].mean(axis=0)
            changes[q] = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    bins = found["recent_change"].bin_Q
    assert set(np.flatnonzero(bins != NO_BIN).tolist()) == set(changes)
    quarters = np.quantile(list(changes.values()), [0.25, 0.5, 0.75])
    for q, change in changes.items():
        assert bins[q] == sum(change > cut for cut in quarters)


def test_events_are_counted_from_a_change_that_lasts():
    #            five of 1, six of 2, two of 3 (too short to be one), five of 2
    main = [1] * 5 + [2] * 6 + [3] * 2 + [2] * 5
    found = events_since_change(main).tolist()
    assert found == [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, *[NONE_NEAR] * 7]
    # Two changes ten events apart: the last five of those are before the second one.
    found = events_since_change([1] * 5 + [2] * 10 + [3] * 5).tolist()
    assert found == [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4]
    assert set(events_since_change([1] * 30).tolist()) == {NONE_NEAR}
    assert events_since_change([]).tolist() == []


def test_a_metric_is_back_where_it_first_reaches_nine_tenths():
    def way(before: list[float], after: list[float]) -> dict[str, object]:
        values = dict(zip([*range(-len(before), 0), *range(len(after))], [*before, *after], strict=True))
        return {
            "bins": [
                {"label": f"{at:+d}", "queries": 1, "metrics": {"model": {"ndcg@10": {"mean": value}}}}
                for at, value in values.items()
            ]
        }

    def back(before: list[float], after: list[float]) -> int | None:
        return recovery(way(before, after), "model", "ndcg@10")

    assert back([0.5, 0.5], [0.1, 0.3, 0.45, 0.2]) == 2
    assert back([0.4, 0.6], [0.449, 0.44]) is None
    assert back([], [1.0]) is None
    assert back([0.0], [0.0]) is None, "there is nothing to come back to"


def test_an_empty_bin_has_no_metrics():
    from dynrec_jax.evaluate.slices import Slices

    queries = Queries(np.array([0, 1, 1]), np.array([3, 4, 5]), np.array([1, 2, 3]))
    way = Slices("w", "W", ("a", "b", "c"), np.array([0, 2, NO_BIN]))
    (found,) = measure_slices([way], queries, {"model": np.array([1.0, np.inf, 1.0])}, (10,))
    assert [each["queries"] for each in found["bins"]] == [1, 0, 1]
    assert found["bins"][1]["metrics"] == {}
    assert found["bins"][0]["metrics"]["model"]["ndcg@10"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
