"""Checkpoints: equal when read back, the best and the latest kept, and honest about what is not there."""

import json
import os
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

from dynrec_jax.errors import DataError, MachineError
from dynrec_jax.parallel.rows import lazy_adam
from dynrec_jax.train import manifest, saving
from dynrec_jax.train.checkpoint import Checkpoints, open_model
from dynrec_jax.train.state import TrainState
from dynrec_jax.train.verified import Reader

from .. import tiny


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


def write(folder: Path, *values: float | None, keep_last: int = 2, first: int = 1) -> Checkpoints:
    """Checkpoints of steps counted from `first`, with these validation values; still open."""
    checkpoints = Checkpoints(folder, keep_last)
    for step, value in enumerate(values, first):
        assert checkpoints.save(state_of(step), step, {"step": step}, value)
    checkpoints.wait()
    return checkpoints


def break_seal(checkpoint: Path) -> None:
    """The validation value is another one, as a flipped bit may have it."""
    path = checkpoint / manifest.NAME
    told = json.loads(path.read_text())
    told["body"]["value"] = 0.99
    path.write_text(json.dumps(told))


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_a_broken_seal_never_costs_the_last_good_checkpoint(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, None, None, keep_last=2).close()
    break_seal(folder / "2")
    write(folder, None, keep_last=1, first=3).close()
    assert steps(folder) == ["2", "3"], "1 has a newer good one, and 2 is no good one but not deleted"
    break_seal(folder / "3")
    write(folder, keep_last=1).close()
    write(folder, None, keep_last=2, first=4).close()
    break_seal(folder / "4")
    checkpoints = write(folder, None, keep_last=1, first=5)
    assert steps(folder) == ["2", "3", "4", "5"]
    checkpoints.close()


def test_a_broken_seal_is_not_the_best(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, 0.3, 0.1, 0.2, keep_last=3).close()
    break_seal(folder / "2")  # which now claims 0.99
    said: list[str] = []
    assert open_model(folder, abstract(), "best", said.append)[1] == 1
    assert len(said) == 1
    assert "checkpoints/2: is damaged (manifest.json is not what was written)" in said[0]
    write(folder, 0.1, 0.1, keep_last=1, first=4).close()
    assert steps(folder) == ["1", "2", "5"], "the best, the last, and the one that nobody can judge"


def test_the_next_best_takes_the_place_of_a_damaged_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "checkpoints"
    write(folder, 0.2, 0.4, 0.3, None, keep_last=4).close()
    shutil.rmtree(folder / "2" / "model")
    assert open_model(folder, abstract(), "best")[1] == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1, "on standard error where nobody else takes it"
    assert "model/_METADATA is missing" in err
    assert "the checkpoint of step 3 is used" in err
    assert open_model(folder, abstract(), "last")[1] == 4
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match=r"checkpoints/2: is damaged: .*is missing.*use another checkpoint"):
        open_model(folder, abstract(), 2)
    assert steps(folder) == ["1", "2", "3", "4"], "it is only read"


def test_a_damaged_optimizer_does_not_keep_the_model_from_being_opened(tmp_path: Path):
    write(tmp_path, None).close()
    shutil.rmtree(tmp_path / "1" / "optimizer")
    assert open_model(tmp_path, abstract(), "last", pytest.fail)[1] == 1


def test_where_all_are_damaged_nothing_starts_from_the_beginning(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, None, None).close()
    break_seal(folder / "1")
    (folder / "2" / "optimizer" / "_METADATA").unlink()
    for _ in range(2):  # nor at the second try
        with pytest.raises(
            DataError, match=r"no checkpoint is good; the newest, of step 2.*optimizer/_METADATA"
        ):
            resume(folder)
    assert steps(folder) == ["1", "2"]
    with pytest.raises(DataError, match="checkpoints/2: is damaged"):
        Checkpoints(folder).restore(state_of(0), 2)
    assert resume(tmp_path / "none") == (None, [])


def test_all_that_is_damaged_is_moved_aside_under_a_free_name(tmp_path: Path):
    folder, aside = tmp_path / "checkpoints", tmp_path / "damaged"
    write(folder, None, None, None, None, keep_last=4).close()
    (aside / "4").mkdir(parents=True)
    for number in (1, 3, 4):
        break_seal(folder / str(number))
    step, said = resume(folder, keep_last=4)
    assert (step, len(said)) == (2, 3)
    assert steps(folder) == ["2"]
    assert steps(aside) == ["1", "3", "4", "4-2"]
    assert (
        f"checkpoints/4: is damaged (manifest.json is not what was written); moved to {aside}/4-2" in said[0]
    )
    # The run comes to those steps once more.
    write(folder, None, None, keep_last=4, first=3).close()
    assert resume(folder) == (4, [])


def test_another_shape_is_no_damage(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, None, None).close()
    checkpoints = Checkpoints(folder, say=pytest.fail)
    with pytest.raises(
        DataError, match=r"checkpoints/2: does not fit the run's config: model/tables/item_id"
    ):
        checkpoints.resume(state_of(0, rows=32))
    other = state_of(0)
    other = other._replace(params={"user": {"kernel": other.params["user"]["kernel"]}})
    with pytest.raises(DataError, match=r"model/params/user/scale is float32\[2\] there and absent"):
        checkpoints.resume(other)
    checkpoints.close()
    assert steps(folder) == ["1", "2"]


def test_a_checkpoint_under_another_steps_name_is_noticed(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, None, None).close()
    os.rename(folder / "2", folder / "7")
    step, said = resume(folder)
    assert step == 1
    assert "checkpoints/7: is damaged (it is the checkpoint of step 2)" in said[0]


def test_checkpoints_of_an_earlier_version_are_refused_and_left(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, None).close()
    (folder / "1" / manifest.NAME).unlink()
    (folder / "1" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(DataError, match="written by an earlier version"):
        resume(folder)
    with pytest.raises(DataError, match="written by an earlier version"):
        open_model(folder, abstract(), "best")
    assert steps(folder) == ["1"]


def test_files_that_are_whole_but_cannot_be_read_are_not_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "checkpoints"
    write(folder, None, None).close()

    def fail(*_: Any) -> None:
        raise ValueError("no such codec")

    monkeypatch.setattr("dynrec_jax.train.arrays.read", fail)
    with pytest.raises(
        MachineError, match=r"cannot be read, though its files are as they were.*no such codec"
    ):
        resume(folder)
    assert steps(folder) == ["1", "2"]


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


def test_a_checkpoint_that_a_run_retires_meanwhile_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was listed is gone when it is read: the next one is opened, and nothing is said."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        checkpoints.save(state_of(step), step, {"step": step}, None)
    checkpoints.close()
    scan = Reader.scan

    def late(self: Reader) -> Any:
        found = scan(self)
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        return found

    monkeypatch.setattr(Reader, "scan", late)
    said: list[str] = []
    variables, step = open_model(tmp_path, abstract(), "last", said.append)
    assert (step, said) == (1, [])
    equal(variables, {"params": state_of(1).params, "tables": state_of(1).tables})
