"""The run folder: made once, refused where it is another's, and enough to open a model with."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dynrec_jax import __version__ as VERSION
from dynrec_jax import config as configs
from dynrec_jax import files, workdir
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.errors import ConfigError, DataError, MachineError
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.state import TrainState

from . import tiny


@pytest.fixture
def started(tmp_path: Path, tiny_dataset: Dataset) -> Path:
    """A run folder without checkpoints."""
    workdir.start(tmp_path / "run", tiny.config(dataset=str(tiny_dataset.path)), tiny_dataset)
    return tmp_path / "run"


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_folder_says_what_it_is_of(started: Path, tiny_dataset: Dataset):
    assert sorted(contents(started)) == ["config.json", "run.json"], "and nothing temporary is left"
    record = json.loads((started / "run.json").read_text())
    assert record["dataset"] == {"path": str(tiny_dataset.path), "content": tiny_dataset.content}
    assert record["versions"]["jax"] == jax.__version__
    assert configs.flat(workdir.open_config(started)) == configs.flat(
        tiny.config(dataset=str(tiny_dataset.path))
    )


def test_the_same_config_goes_on_and_notes_what_may_change(started: Path, tiny_dataset: Dataset):
    """Where the dataset lies, the mesh and how often is logged are those of the latest start."""
    before = contents(started)
    workdir.start(started, tiny.config(dataset=str(tiny_dataset.path)), tiny_dataset)
    assert contents(started) == before
    moved = tiny.config(dataset="elsewhere", mesh__data=2, logging__every=7)
    workdir.start(started, moved, tiny_dataset)
    assert configs.flat(workdir.open_config(started)) == configs.flat(moved)


def test_a_run_folder_is_held_by_one_process(started: Path):
    refused = pytest.raises(ConfigError, match="another process trains there")
    with workdir.locked(started), refused, workdir.locked(started):
        pass
    with workdir.locked(started):  # given back
        pass


def test_another_config_is_refused_with_the_difference(started: Path, tiny_dataset: Dataset):
    before = contents(started)
    with pytest.raises(ConfigError, match=r"train\.steps: 12 -> 13.*choose another --workdir"):
        workdir.start(started, tiny.config(train__steps=13), tiny_dataset)
    assert contents(started) == before


def test_another_dataset_is_refused(started: Path, timed_dataset: Dataset):
    with pytest.raises(DataError, match="was trained on dataset"):
        workdir.start(started, tiny.config(), timed_dataset)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, tiny_dataset: Dataset):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no run folder"):
        workdir.start(tmp_path, tiny.config(), tiny_dataset)
    with pytest.raises(ConfigError, match="exists and is no run folder"):
        workdir.start(tmp_path / "notes.txt", tiny.config(), tiny_dataset)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_an_empty_folder_will_do(tmp_path: Path, tiny_dataset: Dataset):
    workdir.start(tmp_path, tiny.config(), tiny_dataset)
    assert (tmp_path / "config.json").exists()


def test_a_place_where_no_folder_can_be_made_is_refused(tmp_path: Path, tiny_dataset: Dataset):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="no folder can be made there"):
        workdir.start(tmp_path / "file" / "run", tiny.config(), tiny_dataset)


def test_a_full_disk_is_a_fault_of_the_machine_and_leaves_no_run(
    tmp_path: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(MachineError, match="No space left"):
            workdir.start(tmp_path / "run", tiny.config(), tiny_dataset)
    assert not (tmp_path / "run" / "config.json").exists()
    workdir.start(tmp_path / "run", tiny.config(), tiny_dataset)
    assert (tmp_path / "run" / "config.json").exists(), "the same command goes on once there is room"


def test_what_is_no_run_folder_is_refused(tmp_path: Path, started: Path):
    with pytest.raises(DataError, match="no such folder"):
        workdir.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no config\.json"):
        workdir.open(tmp_path / "empty")
    record = json.loads((started / "run.json").read_text())
    for text in ("{", "[]", '{"dataset": {}}', '{"format": 1, "dataset": 3}'):
        (started / "run.json").write_text(text)
        with pytest.raises(DataError, match=r"run\.json: missing or damaged"):
            workdir.open(started)
    (started / "run.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(
        DataError, match=rf"has format 2, and this version reads 1; .* wrote it \({VERSION}\)"
    ):
        workdir.open(started)


def test_a_model_is_opened_on_this_machines_devices(started: Path, tmp_path: Path, tiny_dataset: Dataset):
    with pytest.raises(DataError, match="no such folder"):
        workdir.open(started)

    states = [tiny.bstm(tiny_dataset.items, seed) for seed in (1, 2)]
    checkpoints = Checkpoints(started / "checkpoints", keep_last=2)
    for step, (_, params, tables) in enumerate(states, 1):
        state = TrainState(np.int32(step), params, tables, {"count": np.int32(step)}, {})
        checkpoints.save(state, step, {"step": step}, [0.5, 0.4][step - 1])
    checkpoints.close()

    best = workdir.open(started)
    assert (best.step, best.mesh.size) == (1, 8)
    assert best.dataset.content == tiny_dataset.content
    assert best.config.is_locked
    for saved, opened in zip(
        jax.tree.leaves(states[0][1:]), jax.tree.leaves((best.params, best.tables)), strict=True
    ):
        np.testing.assert_array_equal(saved, opened)
    assert len(best.tables["item_id"].sharding.device_set) == 8
    assert {shard.data.shape[0] for shard in best.tables["item_id"].addressable_shards} == {256 // 8}

    # The dataset may have moved, but not changed.
    shutil.copytree(tiny_dataset.path, tmp_path / "moved")
    assert workdir.open(started, step="last", dataset=tmp_path / "moved").step == 2


def test_a_moved_dataset_of_other_content_is_refused(started: Path, timed_dataset: Dataset):
    with pytest.raises(DataError, match="give the dataset folder that it was trained on"):
        workdir.open(started, dataset=timed_dataset.path)
