"""Checkpoints that are damaged, or look so: what is good is used, and nothing good is lost."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.errors import DataError, MachineError
from dynrec_jax.train import manifest
from dynrec_jax.train.checkpoint import Checkpoints, open_model
from dynrec_jax.train.verified import Reader

from .checkpoints import abstract, break_seal, equal, resume, state_of, steps, write


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
