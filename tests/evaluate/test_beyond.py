"""Metrics beside accuracy, by hand."""

import itertools
import math

import numpy as np
import pytest

from dynrec_jax.evaluate.beyond import (
    HEAD,
    MIDDLE,
    NO_GROUP,
    TAIL,
    Beyond,
    Known,
    Sets,
    divergence,
    gini,
    list_means,
    popularity_groups,
    self_information,
    set_diversity,
    thirds,
    vector_diversity,
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3, 3, 3], 0.0),
        ([0, 0, 7], 2 / 3),
        ([0, 0, 0], 0.0),
        # All differences between two, over twice the mean: 2 (1 + 3 + 2) / (2 · 3² · 2)
        ([1, 2, 4], 2 * (1 + 3 + 2) / (2 * 9 * (7 / 3))),
    ],
)
def test_gini_is_half_the_relative_mean_difference(counts, expected):
    assert gini(np.array(counts)) == pytest.approx(expected)
    pairs = [abs(a - b) for a, b in itertools.product(counts, repeat=2)]
    mean = np.mean(counts) or 1.0
    assert gini(np.array(counts)[::-1]) == pytest.approx(np.mean(pairs) / (2 * mean))


def test_what_half_of_all_have_tells_one_bit_and_what_nobody_has_as_much_as_what_one_has():
    assert self_information(np.array([0, 4, 8, 1, 0]), 8)[1:].tolist() == [1.0, 0.0, 3.0, 3.0]


def test_means_are_of_the_items_that_are_there():
    values = np.array([100.0, 1.0, 2.0, 6.0])
    found = list_means(values, np.array([[1, 3], [2, 0], [0, 0]]))
    assert found[:2].tolist() == [3.5, 2.0]
    assert math.isnan(found[2])


def test_users_are_cut_into_thirds_from_the_lowest_up():
    profile = np.array([0.5, np.nan, 0.1, 0.9, 0.2, 0.7, 0.3])
    assert thirds(profile).tolist() == [1, NO_GROUP, 0, 2, 0, 2, 1]


def test_diversity_is_one_less_the_mean_cosine_of_pairs():
    a, b, c = [3.0, 0.0], [0.0, 2.0], [-5.0, 0.0]
    none = [0.0, 0.0]
    v = np.array([[a, b, c], [a, a, none], [a, none, none]], np.float32)
    found = vector_diversity(v, (2, 3))
    # Cosines of the first list: a·b = 0, a·c = -1, b·c = 0.
    np.testing.assert_allclose(found[:, 0], [1.0, 1 + 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], [0.0, 0.0], atol=1e-6)
    assert np.isnan(found[:, 2]).all()


def test_diversity_of_sets_is_one_less_the_mean_jaccard_index_of_pairs():
    sets = Sets.of([("a", "b"), ("b", "c"), (), ("d",), ("a", "b")])
    ids = np.array([[1, 2, 4], [1, 5, 3], [3, 1, 0], [4, 3, 2]])
    found = set_diversity(sets.of_lists(ids), (2, 3))
    # {a, b} and {b, c} share one of three; nothing else is shared. An item without attributes makes no pair.
    np.testing.assert_allclose(found[:, 0], [2 / 3, (2 / 3 + 1 + 1) / 3], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], [0.0, 0.0], atol=1e-6)
    assert np.isnan(found[:, 2]).all()
    assert math.isnan(found[0, 3])
    assert found[1, 3] == pytest.approx(1.0)


def test_sets_of_lists_are_those_of_python():
    rng = np.random.default_rng(0)
    words = [[f"w{w}" for w in rng.choice(12, rng.integers(0, 6), replace=False)] for _ in range(30)]
    ids = rng.integers(0, 31, (9, 7))
    found = set_diversity(Sets.of(words).of_lists(ids), (7,))[0]
    for value, row in zip(found, ids, strict=True):
        have = [set(words[i - 1]) for i in row if i and words[i - 1]]
        apart = [1 - len(x & y) / len(x | y) for x, y in itertools.combinations(have, 2)]
        assert value == pytest.approx(np.mean(apart), rel=1e-6)


def test_the_head_has_a_fifth_of_the_events_and_so_has_the_tail():
    #            item 0, then 1 … 8: in order of counts 3, 1, 5, 2, 8, 7, 4 and 6, of 100 events
    counts = np.array([0, 15, 12, 30, 8, 13, 0, 10, 12])
    found = popularity_groups(counts)
    assert [item for item in range(1, 9) if found[item] == HEAD] == [3]
    assert [item for item in range(1, 9) if found[item] == TAIL] == [4, 6, 7]
    assert (popularity_groups(np.zeros(5, np.int64))[1:] == TAIL).all()
    # Ten items of the same count: two, six and two, the lowest index first.
    assert popularity_groups(np.array([0] + [7] * 10))[1:].tolist() == [HEAD] * 2 + [MIDDLE] * 6 + [TAIL] * 2


def test_divergence_by_hand():
    p = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [np.nan] * 3, [0.25, 0.25, 0.5]])
    q = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]])
    found = divergence(p, q)
    assert found[0] == pytest.approx(0.5 * math.log(0.5 / 0.995) + 0.5 * math.log(0.5 / 0.005))
    assert found[1] == pytest.approx(math.log(1 / 0.01))
    assert math.isnan(found[2])
    assert found[3] == pytest.approx(0.0)


def by_hand() -> Known:
    """Four histories: item 1 is in all, 2 in two of them, 3 in one, 4 in none."""
    holders, profile = np.array([0, 4, 2, 1, 0]), np.array([0.25, 0.5, 1.0, np.nan])
    spread = np.array([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [np.nan] * 3])
    kinds = np.array([TAIL, HEAD, MIDDLE, TAIL, TAIL])
    return Known(holders / 4, self_information(holders, 4), profile, thirds(profile), kinds, spread)


def test_metrics_of_lists_by_hand():
    made = Beyond(by_hand(), (1, 2))
    apart = {"diversity": np.array([[np.nan] * 3, [0.5, 0.25, np.nan]])}
    made.add(np.array([[1, 2], [2, 3], [1, 0]]), np.array([0, 2, -1]), apart)
    made.add(np.array([[1, 4]]), np.array([3]), {"diversity": np.array([[np.nan], [0.75]])})
    found = made.metrics()
    assert (made.users, made.unknown, made.without) == (4, 1, 1)
    assert found["coverage@1"] == 2 / 4
    assert found["coverage@2"] == 4 / 4
    assert found["gini@1"] == pytest.approx(gini(np.array([3, 1, 0, 0])))
    assert found["gini@2"] == pytest.approx(gini(np.array([3, 2, 1, 1])))
    assert found["novelty@1"] == pytest.approx((0 + 1 + 0 + 0) / 4)
    assert found["novelty@2"] == pytest.approx((0.5 + 1.5 + 0 + 1.0) / 4)
    assert found["popularity@2"] == pytest.approx((0.75 + 0.375 + 1 + 0.5) / 4)
    assert found["diversity@2"] == pytest.approx(0.5)
    niche, blockbuster = found["groups"]["niche"], found["groups"]["blockbuster"]
    assert niche["history_popularity"] == 0.25
    assert niche["lift@2"] == pytest.approx((0.75 - 0.25) / 0.25)
    assert (blockbuster["users"], blockbuster["lift@1"]) == (1, pytest.approx((0.5 - 1) / 1))
    # The first one's list is of the head and the middle, the history of the middle and the tail.
    assert niche["miscalibration@2"] == pytest.approx(0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.005))
    assert blockbuster["miscalibration@1"] == pytest.approx(math.log(1 / 0.01))
    assert found["groups"]["diverse"] == {}
    everybody = found["groups"]["all"]
    assert (everybody["users"], everybody["history_popularity"]) == (2, (0.25 + 1) / 2)
    assert everybody["lift@2"] == pytest.approx(((0.75 + 0.375) / 2 - 0.625) / 0.625)


def test_it_does_not_matter_how_lists_come():
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(4) + 1 for _ in range(50)])[:, :3]
    users = rng.integers(-1, 4, 50)
    apart = rng.random((2, 50))
    whole, parts = Beyond(by_hand(), (1, 3)), Beyond(by_hand(), (1, 3))
    whole.add(ids, users, {"diversity": apart})
    for at in np.array_split(np.arange(50), 7):
        parts.add(ids[at], users[at], {"diversity": apart[:, at]})
    one, other = whole.metrics(), parts.metrics()
    groups, same = one.pop("groups"), other.pop("groups")
    assert one == pytest.approx(other)
    assert all(groups[name] == pytest.approx(same[name]) for name in groups)
