"""Metrics by hand."""

import numpy as np
import pytest

from dynrec_jax.evaluate.metrics import Coverage, rank_counts, ranking_metrics, ranks

LISTS = np.array([[4, 2, 9], [1, 3, 5], [7, 0, 0], [6, 8, 2]])
TARGETS = np.array([4, 5, 3, 8])


def test_ranks_count_from_1_and_a_miss_is_infinite():
    assert ranks(LISTS, TARGETS).tolist() == [1.0, 3.0, np.inf, 2.0]


def test_metrics_by_hand():
    metrics = ranking_metrics(rank_counts(ranks(LISTS, TARGETS), 3), (1, 2, 3))
    gain = [1.0, 1 / 2, 1 / np.log2(3)]  # of ranks 1, 3 and 2
    assert metrics == pytest.approx(
        {
            "recall@1": 1 / 4,
            "recall@2": 2 / 4,
            "recall@3": 3 / 4,
            "ndcg@1": 1 / 4,
            "ndcg@2": (gain[0] + gain[2]) / 4,
            "ndcg@3": sum(gain) / 4,
            "mrr": (1 + 1 / 3 + 1 / 2) / 4,
        }
    )


def test_targets_are_counted_by_place():
    assert rank_counts(ranks(LISTS, TARGETS), 3).tolist() == [1, 1, 1, 1]
    assert rank_counts(np.array([2.0, 2.0, 9.0, np.inf]), 5).tolist() == [2, 0, 2, 0, 0, 0]


def test_the_mean_over_nobody_is_0():
    assert set(ranking_metrics(rank_counts(np.zeros(0), 5), (5,)).values()) == {0.0}


def test_coverage_is_the_share_of_items_shown():
    coverage = Coverage(10, (1, 3))
    coverage.add(LISTS[:2])
    coverage.add(LISTS[2:])
    assert coverage.metrics() == pytest.approx({"coverage@1": 4 / 10, "coverage@3": 9 / 10})
