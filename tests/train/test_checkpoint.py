"""Checkpoints: equal when read back, the best and the latest kept, and honest about what is not there."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynrec_jax.errors import DataError
from dynrec_jax.parallel.table import lazy_adam
from dynrec_jax.train.checkpoint import Checkpoints, open_model
from dynrec_jax.train.state import TrainState

from .. import tiny


def state_of(step: int) -> TrainState:
    """A state whose every number depends on the step."""
    rng = np.random.default_rng(step)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"user": {"kernel": random(3, 2), "scale": random(2)}}
    tables = {"item_id": random(16, 2)}
    opt_state = jax.tree.map(lambda x: x + step, optax.adam(0.1).init({"params": params}))
    row_state = {"item_id": lazy_adam().init(tables["item_id"])._replace(square=random(16, 2))}
    return TrainState(jnp.int32(step), params, tables, opt_state, row_state)


def equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def abstract() -> dict[str, Any]:
    state = state_of(0)
    tree = {"params": state.params, "tables": state.tables}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six checkpoints, the second the best; the fourth was not evaluated."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(path, keep_last=2)
    for step, value in enumerate([0.1, 0.4, 0.2, None, 0.3, 0.25], 1):
        assert checkpoints.save(state_of(step), step, {"step": step, "standing": {"best": 0.4}}, value)
    checkpoints.close()
    return path


def test_the_best_and_the_latest_are_kept(folder: Path):
    assert sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) == [2, 5, 6]


def test_a_run_goes_on_from_the_newest_with_everything_as_it_was(folder: Path):
    checkpoints = Checkpoints(folder, keep_last=2)
    assert checkpoints.latest() == 6
    state, progress = checkpoints.restore(state_of(0), 6)
    checkpoints.close()
    equal(state, state_of(6))
    assert progress == {"step": 6, "standing": {"best": 0.4}}


def test_a_step_is_written_once(folder: Path):
    checkpoints = Checkpoints(folder, keep_last=2)
    assert not checkpoints.save(state_of(99), 6, {}, 0.9)
    equal(checkpoints.restore(state_of(0), 6)[0], state_of(6))
    checkpoints.close()


@pytest.mark.parametrize(("asked", "step"), [("best", 2), ("last", 6), (5, 5)])
def test_a_model_is_opened_by_best_last_or_number(folder: Path, asked: str | int, step: int):
    variables, found = open_model(folder, abstract(), asked)
    assert found == step
    equal(variables, {"params": state_of(step).params, "tables": state_of(step).tables})


def test_best_is_the_last_where_nothing_was_measured(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        checkpoints.save(state_of(step), step, {"step": step}, None)
    checkpoints.close()
    assert open_model(tmp_path, abstract(), "best")[1] == 2


def test_a_model_opens_on_another_mesh(folder: Path):
    mesh = tiny.mesh(8, 1, 1)
    spread = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = abstract()
    tree = {
        "params": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree["params"]
        ),
        "tables": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), tree["tables"]
        ),
    }
    variables, _ = open_model(folder, tree, "last")
    assert variables["tables"]["item_id"].sharding == spread
    equal(variables, {"params": state_of(6).params, "tables": state_of(6).tables})


def test_a_step_that_is_not_there_is_named_with_those_that_are(folder: Path):
    with pytest.raises(DataError, match="no checkpoint of step 4; there are 2, 5, 6"):
        open_model(folder, abstract(), 4)


def test_no_folder_and_no_checkpoint_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        open_model(tmp_path / "none", abstract(), "best")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no complete checkpoint"):
        open_model(tmp_path / "empty", abstract(), "best")


def test_a_model_of_another_shape_is_refused(folder: Path):
    tree = abstract()
    table = tree["tables"]["item_id"]
    tree["tables"]["item_id"] = jax.ShapeDtypeStruct((32, 2), table.dtype, sharding=table.sharding)
    with pytest.raises(DataError, match="does not fit the run's config or is damaged") as caught:
        open_model(folder, tree, "last")
    assert "\n" not in str(caught.value)


def test_progress_is_written_as_it_was_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files are written in the background, while the run goes on changing its progress."""
    dumps, changed = json.dumps, threading.Event()

    def late(value: Any, **options: Any) -> str:
        if isinstance(value, dict) and "standing" in value:
            changed.wait(10)
        return dumps(value, **options)

    monkeypatch.setattr(json, "dumps", late)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    standing = {"best": 0.1}
    checkpoints.save(state_of(1), 1, {"step": 1, "standing": standing}, None)
    standing["best"] = 0.9
    changed.set()
    checkpoints.wait()
    assert checkpoints.restore(state_of(0), 1)[1]["standing"] == {"best": 0.1}
    checkpoints.close()


def test_of_equal_values_the_first_is_the_best(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step, value in enumerate([0.2, 0.5, 0.5, 0.5, 0.1], 1):
        checkpoints.save(state_of(step), step, {"step": step}, value)
    checkpoints.close()
    assert open_model(tmp_path, abstract(), "best")[1] == 2


def test_the_best_is_kept_by_a_run_that_goes_on(tmp_path: Path):
    """What a run before a restart measured is read back."""
    for step, value in enumerate([0.2, 0.5, 0.3, 0.4], 1):
        checkpoints = Checkpoints(tmp_path, keep_last=1)
        checkpoints.save(state_of(step), step, {"step": step}, value)
        checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 4]
    assert open_model(tmp_path, abstract(), "best")[1] == 2


def test_what_a_killed_save_left_is_neither_opened_nor_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(state_of(1), 1, {"step": 1}, None)
    checkpoints.close()
    # What is on disk while a checkpoint is written, kept as a kill would have kept it.
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-17"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    assert open_model(tmp_path, abstract(), "last")[1] == 1
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest() == 1
    checkpoints.save(state_of(4), 4, {"step": 4}, None)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]
