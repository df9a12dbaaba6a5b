"""BERT in the loop: encoding distinct items is encoding every position, old vectors for the rest, runs that resume."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynrec_jax.batch import Batch
from dynrec_jax.models.bstm import Rows
from dynrec_jax.models.text_encoder import BERT, TEXT
from dynrec_jax.models.towers.ids import ID_TABLE, INDEX
from dynrec_jax.negatives import Negatives, sampling
from dynrec_jax.parallel.rows import RowOptimizer
from dynrec_jax.parallel.table import rows_for
from dynrec_jax.train import step
from dynrec_jax.train.state import abstract_state, fresh_state
from dynrec_jax.train.step import CompiledStep, Inputs, StepSettings
from dynrec_jax.train.texts import TextBatches

from .. import texts, tiny

ITEMS = 40
WINDOWS = [[3, 1, 8, 8], [5, 2, 5], [9, 30, 31, 2, 1], [12, 13], [40, 3], [7, 7, 7, 20, 21, 22]]
BATCH = tiny.batch([[(n, window)] for n, window in enumerate(WINDOWS, 1)] + [[], []], 9)
DISTINCT = np.unique([item for window in WINDOWS for item in window])
NEGATIVES = np.array([17, 3, 25, 25], np.int32)  # 3 is in the batch, and its new vector counts
KEYS: dict[str, Any] = {
    "item__fusion": "both",
    "item__text": ("title",),
    "item__text_mode": "tuned",
    "item__id_dropout": 0.0,
    "loss__alignment": 0.5,
}


def config(**changes: Any) -> Any:
    return tiny.config(**{**KEYS, **changes})


def descend(table: Any, state: Any, ids: Any, gradients: Any, rate: Any) -> Any:
    return table.at[ids].add(-gradients, mode="drop"), state


@functools.cache
def one_step(kind: str, accumulation: int, sizes: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """State before, caches, state after a step of plain descent at rate 1 (its change is the gradient), and metrics."""
    c = config(loss__kind=kind)
    items, mesh, tx = texts.items(ITEMS, dropout=0.0), tiny.mesh(1, 1, 1), optax.sgd(1.0)
    model = items.model(c)
    rows = RowOptimizer(lambda table: jnp.zeros(table.shape[0]), descend)
    _, shardings = abstract_state(model, tx, rows, mesh)
    state = fresh_state(model, tx, rows, mesh, 1, shardings)
    # Vectors of some steps before: none of them is what BERT now makes.
    old = np.random.default_rng(3).normal(size=state.caches[TEXT].shape).astype(np.float32)
    old[0] = old[1:][np.append(items.text.lengths == 0, np.ones(len(old) - 1 - ITEMS, bool))] = 0
    state = state._replace(caches={TEXT: jnp.asarray(old)})
    settings = StepSettings(1, accumulation, 0.0, sampling(c, ITEMS))
    fixed = {"model": model, "tx": tx, "row_tx": rows, "schedule": optax.constant_schedule(1.0)}
    run = CompiledStep(mesh, shardings, settings=settings, **fixed)
    before = jax.tree.map(np.array, {"params": state.params, "tables": state.tables})
    text = texts.cut(items.text, DISTINCT, (4, 8), sizes)
    drawn = Negatives(jnp.asarray(NEGATIVES), jnp.full((4,), jnp.log(4 / ITEMS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "draw_negatives", lambda *_: drawn)
        new, metrics = run(state, Inputs(BATCH, text=text))
    after = jax.tree.map(np.array, {"params": new.params, "tables": new.tables})
    return before, old, after, jax.tree.map(float, metrics)


def by_position(kind: str, before: Any, old: np.ndarray) -> Any:
    """The gradient where every place where the batch has an item encodes that item's text by itself."""
    items = texts.items(ITEMS, dropout=0.0)
    model, source = items.model(config(loss__kind=kind)), items.text
    ids_BxM = np.asarray(BATCH.items)
    lengths = np.concatenate([[0], source.lengths])
    tokens = np.concatenate([np.zeros_like(source.ids[:1]), source.ids])

    def read(weights: Any, ids: np.ndarray) -> jax.Array:
        mask = np.arange(tokens.shape[1]) < lengths[ids.reshape(-1)][:, None]
        hidden = source.encoder.bert.apply({"params": weights}, tokens[ids.reshape(-1)], mask)
        total = (hidden * mask[..., None]).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)[:, None]
        return total.reshape(*ids.shape, -1)

    def described(tree: Any, ids: np.ndarray, fresh: np.ndarray) -> dict[str, jax.Array]:
        known = fresh & (lengths[ids] > 0)
        text = jnp.where(known[..., None], read(tree["params"][BERT], ids), old[ids])
        return {TEXT: text, INDEX: ids[..., None], ID_TABLE: tree["tables"][ID_TABLE][ids]}

    def loss(tree: Any) -> jax.Array:
        everywhere = described(tree, ids_BxM, np.ones(ids_BxM.shape, bool))
        if kind == "full":
            rows_R = np.where(np.arange(rows_for(ITEMS)) <= ITEMS, np.arange(rows_for(ITEMS)), 0)
            whole = described(tree, rows_R, np.isin(rows_R, DISTINCT))
            total, count = model.loss(
                tree["params"], Rows(everywhere, catalogue=whole), BATCH, None, jax.random.key(0)
            )
        else:
            drawn = Negatives(jnp.asarray(NEGATIVES), jnp.full((4,), jnp.log(4 / ITEMS)))
            negatives = described(tree, NEGATIVES, np.isin(NEGATIVES, DISTINCT))
            rows = Rows(everywhere, negatives=negatives)
            total, count = model.loss(tree["params"], rows, BATCH, drawn, jax.random.key(0))
        return total / count

    return jax.jit(jax.grad(loss))(before)


@pytest.mark.parametrize(
    ("kind", "accumulation", "sizes"),
    [
        ("full", 1, (8, 16)),
        pytest.param("sampled", 2, (16, 16), marks=pytest.mark.slow),
        pytest.param("full", 2, (24, 32), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_encoding_every_position(kind: str, accumulation: int, sizes: tuple[int, ...]):
    before, old, after, _ = one_step(kind, accumulation, sizes)
    expected = by_position(kind, before, old)
    found = jax.tree.map(lambda new, was: was.astype(np.float64) - new, after, before)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_allclose(got, np.asarray(want), rtol=1e-5, atol=1e-5, err_msg=str(path))
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected["params"][BERT]))
    assert size > 1e-3, "BERT is moved"


def test_the_log_tells_how_far_vectors_have_moved():
    *_, metrics = one_step("full", 1, (8, 16))
    assert 0.5 < metrics["text_moved"] < 1.5, "random vectors have nothing to do with the new ones"


class Source:
    """Batches that are given."""

    def __init__(self, *batches: Batch):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        return self._batches[step]

    def sizes(self, step: int) -> list[int]:
        return [self._batches[step].items.shape[0]]

    def grown(self, batch: Batch, sizes: Any) -> Batch:
        return batch


def test_a_step_reads_each_distinct_item_with_text_once():
    source, rng = texts.source(ITEMS), np.random.default_rng(0)
    every = tiny.batch([[(1, list(range(1, 10)))] for _ in range(1)], 9)
    more = [
        tiny.batch([[(1, rng.integers(1, ITEMS + 1, 9).tolist())] for _ in range(4)], 9) for _ in range(20)
    ]
    made = TextBatches(Source(every, *more, BATCH), source, pieces=8)
    grew = False
    for number in range(len(made)):
        batch, text = made[number]
        wanted = {int(i) for i in np.unique(batch.items) if i and source.lengths[i - 1]}
        found = [int(i) for tokens in text for i in tokens.items if i]
        assert sorted(found) == sorted(wanted)
        for tokens in text:
            real = tokens.items > 0
            assert len(tokens.items) % 8 == 0
            assert (tokens.lengths[real] == source.lengths[tokens.items[real] - 1]).all()
            assert (tokens.lengths <= tokens.ids.shape[1]).all()
            assert not tokens.ids[~real].any()
            width = tokens.ids.shape[1]
            assert np.array_equal(tokens.ids[real], source.ids[tokens.items[real] - 1, :width])
        sizes = [len(tokens.items) for tokens in text]
        assert made.sizes(number)[1:] == sizes
        grew |= sizes != made.planned
        larger = made.grown(made[number], [batch.items.shape[0], *(size + 8 for size in sizes)])
        assert [len(tokens.items) for tokens in larger.text] == [size + 8 for size in sizes]
    made.plan([8] * len(made.planned))
    assert any([len(t.items) for t in made[n].text] != made.planned for n in range(len(made))) or grew
