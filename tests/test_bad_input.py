"""Bad input through the command line: one line, exit status 2, nothing half-written, nothing touched."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.score import job
from dynrec_jax.train import arrays

from .commands import STEPS, Made, digest, dynrec, experiment, leftover, one_line, small_run

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "same length, other bytes": lambda raw: raw[:-9] + bytes(byte ^ 0x5A for byte in raw[-9:]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return small_run(tmp_path_factory)


@pytest.fixture
def at(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with an output of somebody else's in it."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("of somebody else")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, watched: list[Path], verb: str, *switches: str, **values: object) -> str:
    """The one line of a command that must exit with 2 and leave `watched` as it is."""
    before = [digest(folder) for folder in watched]
    capsys.readouterr()
    assert dynrec(verb, *switches, **values) == 2
    assert [digest(folder) for folder in watched] == before
    return one_line(capsys)


def damage(file: Path, how: str) -> None:
    file.write_bytes(DAMAGE[how](file.read_bytes()))


NEEDS: dict[str, dict[str, object]] = {"evaluate": {}, "score": {"out": "out", "k": 5}}


def damage_arrays(run: Path, tree: str, how: str, step: int = STEPS) -> None:
    data = [p for p in (run / "checkpoints" / str(step) / tree).rglob("d/*") if p.stat().st_size > 99]
    assert data
    for file in data:
        damage(file, how)


# ---------------------------------------------------------------------------------------------------- prepare

TEXT_AT_LINE_4 = "user,item,time\na,x,1\na,y,2\nb,x,soon\nb,y,4\n"


@pytest.mark.parametrize(
    ("source", "flags", "named"),
    [
        ("table:nowhere.csv", {}, ["nowhere.csv", "no such file"]),
        ("table:taken", {}, ["taken"]),
        ("sequences:taken", {}, ["taken"]),
        ("atomic:nowhere", {}, ["nowhere"]),
        ("movielens:taken", {}, ["taken"]),
        ("table:columns.csv", {}, ["columns.csv", "user", "who, what"]),
        ("table:text.csv", {}, ["text.csv:4", "soon"]),
        ("atomic:text.inter", {}, ["text.inter:4", "soon"]),
        ("table:empty.csv", {}, ["empty.csv"]),
        ("sequences:empty.csv", {}, ["empty.csv"]),
        ("table:good.csv", {"core": 50}, ["good.csv", "no user is left"]),
        ("table:latin.csv", {}, ["latin.csv", "UTF-8"]),
        ("sequences:latin.csv", {}, ["latin.csv", "UTF-8"]),
        ("table:good.csv", {"items": "nowhere.csv"}, ["nowhere.csv"]),
        ("table:good.csv", {"pseudonymise": "nowhere.key"}, ["nowhere.key"]),
        ("table:good.csv", {"items": "mixed.jsonl"}, ["mixed.jsonl:2", "'v'", "a list of numbers"]),
        ("table:good.csv", {"items": "columns.csv"}, ["columns.csv", "item_id", "who, what"]),
        ("table:good.csv", {"items": "latin.csv"}, ["latin.csv:2", "UTF-8"]),
        ("table:good.csv", {"triples": "nowhere.tsv"}, ["nowhere.tsv"]),
        ("table:good.csv", {"triples": "columns.csv"}, ["columns.csv", "'head'", "who, what"]),
        ("amazon:nowhere", {}, ["nowhere", "no such file"]),
        ("amazon:taken", {}, ["taken", "found none"]),
        ("amazon:mixed.jsonl", {}, ["mixed.jsonl", "reviewerID"]),
        ("mind:nowhere", {}, ["nowhere", "behaviors.tsv"]),
        ("mind:taken", {}, ["taken", "behaviors.tsv"]),
        ("paper:good.csv", {}, ["paper"]),
        ("good.csv", {}, ["KIND"]),
    ],
)
def test_prepare_refuses(source, flags, named, at, capsys):
    (at / "columns.csv").write_text("who,what\na,x\n")
    (at / "text.csv").write_text(TEXT_AT_LINE_4)
    (at / "text.inter").write_text(
        TEXT_AT_LINE_4.replace(",", "\t").replace(
            "user\titem\ttime", "user_id:token\titem_id:token\ttimestamp:float"
        )
    )
    (at / "empty.csv").write_text("")
    (at / "latin.csv").write_bytes("user,item,time\nJosé,x,1\n".encode("latin-1"))
    (at / "mixed.jsonl").write_text('{"item_id": "x", "v": [0.5]}\n{"item_id": "y", "v": "soon"}\n')
    (at / "good.csv").write_text(TEXT_AT_LINE_4.replace("soon", "3"))
    line = refused(capsys, [at], "prepare", source=source, out="out", **flags)
    assert [part for part in named if part not in line] == []


@pytest.mark.parametrize("out", ["taken", "taken/precious.txt", "taken/precious.txt/out"])
def test_prepare_leaves_an_existing_output_alone(out, at, capsys):
    assert "taken" in refused(capsys, [at], "prepare", source="synthetic:users=5,items=5,seed=0", out=out)


# ------------------------------------------------------------------------------------------------------ train


def train(capsys, watched: list[Path], config: Path, workdir: object, **keys: object) -> str:
    flags = {f"config__{key}": value for key, value in keys.items()}
    return refused(capsys, watched, "train", config=config, workdir=workdir, **flags)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["interactions/part-00002-of-00004.parquet", "dataset.json"])
def test_train_refuses_a_damaged_dataset(how, name, made, at, capsys):
    shutil.copytree(made.dataset, at / "dataset")
    damage(at / "dataset" / name, how)
    keys = {"dataset": at / "dataset", "data__cache_dir": at / "cache"}
    line = train(capsys, [at / "dataset", at / "taken"], made.experiment, "run", **keys)
    assert str(at / "dataset" / name) in line
    assert not (at / "run").exists()
    assert not list((at / "cache").rglob("*.arrow*"))


def test_train_refuses_a_dataset_without_a_shard(made, at, capsys):
    shutil.copytree(made.dataset, at / "dataset")
    (at / "dataset" / "interactions" / "part-00001-of-00004.parquet").unlink()
    line = train(capsys, [at], made.experiment, "run", dataset="dataset")
    assert "part-00001-of-00004.parquet" in line


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"dataset": "nowhere"}, ["nowhere"]),
        ({"dataset": "taken"}, ["taken", "dataset.json"]),
        ({"dataset": "taken/precious.txt"}, ["precious.txt", "is a file"]),
        ({"dataset": ""}, ["config.dataset"]),
        ({"train__batch_size": 6}, ["batch_size", "6", "4 shards"]),
        ({"mesh__data": 7}, ["config.mesh"]),
        ({"evaluation__metric": "ndcg@50", "evaluation__ks": "10,50"}, ["ndcg@50", "32 items"]),
        ({"evaluation__metric": "ndcg@10", "evaluation__ks": "10,200"}, ["evaluation.ks", "200"]),
    ],
)
def test_train_refuses(keys, named, made, at, capsys):
    line = train(capsys, [at], made.experiment, "run", **keys)
    assert [part for part in named if part not in line] == []


@pytest.mark.parametrize(
    ("log", "keys", "named"),
    [
        ("a x\nb y\n", {"evaluation__metric": "mrr"}, "two training events"),
        ("a x y z\nb y x z\n", {"evaluation__metric": "mrr", "evaluation__split": "global_time"}, "times"),
        ("a x y z\nb y x z\n", {}, "ndcg@10"),
    ],
)
def test_train_refuses_a_dataset_that_it_cannot_use(log, keys, named, at, capsys):
    (at / "log.txt").write_text(log)
    assert dynrec("prepare", source="sequences:log.txt", out="dataset", shards=4) == 0
    config = experiment(at / "experiment.py", at / "dataset")
    assert named in train(capsys, [at / "dataset", at / "taken"], config, "run", **keys)
    assert not (at / "run").exists()


def test_train_refuses_a_folder_that_is_no_run(made, at, capsys):
    for workdir in ("taken", "taken/precious.txt", "taken/precious.txt/run"):
        assert "taken" in train(capsys, [at], made.experiment, workdir)


def test_train_names_what_differs_from_the_run_that_is_there(made, at, capsys):
    keys = {"model__dim": 16, "train__learning_rate": 0.5, "logging__every": 3}
    line = train(capsys, [made.workdir], made.experiment, made.workdir, **keys)
    assert "model.dim: 8 -> 16" in line
    assert "train.learning_rate: 0.01 -> 0.5" in line
    assert "logging" not in line


def test_train_refuses_the_run_of_another_dataset(made, other, capsys):
    line = train(capsys, [made.workdir], made.experiment, made.workdir, dataset=other)
    assert str(other) in line
    assert str(made.workdir) in line


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A dataset that nothing was trained on."""
    out = tmp_path_factory.mktemp("other") / "dataset"
    assert dynrec("prepare", source="synthetic:users=60,items=32,seed=1", out=out, shards=4) == 0
    return out


def test_train_starts_where_a_start_was_cut_short(made, at, monkeypatch):
    """Killed between its first file and its last, a start leaves nothing that stops the next."""
    (at / "run").mkdir()
    (at / "run" / "run.json").write_text("{}")
    leftover(at / "run" / "config.json").write_text("{")
    from dynrec_jax.train import loop

    monkeypatch.setattr(loop, "train", lambda *_: {"step": 0})
    assert dynrec("train", config=made.experiment, workdir="run") == 0
    assert digest(at / "run").keys() - {".lock"} == {"run.json", "config.json"}


# ---------------------------------------------------------------------------------------- evaluate and score


@pytest.mark.parametrize("verb", ["evaluate", "score"])
class TestRun:
    """What evaluate and score refuse alike."""

    def refuse(self, verb: str, capsys, watched: list[Path], workdir: object, **values: object) -> str:
        line = refused(capsys, [*watched, Path("taken")], verb, workdir=workdir, **NEEDS[verb], **values)
        assert not Path("out").exists()
        return line

    def test_a_workdir_that_is_none(self, verb, at, capsys):
        for workdir in ("nowhere", "taken", "taken/precious.txt"):
            assert workdir in self.refuse(verb, capsys, [at], workdir)

    @pytest.mark.parametrize("name", ["config.json", "run.json"])
    def test_a_workdir_with_a_damaged_file(self, verb, name, made, at, capsys):
        shutil.copytree(made.workdir, at / "run", ignore=shutil.ignore_patterns("checkpoints"))
        damage(at / "run" / name, "truncated")
        assert f"run/{name}" in self.refuse(verb, capsys, [at], "run")

    def test_another_dataset(self, verb, made, other, at, capsys):
        assert str(other) in self.refuse(verb, capsys, [made.workdir], made.workdir, dataset=other)

    def test_a_dataset_that_moved_away(self, verb, made, at, capsys):
        shutil.copytree(made.workdir, at / "run")
        run = (at / "run" / "run.json").read_text()
        (at / "run" / "run.json").write_text(run.replace(str(made.dataset), str(at / "gone")))
        line = self.refuse(verb, capsys, [at], "run")
        assert str(at / "gone") in line

    def test_no_checkpoint_yet(self, verb, made, at, capsys):
        shutil.copytree(made.workdir, at / "run", ignore=shutil.ignore_patterns("checkpoints"))
        assert "checkpoints" in self.refuse(verb, capsys, [at], "run")
        (at / "run" / "checkpoints").mkdir()
        assert "no complete checkpoint" in self.refuse(verb, capsys, [at], "run")

    def test_a_step_that_is_not_there(self, verb, made, at, capsys):
        line = self.refuse(verb, capsys, [made.workdir], made.workdir, step=STEPS + 1)
        assert f"step {STEPS + 1}" in line
        assert f"{STEPS // 2}, {STEPS}" in line

    @pytest.mark.parametrize("how", DAMAGE)
    def test_a_damaged_checkpoint(self, verb, how, made, at, capsys):
        """Refused where it was asked for by its number; else the next good one is used, and that is said."""
        shutil.copytree(made.workdir, at / "run")
        damage_arrays(at / "run", "model", how)
        refused = self.refuse(verb, capsys, [at], "run", step=STEPS)
        assert f"checkpoints/{STEPS}: " in refused
        given = {"workdir": "run", **NEEDS[verb], "step": "last"}
        assert dynrec(verb, **given) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
        assert len(told) == 1
        assert f"checkpoints/{STEPS}: is damaged" in told[0]
        assert f"the checkpoint of step {STEPS // 2} is used" in told[0]


USERS = {
    "empty.csv": (b"", "Empty"),
    "header.csv": (b"user_id\n", "no users"),
    "columns.csv": (b"who,what\na,b\n", "user_id"),
    "twice.csv": (b"user_id,user_id\na,b\n", "more than once"),
    "strangers.csv": (b"user_id\nstranger\n", "'stranger'"),
    "latin.csv": (b"user_id\nJos\xe9\n", "UTF8"),
    "gap.csv": (b"user_id,item\na,x\n,x\n", "row 2"),
    "ragged.csv": (b"user_id,item\na,x,y\n", "columns"),
    "time.csv": (b"user_id,item,time\na,item000001,3\na,item000002,soon\n", "row 2: time 'soon'"),
    "no_time.csv": (b"user_id,item,time\na,x,3\na,y,\n", "row 2"),
    "unknown_items.csv": (b"user_id,item\na,no-such-item\n", "no item"),
    "broken.parquet": (b"PAR1 and nothing else", "not readable"),
}
TABLES = {
    "floats": (pa.table({"user_id": [1.5]}), "double"),
    "nested": (pa.table({"user_id": [["a"]]}), "list"),
    "one item": (pa.table({"user_id": ["a"], "item_ids": ["x"]}), "expected lists"),
    "float items": (pa.table({"user_id": ["a"], "item_ids": [[1.5]]}), "double"),
    "nested items": (pa.table({"user_id": ["a"], "item_ids": [[["x"]]]}), "list"),
    "two lists": (pa.table({"user_id": ["a", "a"], "item_ids": [["x"], ["y"]]}), "two rows"),
    "no user": (pa.table({"user_id": pa.array(["a", None]), "item_ids": [["x"], ["y"]]}), "row 2"),
}


class TestScore:
    """What score alone refuses."""

    def refuse(self, capsys, made: Made, at: Path, *switches: str, **values: object) -> str:
        return refused(capsys, [at, made.workdir], "score", *switches, workdir=made.workdir, **values)

    @pytest.mark.parametrize("name", USERS)
    def test_a_users_file(self, name, made, at, capsys):
        raw, named = USERS[name]
        (at / name).write_bytes(raw)
        line = self.refuse(capsys, made, at, out="out", k=5, users=name)
        assert name in line
        assert named in line

    @pytest.mark.parametrize("name", TABLES)
    def test_a_parquet_of_users(self, name, made, at, capsys):
        table, named = TABLES[name]
        pq.write_table(table, at / "users.parquet")
        line = self.refuse(capsys, made, at, out="out", k=5, users="users.parquet")
        assert "users.parquet" in line
        assert named in line

    @pytest.mark.parametrize("users", ["nowhere.csv", "taken"])
    def test_no_users_file(self, users, made, at, capsys):
        assert users in self.refuse(capsys, made, at, out="out", k=5, users=users)

    def test_new_histories_with_a_split(self, made, at, capsys):
        (at / "new.csv").write_text("user_id,item\na,x\n")
        assert "--split=test" in self.refuse(capsys, made, at, out="out", k=5, users="new.csv", split="test")

    def test_lists_longer_than_the_catalogue(self, made, at, capsys):
        line = self.refuse(capsys, made, at, out="out", k=33)
        assert "--k=33" in line
        assert "32 items" in line

    @pytest.mark.parametrize("out", ["taken", "taken/precious.txt", "taken/precious.txt/out"])
    def test_an_output_that_is_something_else(self, out, made, at, capsys):
        assert "taken" in self.refuse(capsys, made, at, out=out, k=5)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(made, at, capsys):
    """The damaged one is named and moved aside as it is; the run ends as it did."""
    shutil.copytree(made.workdir, at / "run")
    damage_arrays(at / "run", "optimizer", "truncated")
    before = digest(at / "run" / "checkpoints" / str(STEPS))
    assert dynrec("train", config=made.experiment, workdir="run") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert len(told) == 1
    assert f"checkpoints/{STEPS}: is damaged" in told[0]
    assert f"going on from step {STEPS // 2}" in told[0]
    assert digest(at / "run" / "damaged" / str(STEPS)) == before
    ours, theirs = workdirs.open(at / "run", "last"), workdirs.open(made.workdir, "last")
    for x, y in zip(jax.tree.leaves(ours.tables), jax.tree.leaves(theirs.tables), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_without_a_good_checkpoint_is_refused_and_left_alone(made, at, capsys):
    shutil.copytree(made.workdir, at / "run")
    for step in (STEPS // 2, STEPS):
        damage_arrays(at / "run", "optimizer", "truncated", step)
    before = digest(at / "run" / "checkpoints")
    assert dynrec("train", config=made.experiment, workdir="run") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "no checkpoint is good; the newest, of step 6, is damaged" in err.splitlines()[-1]
    assert digest(at / "run" / "checkpoints") == before


def test_reads_that_a_damaged_checkpoint_never_started_are_forgotten_in_silence(at):
    """Python warns of each when it is collected, which would be after the one line."""

    def read() -> None:
        async def shard() -> None: ...

        pending = [shard(), shard()]
        raise ValueError(f"damaged, {len(pending)} to go")

    try:
        read()
    except ValueError as error:
        arrays._drop_pending(error)
    gc.collect()  # warnings are errors here


def test_a_broken_workdir_gets_one_line_from_a_process_of_its_own(made, at):
    """Nothing that Orbax or TensorStore log, or their threads print on the way out, comes on top."""
    shutil.copytree(made.workdir, at / "run")
    damage_arrays(at / "run", "model", "truncated")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(job.__file__).parents[2]),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dynrec_jax", "evaluate", "--workdir=run", f"--step={STEPS}"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "checkpoints/" in done.stderr
