"""Scoring that is killed goes on: parts are whole or not there, and those that are there are not computed again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynrec_jax.evaluate import recommender
from dynrec_jax.files import LOCK, is_temporary
from dynrec_jax.score import parts, queries

from ..commands import SHARDS, Made, a_shard_each, digest, dynrec, leftover, one_line


@pytest.fixture(autouse=True)
def a_part_a_shard(monkeypatch):
    """So that a job of a few users has several parts."""
    monkeypatch.setattr(queries, "groups", a_shard_each)


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory) -> dict[str, str]:
    """What an uninterrupted job leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "groups", a_shard_each)
        assert dynrec("score", workdir=shop.workdir, out=out, k=5) == 0
    found = digest(out)
    assert len(found) == SHARDS + 3  # the parts, whose they are, their digests, and the lock
    return found


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The parts that a job writes, in order."""
    numbers: list[int] = []
    write = parts.Parts.write

    def counted(self: parts.Parts, part: int, *rest: object) -> None:
        numbers.append(part)
        write(self, part, *rest)

    monkeypatch.setattr(parts.Parts, "write", counted)
    return numbers


def parts_in(found: dict[str, str]) -> dict[str, str]:
    """Without what says which parts there are: it grows with them."""
    return {name: value for name, value in found.items() if name not in (parts.RECORDS, LOCK)}


def score(made: Made, out: Path, **values: object) -> int:
    return dynrec("score", workdir=made.workdir, out=out, **{"k": 5, **values})


def test_a_job_that_is_interrupted_goes_on(shop, whole, written, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).name.startswith("part-00001"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert score(shop, out) == 130
    kept = parts_in(digest(out))
    assert kept.items() < whole.items()  # no half of a part, under any name
    known = [json.loads(line)["part"] for line in (out / parts.RECORDS).read_text().splitlines()]
    assert [name[:10] for name in known] == ["part-00000", "part-00001"]  # a digest is there before its part
    assert (sum(name.endswith(".parquet") for name in kept), written) == (1, [0, 1])
    capsys.readouterr()
    assert score(shop, out) == 0
    assert written[2:] == [1, 2, 3]
    assert digest(out) == whole
    assert "1 were there already" in capsys.readouterr().out


def test_a_last_part_that_cannot_be_written_is_told(shop, whole, tmp_path, monkeypatch, capsys):
    """Nothing is computed behind it, so nothing else would ask how it went."""
    out = tmp_path / "out"
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target).name.startswith(f"part-{SHARDS - 1:05d}"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    assert score(shop, out) == 1
    assert f"part-{SHARDS - 1:05d}" in capsys.readouterr().err.splitlines()[-1]
    kept = parts_in(digest(out))
    assert len(kept) == len(parts_in(whole)) - 1
    assert kept.items() < whole.items()


def test_a_job_that_is_done_computes_nothing(shop, written, tmp_path):
    out = tmp_path / "out"
    assert score(shop, out) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert score(shop, out) == 0
    assert written == list(range(SHARDS))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_damaged_and_missing_parts_are_computed_again_and_leftovers_removed(shop, whole, written, tmp_path):
    out = tmp_path / "out"
    assert score(shop, out) == 0
    paths = sorted(out.glob("part-*"))
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    paths[0].unlink()
    leftover(paths[0]).write_bytes(b"of a process that was killed")
    written.clear()
    assert score(shop, out) == 0
    assert written == [0, 2]
    assert digest(out) == whole


@pytest.mark.parametrize(
    ("switches", "values", "named"),
    [
        ([], {"k": 6}, "k: 5 -> 6"),
        (["filter_seen"], {}, "filter_seen: False -> True"),
        ([], {"split": "test"}, "split: 'all' -> 'test'"),
        ([], {"step": 3}, "step: 6 -> 3"),
        ([], {"users": "some.csv"}, "users: None -> "),
    ],
)
def test_the_output_of_another_job_is_refused_with_the_difference(
    switches, values, named, shop, lists, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queries, "groups", recommender.groups)  # as `lists` was made
    Path("some.csv").write_text("user_id\n001\n")
    before = digest(lists)
    capsys.readouterr()
    assert dynrec("score", *switches, workdir=shop.workdir, out=lists, **{"k": 5, **values}) == 2
    assert named in one_line(capsys)
    assert digest(lists) == before


def test_a_folder_that_another_worker_begins_meanwhile_is_gone_on_with(tmp_path, monkeypatch):
    out, about = tmp_path / "out", {"format": 2}
    parts.Parts(out, about, 1)
    read, looked = parts.read_manifest, []

    def late(path: Path) -> object:
        looked.append(path)
        return read(path) if len(looked) > 1 else None  # it was not there yet

    monkeypatch.setattr(parts, "read_manifest", late)
    parts.Parts(out, about, 1)
    assert len(looked) == 2


def test_a_job_killed_before_its_manifest_starts_again(shop, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    leftover(out / parts.MANIFEST).write_text("{")
    assert score(shop, out) == 0
    assert digest(out) == whole


KILLED = """
import os, signal, sys
from pathlib import Path
from dynrec_jax.cli import main
from dynrec_jax.score import queries
from tests.commands import a_shard_each
queries.groups = a_shard_each
replace = os.replace
def killed(source, target):
    if Path(target).name.startswith("part-00002"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_whole_parts(shop, whole, written, tmp_path):
    out = tmp_path / "out"
    arguments = ["score", f"--workdir={shop.workdir}", f"--out={out}", "--k=5"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env={**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    kept = digest(out)
    half = [name for name in kept if is_temporary(Path(name))]
    assert len(half) == 1  # of the killed process; readers of Parquet folders pass it over
    assert {name: kept[name] for name in parts_in(kept) if name not in half}.items() < whole.items()
    assert score(shop, out) == 0
    assert written == [2, 3]
    assert digest(out) == whole
