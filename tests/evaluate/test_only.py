"""Lists of some items alone are those of all items, without the others."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.neighbours import Neighbours
from dynrec_jax.evaluate.only import EVERYTHING, Offered, Only
from dynrec_jax.evaluate.recommender import Lists, Recommender
from dynrec_jax.models import abra
from dynrec_jax.models.features import Items
from dynrec_jax.parallel import blocks, table, topk

from .. import tiny

ITEMS = 25
KINDS: dict[str, dict[str, Any]] = {
    "counts of neighbours": {"model__neighbours": 2.0},
    "interests": {"model__interests": 2},
    "hops and unit vectors": {"model__hops": 1, "model__normalise": True},
}


def lists(
    histories: Histories,
    users: np.ndarray,
    k: int,
    only: Only = EVERYTHING,
    devices: bool = False,
    **changes: Any,
) -> Lists:
    rng = np.random.default_rng(3)
    near = Neighbours(
        rng.integers(1, ITEMS + 1, (ITEMS, 3)).astype(np.int32),
        rng.uniform(0.1, 1.0, (ITEMS, 3)).astype(np.float32),
        rng.integers(0, 9, ITEMS).astype(np.int32),
    )
    items = Items(ITEMS, neighbours=near)
    model = items.model(tiny.config(**changes))
    variables = nn.meta.unbox(model.init(jax.random.key(0)))
    mesh = tiny.mesh(2, 1, 2) if devices else tiny.mesh(1, 1, 1)
    made = Recommender(model, mesh, 8, k, True, items=items, only=only)
    return made.prepare(variables["params"], variables["tables"])(histories, users, histories.lengths[users])


def kept(whole: Lists, may: np.ndarray, k: int) -> Lists:
    """The first `k` of whole lists, of those that `may` bool[U, N + 1] be there, by hand."""
    ids = np.zeros((len(whole.ids), k), np.int32)
    scores = np.full((len(whole.ids), k), -np.inf, np.float32)
    for row, (own, values) in enumerate(zip(whole.ids, whole.scores, strict=True)):
        there = may[row, own] & (own > 0)
        number = min(int(there.sum()), k)
        ids[row, :number], scores[row, :number] = own[there][:k], values[there][:k]
    return Lists(ids, scores)


def assert_same(found: Lists, expected: Lists) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "devices"),
    [("interests", False), ("counts of neighbours", True), ("hops and unit vectors", True)],
)
def test_lists_of_allowed_items_are_all_lists_without_the_others(
    kind: str, devices: bool, histories: Histories, monkeypatch: pytest.MonkeyPatch
):
    if devices:  # and with the rows of a large table
        for module in (table, blocks, topk):
            monkeypatch.setattr(module, "STRIPED_FROM", 0)
    users = np.array([40, 3, 17, 0, 29])
    allowed = np.random.default_rng(1).random(ITEMS + 1) < 0.5
    allowed[0] = False
    whole = lists(histories, users, ITEMS, devices=devices, **KINDS[kind])
    found = lists(histories, users, 6, Only(allowed), devices, **KINDS[kind])
    assert_same(found, kept(whole, np.tile(allowed, (len(users), 1)), 6))


@pytest.mark.parametrize("kind", ["counts of neighbours", "interests"])
def test_lists_of_what_each_user_is_offered(kind: str, histories: Histories, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(abra, "AMONG", 4)  # several rounds of looking items up
    users = np.array([40, 3, 17, 0, 29])
    rng = np.random.default_rng(2)
    may = rng.random((histories.users, ITEMS + 1)) < rng.random((histories.users, 1))
    may[:, 0], may[3] = False, False
    counts = may.sum(axis=1)
    offered = Offered(np.nonzero(may)[1].astype(np.int32), np.concatenate([[0], np.cumsum(counts)]))
    whole = lists(histories, users, ITEMS, **KINDS[kind])
    found = lists(histories, users, 12, Only(None, offered), **KINDS[kind])
    assert_same(found, kept(whole, may[users], 12))
    assert not found.ids[1].any()
    assert (found.ids[0] > 0).any()


def test_what_users_are_offered_is_filled_up():
    offered = Offered(np.array([5, 7, 2], np.int32), np.array([0, 2, 2, 3]))
    assert offered.to(np.array([2, -1, 0, 1])).tolist() == [[2, 0], [0, 0], [5, 7], [0, 0]]
