"""Two models side by side: the loss is the sum of both losses, and what is served is the sum of both scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.models.bstm import Bstm, Rows
from dynrec_jax.models.ensemble import Ensemble
from dynrec_jax.models.features import described_rows
from dynrec_jax.models.text_encoder import TEXT
from dynrec_jax.models.user_encoder import Moments, moments
from dynrec_jax.parallel.table import rows_for
from dynrec_jax.train.optimizer import make_optimizer, make_row_optimizer
from dynrec_jax.train.state import abstract_state

from .. import described, tiny

ITEMS = 30
ROWS = rows_for(ITEMS)
UNSEEN = [7, 12]  # by training: their rows are zeros
ITEM = described.items(ITEMS)
WINDOW = [4, 11, 30, 2, 2, 12]
KEY = jax.random.key(0)


@functools.cache
def made(fusion: str, **changes: Any) -> tuple[Any, Any, Any]:
    """A model, its random state, and what describes every row of the catalogue."""
    c = tiny.config(
        item__fusion=fusion,
        item__id_dropout=0.0,
        item__text=("t",),
        item__text_mode="tuned",
        item__attributes=("a",),
        model__backward_weight=0.0,
        **changes,
    )
    model, mesh = ITEM.model(c), tiny.mesh(1, 1, 1)
    template, _ = abstract_state(model, make_optimizer(c), make_row_optimizer(c), mesh)
    state = described.state(template, UNSEEN)
    text = np.random.default_rng(3).normal(size=(ROWS, described.BERT.hidden_size)).astype(np.float32)
    text[[0, *(1 + np.flatnonzero(ITEM.text.lengths == 0)), *range(ITEMS + 1, ROWS)]] = 0
    known = {**ITEM.place(mesh), TEXT: jnp.asarray(text)}
    return model, state, described_rows(known, state.tables, ROWS)


def rows_of(catalogue: Any, items: Any) -> Any:
    return {name: x[items] for name, x in catalogue.items()}


def loss(model: Any, params: Any, catalogue: Any, window: list[int]) -> tuple[Any, Any]:
    batch = tiny.batch([[(1, window)]], 9)
    rows = Rows(items=rows_of(catalogue, batch.items), catalogue=catalogue)
    return model.loss(params, rows, batch, None, KEY)


def serve(model: Any, params: Any, catalogue: Any, window: list[int]) -> tuple[Any, Any]:
    """Lists of the whole catalogue after each prefix but the whole window."""
    prefixes = np.tril(np.tile(window, (len(window), 1)))[:-1].astype(np.int32)
    prefixes = np.pad(prefixes, ((0, 0), (0, 8 - prefixes.shape[1])))
    vectors = model.catalogue(params, catalogue)
    none = jnp.zeros((len(prefixes), 1), jnp.int32)
    answer = model.recommend(
        params, vectors[prefixes], History(jnp.asarray(prefixes)), model.ready(vectors), none, ITEMS
    )
    return answer.ids, answer.scores


def by_item(ids: Any, scores: Any) -> np.ndarray:
    """float64[lists, N + 1], scores by item."""
    found = np.full((len(ids), ITEMS + 1), np.nan)
    np.put_along_axis(found, np.asarray(ids), np.asarray(scores, np.float64), axis=1)
    assert np.isnan(found[:, 0]).all()
    assert not np.isnan(found[:, 1:]).any()
    return found[:, 1:]


@functools.cache
def served(fusion: str, **changes: Any) -> tuple[float, int, np.ndarray]:
    """Loss, targets and served scores, by one program."""
    model, state, catalogue = made(fusion, **changes)
    (total, targets), lists = jax.jit(
        lambda params: (loss(model, params, catalogue, WINDOW), serve(model, params, catalogue, WINDOW))
    )(state.params)
    return float(total), int(targets), by_item(*lists)


def cross_entropy(scores: np.ndarray) -> float:
    """Of the window's next items, in float64."""
    return sum(np.log(np.exp(row).sum()) - row[WINDOW[t + 1] - 1] for t, row in enumerate(scores))


NORMAL = {"model__normalise": True, "model__temperature": 0.3}


@pytest.mark.parametrize(
    ("fusion", "changes"),
    [
        ("both", {}),
        pytest.param("text", {}, marks=pytest.mark.slow),
        pytest.param("both", NORMAL, marks=pytest.mark.slow),
    ],
)
def test_the_softmax_of_the_served_scores_gives_the_training_loss(fusion: str, changes: dict[str, Any]):
    """Items without an id's row, and such of which nothing is known, are in the catalogue and in the window."""
    total, targets, scores = served(fusion, **changes)
    assert targets == len(WINDOW) - 1
    np.testing.assert_allclose(total, cross_entropy(scores), rtol=5e-6)


@pytest.mark.parametrize("changes", [NORMAL, pytest.param({}, marks=pytest.mark.slow)])
def test_an_ensemble_is_trained_and_served_as_its_parts_are(changes: dict[str, Any]):
    model, state, catalogue = made("ensemble", **changes)
    total, targets, scores = served("ensemble", **changes)
    assert targets == len(WINDOW) - 1

    def alone(part: Bstm, weights: Any, number: int) -> Any:
        rows = Rows(rows_of(catalogue, BATCH.items), catalogue)
        total, _ = part.loss(weights, rows, BATCH, None, jax.random.fold_in(KEY, number))
        return total, serve(part, weights, catalogue, WINDOW)

    @jax.jit
    def apart(params: Any) -> Any:
        return alone(model.id, params["id"], 0), alone(model.content, params["text"], 1)

    (one, of_one), (other, of_other) = apart(state.params)
    of_one, of_other = by_item(*of_one), by_item(*of_other)
    np.testing.assert_allclose(total, float(one) + float(other), rtol=1e-6)
    np.testing.assert_allclose(scores, of_one + of_other, rtol=1e-5, atol=1e-5)
    for part, value in ((of_one, one), (of_other, other)):
        assert part.std() > 0.05, "both must have a say"
        np.testing.assert_allclose(float(value), cross_entropy(part), rtol=5e-6)
    if not changes:
        return
    # Each half is of unit length by itself, but for vectors of zeros.
    vectors = np.asarray(model.ready(model.catalogue(state.params, catalogue)))[1 : ITEMS + 1]
    for half in np.split(vectors, 2, axis=-1):
        np.testing.assert_allclose(np.linalg.norm(half, axis=-1), 1, rtol=1e-4)
    assert np.abs(of_one).max() <= 1 / (0.3 * 4) + 1e-6  # 1 / (temperature · sqrt(8 + 8))


BATCH = tiny.batch([[(1, WINDOW)]], 9)


@pytest.mark.parametrize(
    "fusion",
    ["ensemble", pytest.param("both", marks=pytest.mark.slow), pytest.param("text", marks=pytest.mark.slow)],
)
def test_what_comes_later_has_no_influence(fusion: str):
    """What describes the items after a moment may be anything at all: bit for bit the same vectors up to it."""
    model, state, catalogue = made(fusion)
    row = tiny.batch([[(1, [3, 7, 1, 9]), (2, [4, 4, 12])]], 8)

    @jax.jit
    def queries(params: Any, known: Any) -> Any:
        """Of the row's places, from what describes their items."""
        if isinstance(model, Ensemble):
            v = model.catalogue(params, known)
            return model.user_vectors(params, v, Moments(row.segments, row.positions))
        return model.user_vectors(
            params, model.item_vectors(params, known), Moments(row.segments, row.positions)
        )

    known = {name: np.asarray(x) for name, x in rows_of(catalogue, row.items).items()}
    before = np.asarray(queries(state.params, known))
    rng = np.random.default_rng(4)
    for t in range(7):
        other = (np.arange(8) > t) if t >= 4 else (np.arange(8) > t) | (np.arange(8) >= 4)
        if t >= 4:
            other |= np.arange(8) < 4  # the row's other history
        changed = {
            name: np.where(other[None, :, None], rng.integers(0, 6, x.shape).astype(x.dtype), x)
            for name, x in known.items()
        }
        after = np.asarray(queries(state.params, changed))
        assert np.array_equal(after[0, t], before[0, t]), t
        assert not np.array_equal(after[0, :7], before[0, :7]), "the change must be felt somewhere"


def test_an_empty_history_gives_zeros():
    """A user's vector is that of both parts, one after the other."""
    model, state, catalogue = made("ensemble")
    histories = np.array([[0] * 8, [3, 5] + [0] * 6], np.int32)

    @jax.jit
    def run(params: Any) -> Any:
        v = model.catalogue(params, catalogue)[histories]
        alone = [
            part.user_vectors(params[name], half, moments(History(jnp.asarray(histories))))
            for (name, part), half in zip(model.parts.items(), jnp.split(v, 2, axis=-1), strict=True)
        ]
        return model.last_vector(params, v, History(jnp.asarray(histories))), alone

    u, alone = run(state.params)
    assert u.shape == (2, 16)
    assert not u[0].any()
    np.testing.assert_allclose(u[1], np.concatenate([x[1, 1] for x in alone]), rtol=1e-4, atol=1e-6)
