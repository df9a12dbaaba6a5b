"""`dynrec sweep` as a user meets it: real trainings in processes of their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.config import difference
from dynrec_jax.sweep.storage import Storage
from dynrec_jax.sweep.study import StudyLedger
from dynrec_jax.train.hooks import CLOCK
from tests.commands import SHARDS, dynrec, one_line
from tests.commands import experiment as plain_experiment


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "dataset"
    assert dynrec("prepare", source="synthetic:users=60,items=32,seed=0", out=folder, shards=SHARDS) == 0
    return folder


def experiment(path: Path, dataset: Path, sweep: str, **changes: Any) -> Path:
    plain_experiment(path, dataset, **{"train__evaluate_every": 2, "train__checkpoint_every": 2, **changes})
    text = (
        "from dynrec_jax.sweep import choice, over, product, pruned, real, search, when, zip_\n"
        + path.read_text()
    )
    path.write_text(f"{text}\n\ndef get_sweep():\n    return {sweep}\n")
    return path


def environment() -> dict[str, str]:
    """As a user's, with programs that compile quickly; one device, and nothing of this test's own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NPROC", "DYNREC_STORAGE")}
    return {**kept, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def command(verb: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "dynrec_jax", verb, *flags]


def run(verb: str, *flags: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(verb, *flags), env={**environment(), **changes}, capture_output=True, text=True, timeout=500
    )


def table(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def told(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, without what differs between runs that are the same."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def check_whole(rows: list[dict[str, str]], trials: int) -> None:
    assert [row["trial"] for row in rows] == [str(number) for number in range(trials)]
    assert {row["state"] for row in rows} == {"complete"}
    tried = ("train.learning_rate", "model.layers", "seed")
    assert len({tuple(row.get(key) for key in tried) for row in rows}) == trials
    assert all(float(row["ndcg@10"]) >= 0 for row in rows)


def check_best(workdir: Path, tmp_path: Path) -> None:
    """The best config, trained by itself, gives what its trial gave, bit for bit."""
    done = run("train", f"--config={workdir / 'best.py'}", f"--workdir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    number = int((workdir / "best.py").read_text().split("trial ")[1].split(" ")[0])
    trial = workdir / "trials" / f"{number:04d}"
    assert told(tmp_path / "again") == told(trial)
    configs = [workdirs.open_config(path) for path in (tmp_path / "again", trial)]
    assert difference(*configs) == []


RATES = 'over("train.learning_rate", [1e-3, 1e-2])'
GRIDS = {2: RATES, 12: f'product({RATES}, over("model.layers", [1, 2]), over("seed", range(3)))'}  # by trials


@pytest.mark.parametrize("trials", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_grid_with_two_workers(tmp_path: Path, dataset: Path, trials: int) -> None:
    config, workdir = experiment(tmp_path / "e.py", dataset, GRIDS[trials]), tmp_path / "grid"
    flags = [f"--config={config}", f"--workdir={workdir}"]
    done = run("sweep", *flags, "--workers=2")
    assert done.returncode == 0, done.stderr
    assert f"{trials} trials: {trials} complete" in done.stdout
    rows = table(workdir)
    check_whole(rows, trials)
    for row in rows:
        run_ = workdirs.open_config(workdir / row["folder"])
        assert run_.train.learning_rate == float(row["train.learning_rate"])
        measured = {line["step"]: line.get("validation/ndcg@10") for line in told(workdir / row["folder"])}
        assert float(row["ndcg@10"]) == measured[int(row["best_step"])]
        assert float(row["ndcg@10"]) == max(value for value in measured.values() if value is not None)
    check_best(workdir, tmp_path)
    # The same command again: there is nothing to do, and nothing is done.
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("trials/*/metrics.jsonl")}
    again = run("sweep", *flags)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("trials/*/metrics.jsonl")} == before
    # Another space on the same study is refused, with what differs.
    text = config.read_text().replace("1e-2", "2e-2")
    config.write_text(text)
    other = run("sweep", *flags)
    assert other.returncode == 2
    assert "train.learning_rate: 0.01 -> 0.02" in other.stderr
    assert other.stderr.count("\n") == 1


# Shells have what they start in the background ignore interrupts, these tests perhaps among it.
INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
LONG = {"train__steps": 120, "train__checkpoint_every": 10, "train__evaluate_every": 60}


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(tmp_path: Path, dataset: Path) -> None:
    config = experiment(tmp_path / "e.py", dataset, 'over("seed", range(2))', **LONG)
    workdir = tmp_path / "interrupted"
    flags = [f"--config={config}", f"--workdir={workdir}"]
    first = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *command("sweep", *flags)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = workdir / "trials" / "0000" / "checkpoints"
    limit = time.monotonic() + 120
    while not (saved.exists() and any(path.name.isdigit() for path in saved.iterdir())):
        assert first.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert "the same command goes on" in err
    row = StudyLedger(
        sweep_of(workdir), Storage(f"sqlite:///{workdir / 'sweep.db'}"), "interrupted", workdir, 60.0
    ).rows()[0]
    assert row.state == "running"
    assert subprocess.run(["pgrep", "-f", str(workdir)], capture_output=True).returncode == 1, (
        "a worker is left"
    )
    second = run("sweep", *flags)
    assert second.returncode == 0, second.stderr
    assert [row["attempts"] for row in table(workdir)] == ["2", "1"]
    log = (workdir / "logs" / "0000.log").read_text()
    assert "given back" in log
    alone = run("train", f"--config={config}", f"--workdir={tmp_path / 'alone'}")
    assert alone.returncode == 0
    assert told(tmp_path / "alone") == told(workdir / "trials" / "0000")


def sweep_of(workdir: Path) -> Any:
    from dynrec_jax.sweep.definition import from_plain, read

    return from_plain(read(workdir / "sweep.json"), str(workdir))


@pytest.mark.slow
def test_failed_and_pruned_trials_say_why_and_end_nothing(tmp_path: Path, dataset: Path) -> None:
    bad = '[{"train.learning_rate": 1e30, "train.clip_norm": 0.0}, {"seed": 5, "train.learning_rate": 1e-12}]'
    sweep = f'pruned(over("seed", range(4)) + {bad}, "median")'
    config = experiment(tmp_path / "e.py", dataset, sweep, train__steps=8)
    workdir = tmp_path / "mixed"
    done = run("sweep", f"--config={config}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    rows = table(workdir)
    states = [row["state"] for row in rows]
    assert states.count("failed") == 1
    assert states[4] == "failed"
    assert "step" in rows[4]["reason"]
    assert states[:4] == ["complete"] * 4
    assert states[5] == "pruned"
    assert "median: behind the others" in rows[5]["reason"]
    assert rows[4]["reason"] in (workdir / "logs" / "0004.log").read_text()
    assert (workdir / "logs" / "0005.log").stat().st_size
    assert "trial 4 failed" in done.stdout


@pytest.mark.slow
def test_shards_of_a_grid_make_one_table(tmp_path: Path, dataset: Path) -> None:
    config = experiment(tmp_path / "e.py", dataset, 'over("seed", range(3))')
    workdir = tmp_path / "shards"
    for index in range(2):
        done = run("sweep", f"--config={config}", f"--workdir={workdir}", f"--shard={index}/2")
        assert done.returncode == 0, done.stderr
        states = [row["state"] for row in table(workdir)]
        assert states == ["complete", "complete" if index else "waiting", "complete"]
    assert not (workdir / "sweep.db").exists()
    assert (workdir / "best.py").exists()


@pytest.mark.slow
def test_four_processes_on_postgres_of_which_two_are_killed(
    tmp_path: Path, dataset: Path, postgres_address: str
) -> None:
    config = experiment(tmp_path / "e.py", dataset, GRIDS[12], train__steps=30)
    workdir = tmp_path / "killed"
    flags = [f"--config={config}", f"--workdir={workdir}", "--grace=10"]
    crew = [
        subprocess.Popen(
            command("sweep", *flags),
            env={**environment(), "DYNREC_STORAGE": postgres_address},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(4)
    ]
    for count, victim in ((2, crew[0]), (5, crew[1])):
        while len(list(workdir.glob("trials/*/checkpoints/*"))) < 2 * count:
            time.sleep(0.2)
        victim.kill()
        victim.wait()
    for process in crew[2:]:
        assert process.wait(500) == 0
    rows = table(workdir)
    check_whole(rows, 12)
    taken = [row for row in rows if row["attempts"] != "1"]
    assert taken
    for row in taken:
        alone = tmp_path / f"alone-{row['trial']}"
        point = {key: row[key] for key in ("train.learning_rate", "model.layers", "seed")}
        overrides = [f"--config.{key}={value}" for key, value in point.items()]
        assert run("train", f"--config={config}", *overrides, f"--workdir={alone}").returncode == 0
        assert told(alone) == told(workdir / row["folder"])


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ('over("train.learning_ratee", [1.0])', "unknown key train.learning_ratee"),
        ("[]", "nothing to try"),
        ("search({}, trials=3)", "no keys"),
        ('over("dataset", ["elsewhere"])', "could not be compared"),
        ('over("train.batch_size", [16, 7])', "7"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    tmp_path: Path, dataset: Path, sweep: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment(tmp_path / "e.py", dataset, sweep)
    assert dynrec("sweep", config=config, workdir=tmp_path / "none") == 2
    assert told in one_line(capsys)
    assert not (tmp_path / "none").exists()


def test_a_mistake_in_the_flags_is_one_line(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment(tmp_path / "e.py", dataset, 'over("seed", range(2))')
    without = plain_experiment(tmp_path / "without.py", dataset)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    workdir = tmp_path / "none"
    for flags, told_ in (
        ({"workdir": workdir, "storage": "postgresql://me:secret@127.0.0.1:1/x"}, "cannot be opened"),
        ({"workdir": workdir, "storage": "sweep.log"}, "no database's address"),
        ({"workdir": workdir, "shard": "2/2"}, "expected i/n"),
        ({"workdir": workdir, "shard": "0/2", "storage": "sqlite:///x.db"}, "leave out"),
        ({"workdir": workdir, "workers": 0}, "workers"),
        ({"workdir": tmp_path / "other"}, "no sweep's folder"),
        ({}, "--workdir is missing"),
        ({"workdir": workdir, "config": without}, "has no function get_sweep"),
    ):
        assert dynrec("sweep", **{"config": config, **flags}) == 2
        said = one_line(capsys)
        assert told_ in said
        assert "secret" not in said
        assert not workdir.exists(), told_
