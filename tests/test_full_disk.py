"""A disk that fills up, or may not be written: exit status 1, one line, nothing that looks whole."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynrec_jax.score import queries
from dynrec_jax.score.parts import MANIFEST, RECORDS
from dynrec_jax.train import hooks, manifest
from dynrec_jax.train.checkpoint import Checkpoints

from .commands import Made, a_shard_each, digest, dynrec, one_line, small_run

PAGE = os.sysconf("SC_PAGESIZE")  # what a small file takes of a tmpfs


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return small_run(tmp_path_factory)


@contextmanager
def small_disk(at: Path, size: str, read_only: bool = False) -> Iterator[Path]:
    """A file system of its own on `at`."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command, so no small file system")
    at.mkdir()
    options = f"size={size}{',ro' if read_only else ''}"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


class TestFullDisk:
    """Mounting needs root: without it these are left out, and say so."""

    def test_prepare(self, tmp_path, capsys):
        with small_disk(tmp_path / "disk", "200k") as disk:
            before = digest(disk)
            source = "synthetic:users=3000,items=200,seed=0"
            assert dynrec("prepare", source=source, out=disk / "dataset") == 1
            assert "full" in one_line(capsys)
            assert digest(disk) == before

    def test_score_goes_on_once_there_is_space(self, made, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(queries, "groups", a_shard_each)
        assert dynrec("score", workdir=made.workdir, out=tmp_path / "whole", k=32) == 0
        whole = digest(tmp_path / "whole")
        files = [MANIFEST, RECORDS, *(path.name for path in sorted((tmp_path / "whole").glob("part-*")))]
        first = [(tmp_path / "whole" / name).stat().st_size for name in files[:3]]
        room = sum(-(-size // PAGE) * PAGE for size in first) + PAGE
        with small_disk(tmp_path / "disk", f"{40 * PAGE}") as disk:
            (disk / "ballast").write_bytes(bytes(40 * PAGE - room))
            capsys.readouterr()
            assert dynrec("score", workdir=made.workdir, out=disk / "out", k=32) == 1
            err = capsys.readouterr().err
            failed = err.splitlines()[-1]
            assert failed.startswith("dynrec: ")
            assert "No space left" in failed
            assert "Traceback" not in err
            kept = digest(disk / "out")
            assert 0 < len(kept) < len(whole)
            grown = {RECORDS: kept.pop(RECORDS, "")}
            assert kept.items() <= whole.items(), grown  # what is there is whole
            (disk / "ballast").unlink()
            assert dynrec("score", workdir=made.workdir, out=disk / "out", k=32) == 0
            assert digest(disk / "out") == whole

    def test_read_only_places(self, made, tmp_path, capsys):
        with small_disk(tmp_path / "disk", "1m", read_only=True) as disk:
            commands = {
                "prepare": {"source": "synthetic:users=9,items=20,seed=0", "out": disk / "dataset"},
                "train": {"config": made.experiment, "workdir": disk / "run"},
                "score": {"workdir": made.workdir, "out": disk / "out", "k": 5},
            }
            for verb, values in commands.items():
                assert dynrec(verb, **values) == 1
                assert str(disk) in one_line(capsys)

    def test_train_that_never_gets_room(self, made, tmp_path, monkeypatch, capsys, caplog):
        monkeypatch.setattr(hooks, "PAUSES", (0.0, 0.0))
        with small_disk(tmp_path / "disk", "60k") as disk:
            assert dynrec("train", config=made.experiment, workdir=disk / "run") == 1
            err = capsys.readouterr().err
            assert "Traceback" not in err
            assert [record for record in caplog.records if record.levelname == "ERROR"] == []
            assert "the checkpoint of step 3 could not be written (No space left on device)" in err
            last = err.splitlines()[-1]
            assert last.startswith("dynrec: ")
            assert "step 6, cannot be written: the disk is full" in last
            assert "goes on from the start" in last
            checkpoints = Checkpoints(disk / "run" / "checkpoints")
            assert checkpoints.latest() is None
            checkpoints.close()
            assert list((disk / "run" / "checkpoints").iterdir()) == [], (
                "what was half written holds no space"
            )

    def test_train_goes_on_and_saves_once_there_is_space(self, made, tmp_path, monkeypatch, capsys, caplog):
        """Full before the first checkpoint, at step 3; there is room again when the try at step 4 has failed."""
        save, say = Checkpoints.save, Checkpoints.say
        failed: list[str] = []
        with small_disk(tmp_path / "disk", "4m") as disk:

            def fill_and_save(checkpoints: Checkpoints, state, step: int, *rest, **more):
                if step == 3:
                    fill(disk / "ballast", spare=8 * PAGE)
                started = save(checkpoints, state, step, *rest, **more)
                checkpoints.wait()  # so that how it ended is known at this step, and not at a later one
                return started

            def make_room(checkpoints: Checkpoints, text: str) -> None:
                say(checkpoints, text)
                failed.append(text)
                if len(failed) == 2:
                    (disk / "ballast").unlink()

            monkeypatch.setattr(Checkpoints, "save", fill_and_save)
            monkeypatch.setattr(Checkpoints, "say", make_room)
            assert dynrec("train", config=made.experiment, workdir=disk / "run") == 0
            err = capsys.readouterr().err
            assert "Traceback" not in err
            assert [record for record in caplog.records if record.levelname == "ERROR"] == []
            for told in (
                "step 3 could not be written (No space left on device); there is none yet; trying again at step 4",
                "step 4 could not be written (No space left on device); there is none yet; trying again at step 5",
                "step 5: saved; checkpoints can be written again",
            ):
                assert err.count(told) == 1, (told, err)
            assert len(failed) == 3
            last = Path("checkpoints", "6")
            ours, theirs = manifest.read(disk / "run" / last), manifest.read(made.workdir / last)
            assert ours.leaves == theirs.leaves, "bit for bit the state of a run whose disk was never full"
            assert (ours.value, ours.progress) == (theirs.value, theirs.progress)
            assert without_clock(disk / "run") == without_clock(made.workdir)


def fill(path: Path, spare: int) -> None:
    """Fills a file system but for some bytes."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(PAGE)):
            pass
    os.truncate(path, path.stat().st_size - spare)


def without_clock(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line.split('"histories_per_second"')[0] for line in lines]
