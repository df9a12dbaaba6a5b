"""Checkpoints: equal when read back, the best and the latest kept, and honest about what is not there."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynrec_jax.errors import DataError, HeldRunError
from dynrec_jax.train import arrays, manifest, saving
from dynrec_jax.train.checkpoint import Checkpoints, open_model
from dynrec_jax.train.state import TrainState

from .. import tiny
from .checkpoints import abstract, equal, state_of, steps, write


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


def test_the_average_is_the_model_and_a_run_goes_on_with_both(tmp_path: Path):
    def averaged(step: int) -> TrainState:
        return state_of(step)._replace(average=state_of(step + 100).weights)

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    assert checkpoints.save(averaged(7), 7, {"step": 7}, 0.1)
    state, _ = checkpoints.restore(averaged(0), 7)
    checkpoints.close()
    equal(state, averaged(7))
    equal(open_model(tmp_path / "checkpoints", abstract(), "best")[0], state_of(107).weights)


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
    with pytest.raises(DataError, match=r"does not fit the run.s config: model/tables/item_id") as caught:
        open_model(folder, tree, "last")
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_what_it_was_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files are written in the background, while the run goes on changing its progress and its arrays."""
    changed = threading.Event()
    seal = manifest.seal

    def late(*arguments: Any) -> Any:
        assert changed.wait(10)
        return seal(*arguments)

    monkeypatch.setattr(manifest, "seal", late)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    standing = {"best": 0.1}
    state = jax.tree.map(jnp.array, state_of(1))
    checkpoints.save(state, 1, {"step": 1, "standing": standing}, None)
    assert checkpoints.poll() == []
    assert checkpoints.latest() is None, "not before it is on the disk"
    standing["best"] = 0.9
    jax.tree.map(lambda x: x.delete(), state)
    changed.set()
    checkpoints.wait()
    assert checkpoints.poll() == [(1, None)]
    restored, progress = checkpoints.restore(state_of(0), 1)
    equal(restored, state_of(1))
    assert progress["standing"] == {"best": 0.1}
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


def test_what_is_visible_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When a checkpoint gets its name, each file and folder of it was synced; the name itself is, right after."""
    synced: set[str] = set()
    fsync, rename = os.fsync, os.rename

    def note(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        if target == tmp_path / "1":
            below = {str(path) for path in Path(source).rglob("*")}
            assert below
            assert below | {str(source)} <= synced
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(saving.os, "rename", check)
    write(tmp_path, None).close()
    assert steps(tmp_path) == ["1"]
    assert synced == {str(tmp_path)}


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("dynrec_jax.train.arrays.start_to_write", "copying"),
        ("dynrec_jax.train.arrays.merge", "merging"),
        ("dynrec_jax.train.manifest.write_whole", "sealing"),
        ("dynrec_jax.train.saving.sync_tree", "syncing"),
        ("dynrec_jax.train.saving.sync", "syncing the name"),
    ],
)
def test_a_full_disk_is_told_and_the_next_save_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str
):
    checkpoints = write(tmp_path, None, 0.5, keep_last=1)
    assert checkpoints.poll() == [(1, None), (2, None)]
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        checkpoints.save(state_of(3), 3, {"step": 3}, 0.9)
        checkpoints.wait()
        assert checkpoints.poll() == [(3, "No space left on device")], what
        assert not checkpoints.save(state_of(3), 3, {"step": 3}, 0.9, before=full)
        assert checkpoints.poll() == [(3, "No space left on device")]
    assert checkpoints.latest() == 2
    assert steps(tmp_path) == ["2"], "what was half written holds no space, and nothing was given up for it"
    assert checkpoints.save(state_of(3), 3, {"step": 3}, 0.4)
    checkpoints.wait()
    assert checkpoints.poll() == [(3, None)]
    assert checkpoints.poll() == []
    checkpoints.close()
    assert steps(tmp_path) == ["2", "3"]
    assert open_model(tmp_path, abstract(), "best")[1] == 2


def test_another_fault_of_a_save_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("a mistake")

    checkpoints = write(tmp_path, None)
    monkeypatch.setattr(manifest, "seal", fail)
    checkpoints.save(state_of(2), 2, {"step": 2}, None)
    with pytest.raises(RuntimeError, match="a mistake"):
        checkpoints.wait()
    checkpoints.close()
    assert steps(tmp_path) == ["1"]


def test_a_start_that_was_replaced_touches_nothing_of_the_newer_one(tmp_path: Path):
    def refuse() -> None:
        raise HeldRunError("started again elsewhere")

    checkpoints = Checkpoints(tmp_path, may_write=refuse, start="old-")
    newer = tmp_path / f"2{arrays.UNFINISHED}-new-0"
    newer.mkdir()
    with pytest.raises(HeldRunError, match="started again elsewhere"):
        checkpoints.save(state_of(2), 2, {"step": 2, "standing": {}}, None)
    assert [path.name for path in tmp_path.iterdir()] == [newer.name]
