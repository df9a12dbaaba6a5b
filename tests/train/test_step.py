"""One step: the same by parts, touched rows alone, the whole gradient clipped, buffers donated."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynrec_jax.models.model import make_bstm
from dynrec_jax.negatives import Negatives, sampling
from dynrec_jax.parallel.rows import RowOptimizer
from dynrec_jax.train import step
from dynrec_jax.train.state import TrainState, init_state
from dynrec_jax.train.step import CompiledStep, Inputs, StepSettings, averaged, parts_for

from .. import tiny

ITEMS = 40
WINDOWS = [[3, 1, 8, 8], [5, 2, 5], [9, 30, 31, 2, 1], [12, 13], [40, 3], [7, 7, 7, 20, 21, 22]]
BATCH = tiny.batch([[(n, window)] for n, window in enumerate(WINDOWS, 1)] + [[], []], 9)
NEGATIVES = np.array([17, 3, 25, 25], np.int32)
CLIP = 0.01

SLOWLY = pytest.param("sampled", marks=pytest.mark.slow)  # full softmax stands for both where time is short


def descend(table: Any, state: Any, ids: Any, gradients: Any, rate: Any) -> Any:
    return table.at[ids].add(-gradients, mode="drop"), state


class Done(NamedTuple):
    before: Any
    after: Any
    metrics: Any
    old_is_deleted: list[bool]


@functools.cache
def one_step(kind: str, accumulation: int, clip: float, pieces: int = 0) -> Done:
    """A step of plain descent at rate 1, so that the change is the gradient; negatives are fixed."""
    c = tiny.config(loss__kind=kind)
    model, mesh, tx = make_bstm(c, ITEMS), tiny.mesh(1, 1, 1), optax.sgd(1.0)
    rows = RowOptimizer(lambda table: jnp.zeros(table.shape[0]), descend)
    state, shardings = init_state(model, tx, rows, mesh, seed=1)
    settings = StepSettings(
        seed=1, accumulation=accumulation, clip_norm=clip, sampling=sampling(c, ITEMS), pieces=pieces
    )
    schedule = optax.constant_schedule(1.0)
    run = CompiledStep(mesh, shardings, model=model, tx=tx, row_tx=rows, schedule=schedule, settings=settings)
    before = jax.tree.map(np.array, {"params": state.params, "tables": state.tables})
    drawn = Negatives(jnp.asarray(NEGATIVES), jnp.full((4,), jnp.log(4 / ITEMS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "draw_negatives", lambda *_: drawn)
        new, metrics = run(state, Inputs(BATCH))
    after = jax.tree.map(np.array, {"params": new.params, "tables": new.tables})
    deleted = [leaf.is_deleted() for leaf in jax.tree.leaves(state)]
    return Done(before, after, jax.tree.map(float, metrics), deleted)


def change(done: Done) -> Any:
    return jax.tree.map(lambda new, old: new.astype(np.float64) - old, done.after, done.before)


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree))))


@pytest.mark.parametrize("kind", ["full", SLOWLY])
def test_a_batch_in_two_parts_is_the_batch_in_one(kind: str):
    one, two = one_step(kind, 1, 0.0), one_step(kind, 2, 0.0)
    assert one.metrics["targets"] == two.metrics["targets"] == sum(len(window) - 1 for window in WINDOWS)
    # Of the positions with a target the first looks at one event, the second at two.
    looks = [place + 1 for window in WINDOWS for place in range(len(window) - 1)]
    assert one.metrics["attended"] == two.metrics["attended"] == sum(looks)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(two.metrics[name], one.metrics[name], rtol=1e-6, err_msg=name)
    leaves = jax.tree_util.tree_leaves_with_path(one.after)
    for (path, x), y in zip(leaves, jax.tree.leaves(two.after), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-6, err_msg=str(path))
    for leaf in jax.tree.leaves(change(one)):
        assert np.abs(leaf).max() > 1e-4, "every leaf must have moved for the comparison to mean something"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_sampled_step_leaves_untouched_rows_bit_identical(accumulation: int):
    done = one_step("sampled", accumulation, 0.0)
    moved = (done.after["tables"]["item_id"] != done.before["tables"]["item_id"]).any(axis=1)
    touched = set(NEGATIVES.tolist()) | {item for window in WINDOWS for item in window}
    assert set(np.nonzero(moved)[0].tolist()) == touched


def test_a_full_softmax_moves_every_item_and_nothing_else():
    done = one_step("full", 1, 0.0)
    moved = (done.after["tables"]["item_id"] != done.before["tables"]["item_id"]).any(axis=1)
    assert np.nonzero(moved)[0].tolist() == list(range(1, ITEMS + 1))


@pytest.mark.parametrize("kind", ["full", SLOWLY])
def test_clipping_bounds_the_whole_gradient_table_rows_included(kind: str):
    free, clipped = one_step(kind, 1, 0.0), one_step(kind, 1, CLIP)
    whole = norm(change(free))
    assert whole > 2 * CLIP
    assert norm(change(free)["tables"]) > 0.1 * whole, "rows must be a share of it that would be missed"
    np.testing.assert_allclose(free.metrics["gradient_norm"], whole, rtol=1e-4)
    np.testing.assert_allclose(clipped.metrics["gradient_norm"], whole, rtol=1e-4)
    np.testing.assert_allclose(norm(change(clipped)), CLIP, rtol=1e-3)


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_the_loss_is_a_mean_over_targets(kind: str):
    """Rows start short, so all scores are near each other: the loss is near the log of how many there are."""
    done = one_step(kind, 1, 0.0)
    per_direction = done.metrics["loss"] / (1.0 + 0.5)
    assert abs(per_direction - np.log(ITEMS)) < 0.7


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_the_old_state_is_donated(kind: str):
    assert all(one_step(kind, 1, 0.0).old_is_deleted)


@pytest.mark.parametrize(
    ("rows", "width", "pieces"),
    [(80, 201, 1), (88, 201, 1), (48, 51, 2), (64, 1001, 8), (24, 2731, 8), (8, 9, 1)],
)
def test_parts_of_a_batch_on_cpu_are_near_their_size_and_alike_on_each_device(
    rows: int, width: int, pieces: int
):
    parts = parts_for(rows, width, pieces)
    assert rows % (parts * pieces) == 0
    each = rows * width / (parts * pieces)
    assert parts == 1 or 2_000 < each < 8_200
    assert each < 8_200 or parts * pieces == rows, "a row is not cut"


def test_a_batch_is_one_part_where_devices_are_no_cpus():
    assert parts_for(80, 201, 0) == 1


@pytest.mark.parametrize("kind", ["full", SLOWLY])
def test_parts_that_the_step_chooses_itself_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "PART_POSITIONS", 1)
    assert parts_for(*BATCH.items.shape, 1) == len(BATCH.items) > 1
    one, chosen = one_step(kind, 1, 0.0), one_step(kind, 0, 0.0, pieces=1)
    np.testing.assert_allclose(chosen.metrics["loss"], one.metrics["loss"], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(one.after), jax.tree.leaves(chosen.after), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-6)


def test_the_average_is_that_of_the_weights_so_far():
    def state(number: int, value: float, average: float) -> TrainState:
        tree = {"w": jnp.float32(value)}
        means = {"params": {"w": jnp.float32(average)}, "tables": {}}
        return TrainState(jnp.int32(number), tree, {}, (), {}, {}, means)

    values, mean = [3.0, 5.0, -1.0, 8.0], 3.0
    for number, value in enumerate(values):
        made = averaged(state(number, 0.0, mean), {"params": {"w": jnp.float32(value)}, "tables": {}}, 0.2)
        # (1 + t) / (10 + t) is 0.1, 0.18, 0.25 and more, so that the decay holds from the third step on.
        beta = [0.1, 2 / 11, 0.2, 0.2][number]
        mean = beta * mean + (1 - beta) * value
        np.testing.assert_allclose(made["params"]["w"], mean, rtol=1e-6)


def test_a_step_keeps_the_average_beside_the_weights():
    c = tiny.config(loss__kind="sampled", train__average=0.9)
    model, mesh, tx = make_bstm(c, ITEMS), tiny.mesh(1, 1, 1), optax.sgd(1.0)
    rows = RowOptimizer(lambda table: jnp.zeros(table.shape[0]), descend)
    state, shardings = init_state(model, tx, rows, mesh, 1, averaged=True)
    settings = StepSettings(1, 1, 0.0, sampling(c, ITEMS), average=0.9)
    fixed = {"model": model, "tx": tx, "row_tx": rows, "schedule": optax.constant_schedule(1.0)}
    before = jax.tree.map(np.array, state.weights)
    new, _ = CompiledStep(mesh, shardings, settings=settings, **fixed)(state, Inputs(BATCH))
    expected = jax.tree.map(lambda old, now: 0.1 * old + 0.9 * np.asarray(now), before, new.weights)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, x), y in zip(leaves, jax.tree.leaves(new.average), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-6, err_msg=str(path))
    assert new.served is new.average
    assert np.abs(np.asarray(new.tables["item_id"]) - new.average["tables"]["item_id"]).max() > 1e-4
