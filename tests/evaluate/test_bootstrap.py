"""Intervals against the normal distribution, and what pairing and several queries of a user change."""

import numpy as np
import pytest

from dynrec_jax.evaluate.bootstrap import interval, resampled_means
from dynrec_jax.evaluate.comparison import Entry, compare

USERS = 2_000


def test_the_interval_of_many_users_is_that_of_the_normal_distribution():
    gains = np.random.default_rng(0).random((USERS, 1)) < 0.2
    found = interval(gains.mean(), resampled_means(gains.astype(float), np.arange(USERS))[:, 0])
    half = 1.96 * gains.std() / np.sqrt(USERS)
    assert found.mean == pytest.approx(gains.mean())
    assert found.low == pytest.approx(gains.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gains.mean() + half, abs=0.1 * half)


def test_queries_of_one_user_are_drawn_together():
    """The same gain four times says no more than once."""
    gains = np.random.default_rng(1).random((USERS, 1))
    once = resampled_means(gains, np.arange(USERS))
    four = resampled_means(np.repeat(gains, 4, axis=0), np.repeat(np.arange(USERS), 4))
    np.testing.assert_allclose(four, once, rtol=1e-12)


def test_models_are_compared_on_the_same_users():
    rng = np.random.default_rng(2)
    hard = rng.random(USERS) < 0.8  # nobody finds these
    first = np.where(hard, np.inf, rng.integers(1, 40, USERS).astype(float))
    better = np.where(hard, np.inf, np.maximum(first - 1, 1))
    rows = compare(
        [Entry("a", first[None]), Entry("b", better[None]), Entry("c", first[None])], np.arange(USERS), (10,)
    )
    assert [row.entry.name for row in rows] == ["a", "b", "c"]
    assert rows[2].differences["ndcg@10"] == (0.0, 0.0, 0.0)
    apart = rows[1].differences["mrr"]
    assert 0 < apart.low < apart.mean < apart.high
    assert rows[1].metrics["mrr"].low < rows[0].metrics["mrr"].high, "alone, they could not be told apart"
    found = first <= 10
    assert rows[0].metrics["recall@10"].mean == pytest.approx(found.mean())
    assert rows[0].metrics["ndcg@10"].mean == pytest.approx(np.where(found, 1 / np.log2(first + 1), 0).mean())


def test_runs_of_several_seeds_are_averaged_user_by_user():
    ranks = np.array([[1.0, np.inf, 2.0, 4.0], [3.0, 1.0, np.inf, 4.0]])
    (row,) = compare([Entry("a", ranks)], np.arange(4), (3,))
    assert row.metrics["recall@3"].mean == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert row.metrics["mrr"].mean == pytest.approx(np.mean([(1 + 1 / 3) / 2, 0.5, 0.25, 0.25]))
