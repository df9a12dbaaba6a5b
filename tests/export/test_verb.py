"""`dynrec export` as a user meets it: what it writes, beside what `dynrec score` writes, and mistakes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dynrec_jax import __version__
from dynrec_jax import workdir as workdirs
from dynrec_jax.data.cache import Histories
from dynrec_jax.export.runner import Runner
from dynrec_jax.parallel.digest import tree_digest

from ..commands import Made, dynrec, make, one_line
from .runs import answers, lines


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A trained run whose lists depend on counts of neighbours."""
    return make(tmp_path_factory.mktemp("counted"), model__neighbours=1.0, model__shrinkage=2.0)


def test_the_runner_gives_the_lists_of_score_and_the_folder_says_what_it_is(
    made: Made, tmp_path: Path, capsys
):
    (tmp_path / "out").mkdir()  # an empty folder is no other output
    assert dynrec("export", "filter_seen", workdir=made.workdir, out=tmp_path / "out", k=12) == 0
    told = capsys.readouterr().out
    assert "32 items, lists of 12" in told
    assert f"python {tmp_path / 'out' / 'run.py'} --histories=FILE" in told
    assert dynrec("score", "filter_seen", workdir=made.workdir, out=tmp_path / "scored", k=12) == 0
    run = workdirs.open(made.workdir)
    stored = Histories(run.dataset, run.config.data.cache_dir)
    runner = Runner(tmp_path / "out")
    found = {line["user_id"]: line for line in answers(runner, lines(stored))}
    scored = pq.read_table(tmp_path / "scored").to_pylist()
    assert len(scored) == len(found) == stored.users
    for row in scored:
        line = found[row["user_id"]]
        assert line["item_ids"] == row["item_ids"]
        np.testing.assert_allclose(line["scores"], row["scores"], rtol=1e-5, atol=1e-5)
    check_manifest(tmp_path / "out", runner.manifest, run)


def check_manifest(folder: Path, manifest: dict[str, Any], run: workdirs.Run) -> None:
    names = {"recommend.stablehlo", "weights.safetensors", "item_ids.json", "run.py"}
    assert {path.name for path in folder.iterdir()} == {*names, "export.json"}
    assert manifest["files"].keys() == names
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    length = run.config.data.max_length
    expected = {
        "workdir": "workdir",
        "step": run.step,
        "weights_digest": tree_digest((run.params, run.tables)),
        "dataset": run.dataset.content,
        "items": 32,
        "k": 12,
        "filter_seen": True,
        "max_length": length,
        "platforms": ["cpu", "cuda", "tpu"],
        "formats": ["stablehlo"],
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["versions"]["dynrec-jax"] == __version__
    program = manifest["programs"]["recommend"]
    assert program["inputs"] == [
        {"name": "items", "shape": ["b", length], "dtype": "int32"},
        {"name": "seen", "shape": ["b", "m"], "dtype": "int32"},
    ]
    assert program["outputs"] == [
        {"name": "ids", "shape": ["b", 12], "dtype": "int32"},
        {"name": "scores", "shape": ["b", 12], "dtype": "float32"},
    ]
    assert json.loads((folder / "item_ids.json").read_text()) == run.item_ids.to_pylist()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            {"formats": "stablehlo,coreml"},
            "--formats=stablehlo,coreml: 'coreml' is unknown; expected some of",
        ),
        ({"formats": "savedmodel"}, "'savedmodel' is unknown; expected some of stablehlo, faiss"),
        ({"formats": ""}, "--formats=: names nothing"),
        ({"platforms": "cpu,gpu"}, "'gpu' is unknown; expected some of cpu, cuda, rocm, tpu"),
        ({"platforms": "cpu,cpu"}, "--platforms=cpu,cpu: repeats a name"),
        ({"k": 33}, "--k=33: the catalogue has 32 items; give a number from 1 to 32"),
        ({"k": 0}, "k"),
        (
            {"faiss": "IVF4,Flat"},
            "--faiss=IVF4,Flat --faiss_search=: are of an index, and --formats=stablehlo",
        ),
        ({"faiss_search": "nprobe=2"}, "--faiss_search=nprobe=2: are of an index"),
        ({"step": "first"}, "--step=first: expected best, last or a step's number"),
        ({"step": 5}, "no checkpoint"),
        ({"workdir": "nowhere"}, "nowhere: no such folder; expected a run folder made by `dynrec train`"),
        ({"dataset": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_left(
    made: Made, tmp_path: Path, capsys, monkeypatch, flags: dict[str, Any], told: str
):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert dynrec("export", **{"workdir": made.workdir, "out": "new/out", **flags}) == 2
    assert told in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_as_it_is(made: Made, tmp_path: Path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    capsys.readouterr()
    for name in ("out", "file"):
        assert dynrec("export", workdir=made.workdir, out=tmp_path / name) == 2
        assert "exists already and is left as it is" in one_line(capsys)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "out"]


def test_where_a_disk_is_mounted_nothing_can_be_renamed_to(made: Made, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    capsys.readouterr()
    assert dynrec("export", workdir=made.workdir, out=tmp_path / "disk") == 2
    assert "another disk is mounted there; choose a folder in it for --out" in one_line(capsys)
    assert list(tmp_path.iterdir()) == [tmp_path / "disk"]
