"""Twenty steps of plain gradient descent on a mesh, the first of which shows the gradient. Also run in processes."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dynrec_jax.batch import Batch
from dynrec_jax.data.neighbours import Neighbours
from dynrec_jax.models import neighbours
from dynrec_jax.models.features import Items, near_of
from dynrec_jax.models.model import Model
from dynrec_jax.models.neighbours import Near
from dynrec_jax.models.towers.ids import ID_TABLE, SEEN
from dynrec_jax.negatives import running_counts, sampling
from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.mesh import feed, make_mesh, place_rows, place_same
from dynrec_jax.parallel.processes import join
from dynrec_jax.parallel.rows import lazy_adam, rowwise_adagrad
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import rows_for
from dynrec_jax.train.state import Given, abstract_state, fresh_state
from dynrec_jax.train.step import CompiledStep, Inputs, StepSettings

from .. import texts, tiny

ITEMS = 300  # rows on all of eight devices
STEPS, LISTED = 20, 10
SCALARS = ("losses", "gradient_norm", "targets", "scores")
TEXT_KEYS: dict[str, Any] = {
    "item__text": ("title",),
    "item__text_mode": "tuned",
    "item__id_dropout": 0.3,
    "loss__alignment": 0.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"model__hops": 1},
    "neighbours": {"loss__neighbours": 0.4, "model__neighbours": 1.0, "model__shrinkage": 3.0},
    "sampled": {"loss__kind": "sampled"},
    "popularity": {"loss__kind": "sampled", "loss__sampler": "popularity"},
    "in_batch": {"loss__kind": "sampled", "loss__sampler": "in_batch"},
    "mixed": {"loss__kind": "sampled", "loss__sampler": "mixed"},
    "gbce": {"loss__kind": "gbce"},
    # Everything at once: several sources of negatives, parts of a batch, clipping, Adam of rows.
    "together": {"loss__kind": "sampled", "loss__sampler": "mixed", "train__clip_norm": 0.5},
    # All that can be told of events, in HSTU's blocks, with several interests.
    "timed": {
        "model__block": "hstu",
        "model__positions": "relative",
        "model__time": ("bias", "rotary", "sinusoidal"),
        "model__query_time": True,
        "model__events": True,
        "model__attention_window": 5,
        "model__interests": 2,
        "loss__event_weights": ("buy:3",),
    },
    # BERT in the loop, with its dropout; some items are never seen, some have no text.
    "text": {"item__fusion": "both", **TEXT_KEYS},
    "text_ensemble": {
        "item__fusion": "ensemble",
        "loss__kind": "sampled",
        "loss__sampler": "mixed",
        "model__normalise": True,
        **TEXT_KEYS,
    },
}


def step(kind: str, mesh: Mesh, process: int = 0) -> dict[str, np.ndarray]:
    """Scalars, every weight before ("before/…") and after the first step ("after/…"), and lists after the last.

    Plain descent at rate 1, because its change is the gradient: Adam's first step is the gradient's sign. Dropout is
    on, and rows are exchanged a few at a time.
    """
    c = tiny.config(model__dropout=0.3, loss__block_items=20, loss__negatives=16, **KINDS[kind])
    rate = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    together = kind == "together"
    items = texts.items(ITEMS) if kind.startswith("text") else Items(ITEMS, event_types=("view", "buy"))
    model, tx = items.model(c), optax.sgd(rate)
    rows = lazy_adam() if together else rowwise_adagrad()
    batch = place_batch(mesh, process)
    _, shardings = abstract_state(model, tx, rows, mesh)
    seen_Rx1 = texts.seen(ITEMS, mesh) if items.text else None
    state = fresh_state(model, tx, rows, mesh, 3, shardings, Given(seen_Rx1))
    known = {SEEN: seen_Rx1} if items.text else {}
    if kind == "neighbours":
        known = dict(zip((neighbours.IDS, neighbours.WEIGHTS), near(mesh)[:2], strict=True))
    inputs = Inputs(batch, None, known, texts.placed(items, mesh, process))
    state = state._replace(caches=items.encoded(state.params, mesh))
    settings = StepSettings(
        seed=5,
        accumulation=2 if together else 1,
        clip_norm=c.train.clip_norm if together else 0.0,
        sampling=sampling(c, ITEMS),
        exchange=Exchange((mesh.size,), (5,), 9) if mesh.size > 1 and mesh.shape["slice"] == 1 else None,
    )
    schedule = optax.constant_schedule(0.1)
    run = CompiledStep(mesh, shardings, model=model, tx=tx, row_tx=rows, schedule=schedule, settings=settings)
    counts = running_counts(np.arange(ITEMS + 1) % 7, rows_for(ITEMS))
    inputs = inputs._replace(running_R=place_same(sharding(mesh, "items"), counts))
    before = _named("before", (state.params, state.tables))
    losses = []
    for number in range(STEPS):
        state, metrics = run(state, inputs)
        losses.append(float(metrics["loss"]))
        if number == 0:
            after = _named("after", (state.params, state.tables))
            scalars = {name: np.asarray(metrics[name]) for name in ("gradient_norm", "targets")}
    ids, scores = lists(model, mesh, state)
    return {**scalars, **before, **after, "losses": np.array(losses), "ids": ids, "scores": scores}


def near(mesh: Mesh) -> Near:
    """Three neighbours of each item but every fifth, which has none."""
    rng = np.random.default_rng(4)
    there = (np.arange(ITEMS) % 5 > 0)[:, None]
    ids = np.where(there, rng.integers(1, ITEMS + 1, (ITEMS, 3)), 0).astype(np.int32)
    weights = np.where(there, rng.uniform(0.1, 1.0, ids.shape), 0.0).astype(np.float32)
    return near_of(Neighbours(ids, weights, rng.integers(0, 9, ITEMS).astype(np.int32)), mesh)


def whole_batch() -> Batch:
    """Seven windows, in rows of which two share one and three are empty."""
    rng = np.random.default_rng(0)
    w = [
        (n, rng.integers(1, ITEMS + 1, length).tolist()) for n, length in enumerate([9, 4, 5, 7, 2, 9, 3], 1)
    ]
    batch = tiny.batch([[w[0]], [w[1], w[2]], [w[3], w[4]], [w[5]], [], [w[6]], [], []], 9)
    times = (2 ** rng.uniform(0, 20, batch.items.shape)).astype(np.int32).cumsum(axis=1)
    return batch._replace(times=times, events=rng.integers(0, 3, batch.items.shape, np.int32))


def place_batch(mesh: Mesh, process: int) -> Batch:
    """The batch on the devices; each process brings its part."""
    own = feed(mesh, process)
    part = slice(own.part * 8 // own.parts, (own.part + 1) * 8 // own.parts)
    return Batch(*(place_rows(mesh, np.asarray(values)[part]) for values in whole_batch()))


def lists(model: Model, mesh: Mesh, state: Any) -> tuple[np.ndarray, np.ndarray]:
    """ABRA's lists for eight fixed queries with the trained table."""
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(8, model.abra.width)).astype(np.float32)
    seen = rng.integers(0, ITEMS + 1, (8, 4)).astype(np.int32)
    last = rng.integers(1, ITEMS + 1, (8, neighbours.LAST)).astype(np.int32)
    weight = model.abra.neighbours

    def best(tables: Any, near: Any, queries: Any, seen: Any, last: Any) -> Any:
        table, raised = tables[ID_TABLE], None
        if weight:
            table = neighbours.shrunk(table, near, model.shrinkage)
            raised = neighbours.raised(near, last, weight)
        return model.abra.best(queries, table, seen, LISTED, raised)

    with jax.set_mesh(mesh):
        placed = (place_same(sharding(mesh), x) for x in (queries, seen, last))
        known = near(mesh) if weight else None
        made = jax.jit(best, out_shardings=sharding(mesh))(state.tables, known, *placed)
    ids, scores = (np.asarray(x.addressable_data(0)) for x in made)
    return ids, scores


def _named(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    whole = (
        multihost_utils.process_allgather(tree, tiled=True)
        if jax.process_count() > 1
        else jax.tree.map(jnp.copy, tree)
    )
    return {
        prefix + jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
    }


def main(kind: str, sizes: list[int], out: str) -> None:
    """Writes what `step` gives, by process 0."""
    processes = join()
    processes.start_jax()
    found = step(kind, make_mesh(*sizes), processes.index)
    if processes.first:
        np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2].split("x")], sys.argv[3])
