"""Runs that nobody trained, their lists by the recommender, and histories as the runner reads them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.neighbours import Neighbours
from dynrec_jax.evaluate.recommender import Lists, Recommender
from dynrec_jax.export.folder import ExportOptions, export
from dynrec_jax.export.runner import Runner
from dynrec_jax.models.features import Items
from dynrec_jax.parallel.table import rows_of
from dynrec_jax.workdir import Run

from .. import described, tiny


def neighbours(items: int) -> Neighbours:
    """Four random ones of each item, but none of every third."""
    rng = np.random.default_rng(3)
    ids = rng.permuted(np.tile(np.arange(1, items + 1, dtype=np.int32), (items, 1)), axis=1)[:, :4]
    weights = -np.sort(-rng.random((items, 4)).astype(np.float32))
    ids[::3], weights[::3] = 0, 0
    return Neighbours(ids, weights, np.full(items, 5, np.int32))


def untrained(dataset: Dataset, **changes: Any) -> Run:
    """A run of random weights on one device; items have attributes where the config's fusion uses them.

    Nothing is compiled for it. An item's row in the table is the same numbers wherever that row lies.
    """
    config = tiny.config(**changes)
    config.data.cache_dir = str(dataset.path.parent / "cache")
    types = tuple(dataset.event_types)
    items = Items(dataset.items, event_types=types, neighbours=neighbours(dataset.items))
    if config.item.fusion != "id":
        items = dataclasses.replace(items, towers=(described.attribute_tower(dataset.items),))
    model, rng = items.model(config), np.random.default_rng(4)

    def weights(path: Any, leaf: Any) -> jax.Array:
        centre = 1.0 if jax.tree_util.keystr(path).endswith("['scale']") else 0.0
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(weights, shapes["params"])
    rows, dim = shapes["tables"]["item_id"].shape
    table_RxD = np.zeros((rows, dim), np.float32)
    table_RxD[rows_of(np.arange(1, dataset.items + 1), rows)] = rng.normal(size=(dataset.items, dim))
    tables, mesh = {"item_id": jnp.asarray(table_RxD)}, tiny.mesh(1, 1, 1)
    return Run(Path("runs/run"), config, dataset, model, params, tables, 7, mesh, items)


def exported(run: Run, out: Path, **options: Any) -> Path:
    """The folder of an export for CPUs."""
    export(run, out, ExportOptions(**{"k": 6, "platforms": ("cpu",), **options}))
    return out


def recommended(run: Run, histories: Histories, k: int = 6, filter_seen: bool = False) -> Lists:
    """Lists for all users of the dataset, as evaluation and scoring make them."""
    made = Recommender(run.model, run.mesh, 16, k, filter_seen, items=run.items)
    users = np.arange(histories.users)
    return made.prepare(run.params, run.tables)(histories, users, histories.lengths)


def lines(histories: Histories) -> list[dict[str, Any]]:
    """All users of a dataset as the runner reads them, with everything that is known of their events."""
    data, found = histories.dataset, []
    items, users = data.item_ids().to_pylist(), np.arange(histories.users)
    whole = histories.windows(users, histories.lengths, int(histories.lengths.max()))
    for number, (name, size) in enumerate(zip(histories.ids_of(users), histories.lengths, strict=True)):
        line: dict[str, Any] = {"user_id": name}
        line["item_ids"] = [items[i - 1] for i in whole.items[number, :size]]
        if data.first_time is not None:
            line["times"] = [int(time) + data.first_time for time in whole.times[number, :size]]
            line["events"] = [([None, *data.event_types])[event] for event in whole.events[number, :size]]
        found.append(line)
    return found


def assert_same(made: Sequence[dict[str, Any]], expected: Lists, items: Sequence[str]) -> None:
    """The runner's lines have the lists of users 0, 1, 2 and so on."""
    assert len(made) == len(expected.ids)
    for line, ids, scores in zip(made, expected.ids, expected.scores, strict=True):
        there = ids > 0
        assert line["item_ids"] == [items[i - 1] for i in ids[there]]
        np.testing.assert_allclose(line["scores"], scores[there], rtol=1e-5, atol=1e-5)


def answers(runner: Runner, users: Sequence[dict[str, Any]], **options: Any) -> list[Any]:
    """What the runner writes, each line through JSON."""
    return [json.loads(json.dumps(line)) for line in runner.run(users, **{"batch_size": 64, **options})]
