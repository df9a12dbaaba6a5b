"""Checkpoints of small states, written, damaged and read again."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dynrec_jax.parallel.rows import lazy_adam
from dynrec_jax.train import manifest
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.state import TrainState


def state_of(step: int, rows: int = 16) -> TrainState:
    """A state whose every number depends on the step. From some 1,000 rows on, tables get files of their own."""
    rng = np.random.default_rng(step)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"user": {"kernel": random(3, 2), "scale": random(2)}}
    tables = {"item_id": random(rows, 2)}
    opt_state = jax.tree.map(lambda x: x + step, optax.adam(0.1).init({"params": params}))
    row_state = {"item_id": lazy_adam().init(tables["item_id"])._replace(square=random(rows, 2))}
    return TrainState(jnp.int32(step), params, tables, opt_state, row_state)


def equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def abstract(rows: int = 16) -> dict[str, Any]:
    state = state_of(0, rows)
    tree = {"params": state.params, "tables": state.tables}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def write(folder: Path, *values: float | None, keep_last: int = 2, first: int = 1) -> Checkpoints:
    """Checkpoints of steps counted from `first`, with these validation values; still open."""
    checkpoints = Checkpoints(folder, keep_last)
    for step, value in enumerate(values, first):
        assert checkpoints.save(state_of(step), step, {"step": step}, value)
    checkpoints.wait()
    return checkpoints


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def break_seal(checkpoint: Path) -> None:
    """The validation value is another one, as a flipped bit may have it."""
    path = checkpoint / manifest.NAME
    told = json.loads(path.read_text())
    told["body"]["value"] = 0.99
    path.write_text(json.dumps(told))


def resume(folder: Path, **options: Any) -> tuple[int | None, list[str]]:
    """The step that a run goes on from, its state checked, and what was said."""
    said: list[str] = []
    checkpoints = Checkpoints(folder, say=said.append, **options)
    found = checkpoints.resume(state_of(0))
    checkpoints.close()
    if found is None:
        return None, said
    state, progress = found
    equal(state, state_of(progress["step"]))
    return progress["step"], said
