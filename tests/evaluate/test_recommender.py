"""Lists for many users: those of the model, however users are cut into batches."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dynrec_jax.batch import History
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.neighbours import Neighbours
from dynrec_jax.evaluate.recommender import (
    Lists,
    NonFiniteScores,
    Recommender,
    fixed_lists,
    groups,
    seen_width,
    widths,
)
from dynrec_jax.models.features import Items
from dynrec_jax.parallel.table import rows_for

from .. import described, tiny

ITEMS, K = 25, 10


def recommender(batch_size: int, filter_seen: bool = True) -> tuple[Recommender, Any, Any]:
    model, params, tables = tiny.bstm(ITEMS)
    return Recommender(model, tiny.mesh(1, 1, 1), batch_size, K, filter_seen), params, tables


def lists(histories: Histories, users: np.ndarray, batch_size: int, filter_seen: bool = True) -> Lists:
    made, params, tables = recommender(batch_size, filter_seen)
    return made.prepare(params, tables)(histories, users, histories.lengths[users])


@pytest.mark.parametrize("filter_seen", [True, False])
def test_lists_are_the_models_by_a_stable_sort(histories: Histories, filter_seen: bool):
    users = np.array([40, 3, 17, 0, 29])
    found = lists(histories, users, 8, filter_seen)
    model, params, tables = tiny.bstm(ITEMS)
    items = histories.windows(users, histories.lengths[users], 8).items
    whole = histories.windows(users, histories.lengths[users], 64).items
    u = np.asarray(
        jax.jit(lambda: model.last_vector(params, tables["item_id"][items], History(jnp.asarray(items))))()
    )
    scores = u @ np.asarray(tables["item_id"])[1 : ITEMS + 1].T / (0.5 * np.sqrt(8 + 8))
    for at in range(len(users)):
        if filter_seen:
            scores[at, whole[at][whole[at] > 0] - 1] = -np.inf
        order = np.argsort(-scores[at], kind="stable")[:K]
        left = np.isfinite(scores[at, order])
        assert found.ids[at].tolist() == np.where(left, order + 1, 0).tolist()
        np.testing.assert_allclose(found.scores[at], scores[at, order], rtol=1e-5, atol=1e-5)


def test_batches_of_one_less_as_many_and_one_more_give_equal_lists(histories: Histories):
    users = np.arange(10, 25)  # histories of 8 to 18 events
    results = [lists(histories, users, size) for size in (14, 15, 16)]
    for other in results[1:]:
        np.testing.assert_array_equal(other.ids, results[0].ids)
        np.testing.assert_allclose(other.scores, results[0].scores, rtol=1e-6)


def test_lists_come_in_the_order_of_the_users(histories: Histories):
    users = np.random.default_rng(0).permutation(np.arange(10, 25))
    run, params, tables = recommender(8)
    make = run.prepare(params, tables)
    mixed = make(histories, users, histories.lengths[users])
    ordered = make(histories, np.sort(users), histories.lengths[np.sort(users)])
    np.testing.assert_array_equal(mixed.ids, ordered.ids[np.argsort(np.argsort(users))])


@pytest.mark.parametrize("where", ["table", "encoder"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_end_in_an_error(histories: Histories, where: str, value: float):
    """Infinite scores could be ranked, and one of -inf would pass for an item that was left out."""
    run, params, tables = recommender(8)
    users = np.argsort(histories.lengths, kind="stable")[:6]
    ends = histories.lengths[users]
    if where == "table":
        # Of an item that none of them took: their own vectors stay finite.
        strange = np.setdiff1d(np.arange(1, ITEMS + 1), histories.windows(users, ends, 64).items)[0]
        tables = {"item_id": tables["item_id"].at[strange, 0].set(value)}
    else:
        norm = {**params["user"]["norm"], "scale": params["user"]["norm"]["scale"].at[0].set(value)}
        params = {**params, "user": {**params["user"], "norm": norm}}
    with pytest.raises(NonFiniteScores):
        run.prepare(params, tables)(histories, users, ends)


@pytest.mark.parametrize("most", [1, 15, 1000])
def test_groups_are_whole_shards_or_parts_of_one(histories: Histories, most: int):
    made = groups(histories, most)
    edges = [0, *np.cumsum(histories.shard_users).tolist()]
    assert made[0].start == 0
    assert made[-1].stop == histories.users
    for one, other in itertools.pairwise(made):
        assert one.stop == other.start
        assert one.stop in edges or any(
            low <= one.start and one.stop < high for low, high in itertools.pairwise(edges)
        )
    assert all(1 <= len(group) <= most for group in made)


def test_one_score_for_all_users_is_sorted_without_what_each_has_seen(histories: Histories):
    run, _, _ = recommender(16)
    scores = np.zeros(rows_for(ITEMS), np.float32)
    scores[1 : ITEMS + 1] = np.random.default_rng(0).integers(0, 4, ITEMS)
    users = np.arange(20, 30)
    found = fixed_lists(run, scores, ITEMS, 16)(histories, users, histories.lengths[users])
    order = np.argsort(-scores[1 : ITEMS + 1], kind="stable") + 1
    for at, user in enumerate(users):
        seen = set(histories.windows(np.array([user]), histories.lengths[[user]], 64).items[0].tolist())
        wanted = [item for item in order.tolist() if item not in seen][:K]
        assert found.ids[at].tolist() == wanted + [0] * (K - len(wanted))


@pytest.mark.parametrize("normalise", [False, True])
def test_a_second_table_is_held_only_where_vectors_are_not_the_rows(normalise: bool):
    model, params, tables = tiny.bstm(ITEMS, model__normalise=normalise)
    np.testing.assert_equal(
        np.array_equal(jax.jit(model.ready)(tables["item_id"]), tables["item_id"]), not model.normalises
    )
    made = Recommender(model, tiny.mesh(1, 1, 1), 8, K, True)

    def held() -> int:
        return sum(x.shape == tables["item_id"].shape for x in jax.live_arrays())

    before = held()
    run = made.prepare(params, tables)
    assert held() - before == int(normalise)
    del run


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_batch_that_is_not_finite_ends_all_wherever_it_stands(histories: Histories, bad: int):
    """Batches are read one behind; the last one too."""
    run, _, _ = recommender(4)
    calls = itertools.count()

    def batch(items: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros((4, K), jnp.int32), jnp.zeros((4, K)), jnp.bool_(next(calls) != bad)

    users = np.arange(10, 22)
    with pytest.raises(NonFiniteScores):
        run.run(batch, histories, users, histories.lengths[users])


def test_widths_of_histories_and_of_seen_items_do_not_multiply(histories: Histories):
    run, params, tables = recommender(2)
    ends = np.array([1, 3, 17, 18])  # an encoder of 8, and seen items of 16 and 64
    users = np.argsort(histories.lengths)[-4:]
    assert (histories.lengths[users] >= ends).all()
    run.prepare(params, tables)(histories, users, ends)
    assert run._encode._cache_size() == 1
    assert run._rank._cache_size() == 2


@pytest.mark.parametrize("longest", [1, 7, 8, 9, 50, 200, 2048])
def test_widths_hold_every_history_and_are_less_than_twice_as_long(longest: int):
    made = widths(longest)
    assert made == sorted(set(made))
    assert made[-1] == longest
    assert len(made) <= 4 + np.log2(longest)
    for length in range(1, longest + 1):
        width = next(width for width in made if width >= length)
        assert width <= max(2 * length + 7, 16)


def test_seen_items_have_few_widths_and_long_ones_are_padded_less():
    made = {length: seen_width(length) for length in range(1, 100_001)}
    assert all(length <= width <= max(4 * length, 16) for length, width in made.items())
    assert all(width < 2 * length for length, width in made.items() if length > 4_096)
    assert len(set(made.values())) == 10  # 16 to 4,096 by fours, then 8,192 to 131,072


SHRINKAGE: dict[str, dict[str, Any]] = {
    "ids": {},
    "unit vectors": {"model__normalise": True},
    "towers": {"item__fusion": "both", "item__attributes": ("a",)},
    "ensemble": {"item__fusion": "ensemble", "item__attributes": ("a",)},
    "counts in scores too": {"model__neighbours": 1.0},
}


@pytest.mark.parametrize("kind", SHRINKAGE)
def test_vectors_of_rare_items_are_drawn_to_their_neighbours(kind: str):
    """Those that are read, by hand from those without it; and those that are scored are these, made ready."""
    changes, known = SHRINKAGE[kind], ITEMS - 4  # the last four came later
    rng, mesh = np.random.default_rng(3), tiny.mesh(2, 1, 2)
    found = Neighbours(
        rng.integers(1, known + 1, (known, 3)).astype(np.int32),
        rng.uniform(0.1, 1.0, (known, 3)).astype(np.float32),
        rng.integers(0, 9, known).astype(np.int32),
    )
    later = Neighbours(*(np.pad(x, ((0, 4), *((0, 0),) * (x.ndim - 1))) for x in found))
    items = Items(ITEMS, neighbours=later)
    if "item__fusion" in changes:
        items = dataclasses.replace(items, towers=(described.attribute_tower(ITEMS),))
    vectors = {}
    for shrinkage in (0.0, 3.0):
        c = tiny.config(**changes, model__shrinkage=shrinkage)
        model = items.model(c)
        variables = nn.meta.unbox(model.init(jax.random.key(0)))
        made = Recommender(model, mesh, 8, K, True, items=items)
        vectors[shrinkage] = [np.asarray(x) for x in made.vectors(variables["params"], variables["tables"])]
        assert (made.near is None) == ("model__neighbours" not in changes)
    expected = vectors[0.0][0].copy()
    for item in range(1, known + 1):
        ids, weights, events = (x[item - 1] for x in found)
        mean = weights @ vectors[0.0][0][ids] / weights.sum()
        expected[item] = (events * vectors[0.0][0][item] + 3 * mean) / (events + 3)
    np.testing.assert_allclose(vectors[3.0][0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vectors[3.0][1], model.ready(jnp.asarray(expected)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(vectors[3.0][0][known + 1 :], vectors[0.0][0][known + 1 :])
    assert np.abs(vectors[3.0][0] - vectors[0.0][0])[1 : known + 1].max() > 0.1
