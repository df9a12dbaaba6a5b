"""Several models' lists as one: the mean of their scores, computed by hand and item by item."""

import numpy as np

from dynrec_jax.evaluate.joined import joined, mean_of, offered
from dynrec_jax.evaluate.recommender import Lists

NO = -np.inf


def lists(ids: list[list[int]], scores: list[list[float]]) -> Lists:
    return Lists(np.array(ids, np.int32), np.array(scores, np.float32))


def test_an_items_score_is_the_mean_and_a_list_without_it_gives_its_last_ones():
    one = lists([[5, 2, 9]], [[4.0, 3.0, 1.0]])
    two = lists([[2, 7, 5]], [[2.0, 1.0, -1.0]])
    found = mean_of([one, two], 4)
    # 2: (3 + 2) / 2; 5: (4 - 1) / 2; 7: (1 + 1) / 2; 9: (1 - 1) / 2
    assert found.ids.tolist() == [[2, 5, 7, 9]]
    assert found.scores.tolist() == [[2.5, 1.5, 1.0, 0.0]]
    assert (found.ids.dtype, found.scores.dtype) == (np.int32, np.float32)


def test_equal_means_rank_by_the_lowest_item_and_ends_of_lists_name_none():
    one = lists([[8, 3, 0], [0, 0, 0], [1, 0, 0]], [[1.0, 0.0, NO], [NO] * 3, [-2.0, NO, NO]])
    two = lists([[3, 8, 0], [0, 0, 0], [4, 0, 0]], [[1.0, 0.0, NO], [NO] * 3, [6.0, NO, NO]])
    found = mean_of([one, two], 3)
    assert found.ids.tolist() == [[3, 8, 0], [0, 0, 0], [1, 4, 0]]
    assert found.scores.tolist() == [[0.5, 0.5, NO], [NO] * 3, [2.0, 2.0, NO]]


def test_means_that_are_equal_as_they_are_stored_rank_by_the_lowest_item_too():
    more = float(np.nextafter(np.float32(1), np.float32(2)))
    found = mean_of([lists([[9, 5]], [[more, 1.0]]), lists([[5, 9]], [[1.0, 1.0]])], 2)
    assert found.scores[0, 0] == found.scores[0, 1]
    assert found.ids.tolist() == [[5, 9]]


def test_many_users_are_as_item_by_item():
    rng = np.random.default_rng(0)
    users, items, length, k = 50, 40, 15, 10
    made = [np.argsort(rng.random((users, items)), axis=1)[:, :length] + 1 for _ in range(3)]
    # Eighths, whose sums are exact: many are equal.
    scores = [-np.sort(-np.round(8 * rng.normal(size=ids.shape)) / 8, axis=1) for ids in made]
    several = [lists(ids.tolist(), own.tolist()) for ids, own in zip(made, scores, strict=True)]
    found = joined([lambda *_, each=each: each for each in several], k)(None, made[0], made[0])
    for user in range(users):
        scored = []
        for item in {item for ids in made for item in ids[user].tolist()}:
            own = [
                dict(zip(each.ids[user].tolist(), each.scores[user].tolist(), strict=True)).get(
                    item, float(each.scores[user, -1])
                )
                for each in several
            ]
            scored.append((-sum(own), item))
        assert found.ids[user].tolist() == [item for _, item in sorted(scored)[:k]]


def test_nobody_has_no_list_and_models_offer_enough():
    nobody = Lists(np.zeros((0, 20), np.int32), np.zeros((0, 20), np.float32))
    assert mean_of([nobody, nobody], 10).ids.shape == (0, 10)
    assert [offered(10, 5_000), offered(100, 5_000), offered(150, 5_000), offered(100, 32)] == [
        200,
        200,
        300,
        32,
    ]
