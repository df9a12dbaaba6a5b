"""Lists made anew, beside literal implementations that are slow and plain."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.evaluate.beyond import HEAD, SMOOTHING, TAIL
from dynrec_jax.evaluate.recommender import Lists, Recommender
from dynrec_jax.score.rerank import Rerank, calibrated, diversified, history_shares, relevance

from .. import tiny

B, C, D, K = 9, 12, 4, 7
ITEMS = 25  # of the dataset `tiny_dataset`


@pytest.fixture(scope="module")
def stored(tiny_dataset: Dataset, cache_dir: Path) -> Histories:
    return Histories(tiny_dataset, cache_dir)


def pools() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pools of 12 with a score that comes twice; one of them has four items, one has none, one has equal scores."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(40)[:C] + 1 for _ in range(B)]).astype(np.int32)
    scores = -np.sort(-rng.normal(size=(B, C)), axis=1).astype(np.float32)
    scores[:, 3] = scores[:, 4]
    scores[4] = 1.5
    ids[:, 3:5].sort(axis=1)
    ids[4].sort()
    for row, left in ((1, 4), (2, 0)):
        ids[row, left:], scores[row, left:] = 0, -np.inf
    vectors = rng.normal(size=(B, C, D)).astype(np.float32) * rng.uniform(0.5, 3, (B, C, 1)).astype(
        np.float32
    )
    vectors[3, 5] = 0.0
    vectors[5, 1] = 2 * vectors[5, 0]
    return ids, scores, vectors


def scaled(ids, scores):
    real = [float(s) for i, s in zip(ids, scores, strict=True) if i]
    low, high = (min(real), max(real)) if real else (0.0, 0.0)
    return [(float(s) - low) / ((high - low) or 1.0) if i else None for i, s in zip(ids, scores, strict=True)]


def greedy(ids, scores, k, value):
    """Item after item, the best of those that are left, by the lowest id; `value` of a place, given those taken."""
    taken: list[int] = []
    while len(taken) < k:
        left = [at for at in range(len(ids)) if ids[at] and at not in taken]
        if not left:
            break
        worth = {at: value(at, taken) for at in left}
        best = max(worth.values())
        taken.append(min((at for at in left if worth[at] >= best - 1e-6), key=lambda at: ids[at]))
    short = k - len(taken)
    return [int(ids[at]) for at in taken] + [0] * short, [float(scores[at]) for at in taken] + [
        -math.inf
    ] * short


def literal_diversified(ids, scores, vectors, k, weight):
    relevant = scaled(ids, scores)

    def cosine(a, b):
        norms = np.linalg.norm(vectors[a].astype(float)) * np.linalg.norm(vectors[b].astype(float))
        return float(vectors[a].astype(float) @ vectors[b].astype(float) / norms) if norms else 0.0

    def value(at, taken):
        return (1 - weight) * relevant[at] - weight * max((cosine(at, other) for other in taken), default=0.0)

    return greedy(ids, scores, k, value)


def literal_calibrated(ids, scores, groups, p, k, weight):
    relevant = scaled(ids, scores)

    def value(at, taken):
        chosen = [*taken, at]
        kl = 0.0
        for group, share in enumerate(p):
            q = sum(groups[each] == group for each in chosen) / len(chosen)
            if share:
                kl += share * math.log(share / ((1 - SMOOTHING) * q + SMOOTHING * share))
        return (1 - weight) * sum(relevant[each] for each in chosen) - weight * kl

    return greedy(ids, scores, k, value)


def assert_rows(found, expected):
    ids, scores = (np.asarray(x) for x in found)
    for row, (wanted, worth) in enumerate(expected):
        assert ids[row].tolist() == wanted, row
        assert scores[row].tolist() == worth


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_diversified_lists_are_those_of_the_definition(weight):
    ids, scores, vectors = pools()
    found = jax.jit(functools.partial(diversified, k=K, weight=weight))(ids, scores, vectors)
    assert_rows(found, [literal_diversified(ids[b], scores[b], vectors[b], K, weight) for b in range(B)])


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.99])
def test_calibrated_lists_are_those_of_the_definition(weight):
    ids, scores, _ = pools()
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 3, (B, C)).astype(np.int32)
    p = rng.dirichlet([1, 1, 1], B).astype(np.float32)
    p[0], p[6] = 0.0, [1, 0, 0]
    found = jax.jit(functools.partial(calibrated, k=K, weight=weight))(ids, scores, groups, p)
    assert_rows(found, [literal_calibrated(ids[b], scores[b], groups[b], p[b], K, weight) for b in range(B)])
    assert np.asarray(found[0])[0].tolist() == ids[0, :K].tolist()  # no history: by relevance alone


def test_by_hand_what_is_unlike_comes_before_what_is_better_and_alike():
    ids, scores = np.array([[7, 3, 5, 2]], np.int32), np.array([[4.0, 3.0, 2.0, 0.0]], np.float32)
    vectors = np.array([[[1, 0], [2, 0], [0, 1], [-1, 0]]], np.float32)
    # Relevance 1, 0.75, 0.5, 0. After 7: 3 is worth 0.375 - 0.5, 5 is worth 0.25 and 2 is worth 0.5; then 5.
    found, kept = diversified(ids, scores, vectors, 4, 0.5)
    assert np.asarray(found).tolist() == [[7, 2, 5, 3]]
    assert np.asarray(kept).tolist() == [[4.0, 0.0, 2.0, 3.0]]


def test_by_hand_a_list_gets_the_groups_of_the_history():
    ids, scores = np.array([[1, 2, 3, 4]], np.int32), np.array([[4.0, 3.0, 2.0, 1.0]], np.float32)
    groups = np.array([[HEAD, HEAD, HEAD, TAIL]], np.int32)
    half = np.array([[0.5, 0.0, 0.5]], np.float32)
    assert np.asarray(calibrated(ids, scores, groups, half, 2, 0.9)[0]).tolist() == [[1, 4]]
    only = np.array([[1.0, 0.0, 0.0]], np.float32)
    assert np.asarray(calibrated(ids, scores, groups, only, 2, 0.9)[0]).tolist() == [[1, 2]]


def test_a_weight_of_0_leaves_lists_as_they_are_and_a_pool_holds_what_is_taken():
    ids, scores, vectors = pools()
    groups, p = np.zeros((B, C), np.int32), np.full((B, 3), 1 / 3, np.float32)
    for found in (diversified(ids, scores, vectors, K, 0.0), calibrated(ids, scores, groups, p, K, 0.0)):
        np.testing.assert_array_equal(found[0], ids[:, :K])
        np.testing.assert_array_equal(found[1], scores[:, :K])
    with pytest.raises(ValueError, match="13 of 12 candidates"):
        diversified(ids, scores, vectors, 13, 0.5)


def test_relevance_is_from_0_to_1_whatever_the_scores_are():
    ids, scores, _ = pools()
    found = np.asarray(relevance(jnp.asarray(ids), jnp.asarray(scores)))
    assert found[0].max() == pytest.approx(1.0)
    assert found[0].min() == 0.0
    assert not found[2].any()
    assert np.isfinite(found).all()


def test_a_history_is_spread_over_the_groups_up_to_the_event_that_is_asked_for(stored: Histories):
    groups = np.arange(20, dtype=np.int32) % 3  # items 20 … 25 came later: they are in the tail
    users, ends = np.array([40, 5, -1, 12]), np.array([20, 3, 0, 0])
    found = history_shares(stored, users, ends, groups)
    for row, (user, end) in enumerate(zip(users, ends, strict=True)):
        if end:
            items = stored.windows(np.array([user]), np.array([end]), end).items[0]
            of = np.array([groups[i] if i < 20 else TAIL for i in items])
            np.testing.assert_allclose(found[row], [(of == g).mean() for g in range(3)], rtol=1e-6)
    assert not found[2:].any()


@pytest.mark.parametrize(("kind", "sizes"), [("diversify", (2, 2, 2)), ("calibrate", (1, 1, 1))])
def test_lists_of_many_users_are_those_of_their_pools(stored: Histories, sizes, kind, monkeypatch):
    """Over several devices too, whatever the blocks, the last of which is not full."""
    monkeypatch.setattr("dynrec_jax.score.rerank.TOGETHER", 2)
    model, params, tables = tiny.bstm(ITEMS)
    mesh = tiny.mesh(*sizes)
    recommender = Recommender(model, mesh, 8, 15, True)
    table = recommender.vectors(params, tables)[1]
    maker = recommender.prepare(params, tables)
    users = np.arange(3, 38)
    ends = stored.lengths[users]
    pool: Lists = maker(stored, users, ends)
    groups = np.arange(ITEMS + 1, dtype=np.int32) % 3
    rerank = Rerank(15, 0.6) if kind == "diversify" else Rerank(15, calibrate=0.9, group_N=groups)
    assert rerank.length(6, ITEMS) == 15
    made = rerank.of(maker, mesh, table, 6)(stored, users, ends)
    assert made.ids.shape == made.scores.shape == (35, 6)
    vectors = np.asarray(tables["item_id"])
    shares = history_shares(stored, users, ends, groups)
    changed = 0
    for u in range(len(users)):
        ids, scores = pool.ids[u], pool.scores[u]
        if kind == "diversify":
            wanted = literal_diversified(ids, scores, vectors[ids], 6, 0.6)
        else:
            wanted = literal_calibrated(ids, scores, groups[ids], shares[u], 6, 0.9)
        assert made.ids[u].tolist() == wanted[0]
        assert made.scores[u].tolist() == wanted[1]
        changed += wanted[0] != ids[:6].tolist()
    assert changed > 20
    nobody = rerank.of(maker, mesh, table, 6)(stored, users[:0], ends[:0])
    assert nobody.ids.shape == (0, 6)
