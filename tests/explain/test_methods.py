"""Shares against another route to the score: the model asked about histories that are written out by hand."""

import copy
import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.explain.methods import parted, without
from dynrec_jax.explain.served import Past, Served
from dynrec_jax.models.neighbours import FEW, LESS, Near

from .. import tiny

ITEMS, LENGTH, ITEM = 20, 8, 11
WEIGHT = 0.7
VARIANTS: dict[str, dict[str, Any]] = {
    "prenorm": {"model__neighbours": WEIGHT, "model__positions": "relative"},
    "seed": {
        "model__block": "seed", "model__hops": 1, "model__normalise": True,
        "model__time": ("bias", "rotary"), "model__query_time": True,
    },
    "hstu": {"model__block": "hstu", "model__interests": 3, "model__layers": 2},
    "gru": {"model__block": "gru", "model__events": True, "model__neighbours": WEIGHT},
    "mean": {"model__block": "mean"},
}  # fmt: skip
# The gradient jumps at ReLU's kinks, and where another interest wins: places that are the same for all models miss by
# as much as the jump times their distance, 3e-3 of 256 places here, and all others by rounding.
KINKED = ("seed", "hstu")
FIRST_EVENTS = Past(  # more than the model reads
    np.array([3, 7, 7, 1, 15, 4, 2, 19, 8, 5], np.int32),
    np.array([0, 60, 90, 4000, 4100, 90_000, 90_060, 400_000, 400_001, 500_000], np.int32),
    np.array([1, 2, 1, 0, 2, 1, 1, 2, 2, 1], np.int32),
    600_000,
)


class Asked(NamedTuple):
    """A served model, and the score of `ITEM` after some events of `FIRST_EVENTS`, by another route."""

    name: str
    served: Served
    near: Near
    score: Any


def neighbours() -> Near:
    """Each item has three neighbours; `ITEM` is one of those of 5, 8 and 4."""
    ids = np.stack([[(i + 5) % ITEMS + 1, (i * 7) % ITEMS + 1, 0] for i in range(ITEMS + 1)]).astype(np.int32)
    ids[[5, 8, 4], 2] = ITEM
    ids[ids[:, 0] == ITEM, 0] = 0
    ids[ids[:, 1] == ITEM, 1] = 0
    weights = np.where(ids > 0, np.random.default_rng(2).uniform(0.1, 1.0, ids.shape), 0).astype(np.float32)
    rows = 256
    return Near(
        *(np.pad(x, ((0, rows - len(x)), (0, 0))) for x in (ids, weights, np.ones((21, 1), np.int32)))
    )


def ask(name: str) -> Asked:
    model, params, tables = tiny.bstm(ITEMS, event_types=("view", "buy"), **VARIANTS[name])
    params = tiny.shaken(params)
    near = neighbours()
    rows = tables["item_id"].shape[0]
    near = Near(*(x[:rows] for x in near))
    items = SimpleNamespace(number=ITEMS, near=lambda mesh: near)
    devices = 2 if name == "prenorm" else 1
    mesh = tiny.mesh(devices, 1, 1)
    run: Any = SimpleNamespace(model=model, params=params, tables=tables, mesh=mesh, items=items)
    table = tables["item_id"]

    @jax.jit
    def logits(history: History) -> jax.Array:
        ready = model.ready(table)
        u = model.last_vector(params, table[history.items], history)
        return model.abra.logits(model.abra.query(u, ready), ready)

    def score(places: Any) -> float:
        places = np.array(places, int)
        last = places[-LENGTH:]
        columns = [np.zeros((1, LENGTH), np.int32) for _ in range(3)]
        for column, values in zip(columns, FIRST_EVENTS[:3], strict=True):
            column[0, : len(last)] = values[last]
        sight = model.sight
        history = History(
            columns[0],
            columns[1] if sight.needs_times else None,
            columns[2] if sight.event_types else None,
            np.array([600_000], np.int32) if sight.query_time else None,
        )
        count = 0.0
        for back, place in enumerate(places[:-4:-1]):
            item = FIRST_EVENTS.items[place]
            count += LESS**back * float(near.weights[item][near.ids[item] == ITEM].sum())
        with jax.set_mesh(mesh):
            own = float(
                np.asarray(logits(jax.tree.map(lambda x: np.repeat(x, devices, axis=0), history)))[0, ITEM]
            )
        return own + model.abra.neighbours * float(np.log1p(count / FEW))

    return Asked(name, Served(run), near, score)


# Two of the five compile as long as the others and tell as little more; they come with the slow tests.
SLOW = ("seed", "mean")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS],
)
def asked(request: pytest.FixtureRequest) -> Asked:
    return ask(request.param)


def past(number: int) -> Past:
    """The last events."""
    return Past(*(column[-number:] for column in FIRST_EVENTS[:3]), FIRST_EVENTS.asked)


def test_deletion_is_what_the_score_loses_and_older_events_move_up(asked: Asked):
    found = parted(asked.served, past(9), ITEM, "deletion", 1)
    whole = asked.score(range(1, 10))
    expected = [whole - asked.score([p for p in range(1, 10) if p != left]) for left in range(2, 10)]
    np.testing.assert_allclose(found.share_N, expected, rtol=1e-3, atol=2e-5)
    assert np.abs(expected).max() > 0.01
    assert found.baseline == pytest.approx(asked.score([]), abs=1e-5)


def test_gradients_add_up_to_the_score(asked: Asked):
    found = parted(asked.served, past(8), ITEM, "gradients", 128)
    assert len(found.share_N) == 8
    assert np.abs(found.share_N).max() > 5e-3
    share_N = found.share_N
    if asked.name in KINKED:
        share_N = integral(asked.served, 0.0, 1.0) + asked.served.counts(past(8), ITEM)
        np.testing.assert_allclose(found.share_N, share_N, atol=0.02)
    assert found.baseline + share_N.sum() == pytest.approx(asked.score(range(2, 10)), abs=1e-5)


def integral(served: Served, low: float, high: float, whole_N: np.ndarray | None = None) -> np.ndarray:
    """float64[n], of the slopes of `past(8)`, by halves where these do not add up to the whole: around a kink."""
    place_S, weight_S = np.polynomial.legendre.leggauss(8)

    def part(low: float, high: float) -> np.ndarray:
        slope_SxN, _ = served.slopes(past(8), ITEM, low + (high - low) * (place_S + 1) / 2)
        return (high - low) * weight_S / 2 @ slope_SxN

    whole_N = part(low, high) if whole_N is None else whole_N
    middle = (low + high) / 2
    halves = part(low, middle), part(middle, high)
    if np.abs(sum(halves) - whole_N).max() < 5e-7 or high - low < 1e-6:
        return sum(halves)
    return integral(served, low, middle, halves[0]) + integral(served, middle, high, halves[1])


@pytest.mark.parametrize("asked", ["gru"], indirect=True)
def test_of_a_history_too_long_gradients_part_what_the_model_reads(asked: Asked):
    long = parted(asked.served, FIRST_EVENTS, ITEM, "gradients", 4)
    np.testing.assert_array_equal(long.share_N, parted(asked.served, past(8), ITEM, "gradients", 4).share_N)


def test_exact_is_the_mean_gain_over_all_orders(asked: Asked):
    found = parted(asked.served, past(4), ITEM, "exact", 1)
    scores = {
        subset: asked.score(sorted(subset))
        for size in range(5)
        for subset in map(frozenset, itertools.combinations(range(6, 10), size))
    }
    gains = np.zeros(4)
    for order in itertools.permutations(range(6, 10)):
        for count, place in enumerate(order):
            gains[place - 6] += scores[frozenset(order[: count + 1])] - scores[frozenset(order[:count])]
    np.testing.assert_allclose(found.share_N, gains / 24, rtol=1e-3, atol=2e-5)
    assert found.share_N.sum() + found.baseline == pytest.approx(scores[frozenset(range(6, 10))], abs=1e-5)


@pytest.mark.parametrize("asked", ["prenorm", "hstu"], indirect=True)
def test_an_item_stands_where_all_scores_say(asked: Asked):
    kept = without(past(9), LENGTH, np.array([[0, 3, 7], [1, 2, 4]]))
    at = asked.served.standing(past(9), kept, ITEM, np.array([], np.int32))
    expected = [asked.score([1, 3, 4, 6, 7, 8]), asked.score([1, 2, 5, 7, 8, 9])]
    np.testing.assert_allclose(at.score, expected, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(at.score, asked.served.scores(past(9), kept, ITEM), rtol=1e-4, atol=1e-5)
    every = np.stack(
        [asked.served.scores(past(9), kept, item) for item in range(1, ITEMS + 1)], axis=1
    )  # [K, N]
    np.testing.assert_array_equal(at.rank, 1 + (every > every[:, [ITEM - 1]]).sum(axis=1))
    chance = np.exp(every) / np.exp(every).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(at.log_probability), chance[:, ITEM - 1], rtol=1e-4)
    better = np.flatnonzero(every[0] > every[0, ITEM - 1]) + 1
    alone = asked.served.standing(past(9), kept, ITEM, np.array([*better, ITEM], np.int32))
    assert alone.rank[0] == 1  # what is left out does not count, and the item counts all the same
    assert (at.rank > 1).any()


@pytest.mark.parametrize("asked", ["prenorm"], indirect=True)
def test_what_counts_add_is_parted_as_they_are(asked: Asked):
    """Vectors of zeros leave nothing but the counts: of 5, the newest, of 8 and 19, the two before it."""
    served = copy.copy(asked.served)  # with the programs that are compiled
    zeros = jnp.zeros_like(served._tables.scored)
    served._tables = served._tables._replace(read=zeros, scored=zeros)
    found = parted(served, past(8), ITEM, "gradients", 4)
    count = {5: float(asked.near.weights[5, 2]), 8: LESS * float(asked.near.weights[8, 2])}
    total = sum(count.values())
    rise = WEIGHT * np.log(1 + total / FEW)
    expected = [0, 0, 0, 0, 0, 0, rise * count[8] / total, rise * count[5] / total]
    np.testing.assert_allclose(found.share_N, expected, rtol=1e-5, atol=1e-7)
    assert found.baseline == pytest.approx(0, abs=1e-6)
    at = served.standing(past(8), np.ones((1, 8), bool), ITEM, np.array([], np.int32))
    assert at.counts[0] == pytest.approx(rise, rel=1e-5)
