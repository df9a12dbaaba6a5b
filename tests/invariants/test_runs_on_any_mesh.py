"""Whole runs by the command line: one device, eight in three splits, two processes of four; dropout on.

The same batches, losses, metrics, weights and lists; and a checkpoint of one opens on every other.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from dynrec_jax import workdir
from dynrec_jax.cli import main
from dynrec_jax.errors import AGAIN
from dynrec_jax.train.hooks import CLOCK

from ..commands import experiment

ROOT = Path(__file__).resolve().parents[2]
USERS, ITEMS = 96, 120
STEPS = 20
MESHES = {"1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1)}
SCORED = ("1", "2x2x2")  # all runs are scored on one mesh of the devices there are, so two of them will do
RUN = {
    "model__dropout": 0.2,
    "model__heads": 2,
    "data__windows": "random",
    "train__steps": STEPS,
    "train__accumulation": 2,  # which windows make a part depends on the mesh, and no number may
    "train__checkpoint_every": 8,
    "train__evaluate_every": 10,
    "logging__every": 1,
    "evaluation__batch_size": 16,
}
# Mesh and number of processes change the order in which float32 numbers are added up, and nothing else. That moves a
# loss by about 1e-7 of it (2^-24 is 6e-8), and 20 steps of Adam, at a rate of 1e-2, carry it into the weights, whose
# elements are about 0.1 to 1. A wrong mask, key or row moves them by 1e-3 and more.
LOSS, WEIGHT, SCORE = 2e-6, 5e-5, 1e-4


class Ran(NamedTuple):
    """A run folder, what `evaluate` said, and the lists that `score` wrote, where it was called."""

    workdir: Path
    evaluation: dict
    lists: dict


def environment(devices: int, **more: str) -> dict[str, str]:
    """Of a command of its own, with that many simulated devices."""
    return {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "DYNREC_VENV": sys.prefix,
        **more,
    }


def commands(folder: Path, name: str, config: Path, sizes: tuple[int, ...]) -> list[list[str]]:
    mesh = [
        f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)
    ]
    workdir = f"--workdir={folder / name}"
    return [
        ["train", f"--config={config}", *mesh, workdir],
        ["evaluate", workdir],
        ["score", workdir, f"--out={folder / name}-lists", "--k=20", "--filter_seen"],
    ]


def ran(folder: Path, name: str) -> Ran:
    if not (folder / f"{name}-lists").exists():
        return Ran(folder / name, {}, {})
    evaluation = json.loads((folder / name / "evaluation" / "test.json").read_text())
    return Ran(folder / name, evaluation, pq.read_table(folder / f"{name}-lists").to_pydict())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a dataset of 8 shards, and an experiment file."""
    folder = tmp_path_factory.mktemp("meshes")
    return folder, experiment(folder / "experiment.py", prepare(folder / "dataset", seed=0), **RUN)


def prepare(out: Path, seed: int) -> Path:
    """Histories of 3 to 16 events, so that evaluation compiles for one length; each item leads to a few others."""
    rng = random.Random(seed)
    lines = []
    for user in range(USERS):
        items = [rng.randrange(ITEMS)]
        while len(items) < 3 + user % 14:
            items.append((items[-1] * 7 + rng.randrange(3)) % ITEMS)
        lines.append(" ".join([f"u{user}", *(f"i{item}" for item in items)]))
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    command = ["prepare", f"--source=sequences:{out.with_suffix('.txt')}", "--shards=8", f"--out={out}"]
    assert main(command) == 0
    return out


class Runs(dict[str, Ran]):
    """By mesh, each in a process of its own, when it is first asked for."""

    def __init__(self, folder: Path, config: Path):
        self._folder, self._config = folder, config

    def __missing__(self, name: str) -> Ran:
        called = commands(self._folder, name, self._config, MESHES[name])[: 3 if name in SCORED else 1]
        script = f"import sys; from dynrec_jax.cli import main; sys.exit(any(main(c) for c in {called!r}))"
        call([sys.executable, "-c", script], environment(int(np.prod(MESHES[name]))))
        self[name] = ran(self._folder, name)
        return self[name]


@pytest.fixture(scope="module")
def runs(prepared: tuple[Path, Path]) -> Runs:
    return Runs(*prepared)


@pytest.fixture(scope="module")
def in_two_processes(prepared: tuple[Path, Path]) -> Ran:
    """By the launcher that users have."""
    if not (Path(sys.prefix) / "dynrec.stamp").exists():
        pytest.skip("this environment was not made by launch/environment.sh, which launch/local.sh uses")
    folder, config = prepared
    for arguments in commands(folder, "2x4", config, (-1, 1, 1)):
        call(["bash", str(ROOT / "launch" / "local.sh"), "2", *arguments], environment(4))
    return ran(folder, "2x4")


def call(command: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(run: Ran) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same_run(run: Ran, one: Ran) -> None:
    """Losses, gradients' norms and validation of every step, test metrics, weights, and every user's list."""
    lines, expected = metrics(run), metrics(one)
    assert len([line for line in expected if "loss" in line]) == STEPS
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, want in zip(lines, expected, strict=True):
        for key, value in want.items():
            np.testing.assert_allclose(line[key], value, rtol=LOSS, err_msg=f"step {want['step']}: {key}")
    if run.lists:
        assert run.evaluation == one.evaluation
        assert_same_lists(run.lists, one.lists)
    opened, opened_one = workdir.open(run.workdir, "last"), workdir.open(one.workdir, "last")
    for x, y in zip(
        jax.tree.leaves((opened.params, opened.tables)),
        jax.tree.leaves((opened_one.params, opened_one.tables)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=WEIGHT)


def assert_same_lists(lists: dict, expected: dict) -> None:
    """The same items with the same scores; two change places only where their scores are equal up to rounding."""
    assert lists["user_id"] == expected["user_id"]
    same = 0
    for items, scores, others, their in zip(
        lists["item_ids"], lists["scores"], expected["item_ids"], expected["scores"], strict=True
    ):
        np.testing.assert_allclose(scores, their, rtol=0, atol=SCORE)
        by_item = dict(zip(others, their, strict=True))
        for item, score in zip(items, scores, strict=True):
            # An item that the other list has not was as good as its last, up to rounding.
            assert abs(score - by_item.get(item, their[-1])) <= SCORE, item
        same += sum(one == other for one, other in zip(items, others, strict=True))
    assert same >= 0.99 * sum(map(len, lists["item_ids"]))


# A step on each of these meshes is compared in test_mesh.py by default.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["2x2x2", "8x1x1", "1x8x1"])
def test_a_run_is_the_same_on_eight_devices(runs: Runs, name: str):
    assert_same_run(runs[name], runs["1"])


# The same of single steps is compared in test_mesh.py by default.
@pytest.mark.slow
def test_a_run_is_the_same_in_two_processes(runs: Runs, in_two_processes: Ran):
    assert_same_run(in_two_processes, runs["1"])


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_scored_on_one_device(in_two_processes: Ran, tmp_path: Path):
    run = in_two_processes
    _, _, score = commands(tmp_path, "lists", Path(), (1, 1, 1))
    score = ["score", f"--workdir={run.workdir}", *score[2:]]
    call([sys.executable, "-m", "dynrec_jax", *score], environment(1))
    lists = pq.read_table(tmp_path / "lists-lists").to_pydict()
    assert_same_lists(lists, run.lists)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2x2x2", "1"])
def test_a_run_in_two_processes_is_gone_on_with_elsewhere(
    runs: Runs, in_two_processes: Ran, prepared: tuple[Path, Path], tmp_path: Path, name: str
):
    """From the checkpoint of step 8 or 16, whichever was kept before the last: same batches, same state."""
    shutil.copytree(in_two_processes.workdir, tmp_path / "moved")
    steps = sorted(int(path.name) for path in (tmp_path / "moved" / "checkpoints").iterdir())
    assert steps[-1] == STEPS
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / str(STEPS))
    sizes = MESHES[name]
    train, evaluate, score = commands(tmp_path, "moved", prepared[1], sizes)
    script = (
        f"import sys; from dynrec_jax.cli import main; "
        f"sys.exit(any(main(c) for c in {[train, evaluate, score]!r}))"
    )
    call([sys.executable, "-c", script], environment(int(np.prod(sizes))))
    assert_same_run(ran(tmp_path, "moved"), runs["1"])


def start(arguments: list[list[str]], present: int | None = None) -> list[tuple[int, str, float]]:
    """Exit status, last line and seconds of `dynrec` processes of one run, the first `present` of them started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(arguments))}
    began = time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dynrec_jax", *given],
            env=environment(4, **shared, JAX_PROCESS_ID=str(index)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, given in enumerate(arguments[:present])
    ]
    said = [process.communicate(timeout=120) for process in started]
    return [
        (process.returncode, err.strip().splitlines()[-1] if err.strip() else "", time.monotonic() - began)
        for process, (_, err) in zip(started, said, strict=True)
    ]


class TestRefusals:
    """Before the first step, in one line, by all processes; nothing is left on the disk."""

    def test_different_configs(self, prepared, tmp_path):
        train = ["train", f"--config={prepared[1]}", f"--workdir={tmp_path / 'run'}"]
        ended = start([train, [*train, "--config.train.learning_rate=0.5"]])
        for status, line, _ in ended:
            assert status == 2
            assert "config.train.learning_rate is 0.01 in process 0 and 0.5 in process 1" in line
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_different_dataset_folders(self, prepared, tmp_path):
        prepare(tmp_path / "other", seed=1)
        train = ["train", f"--config={prepared[1]}", f"--workdir={tmp_path / 'run'}"]
        ended = start([train, [*train, f"--config.dataset={tmp_path / 'other'}"]])
        for status, line, _ in ended:
            assert status == 2
            assert "the processes differ: content of the dataset folder is" in line
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_a_mistake_of_one_process(self, prepared, tmp_path):
        train = ["train", f"--config={prepared[1]}", f"--workdir={tmp_path / 'run'}"]
        ended = start([train, [*train, "--config.dataset=nowhere"]])
        for status, line, _ in ended:
            assert status == 2
            assert line.startswith("dynrec: process 1: nowhere")
        assert not (tmp_path / "run").exists()

    def test_a_run_folder_that_is_not_shared(self, prepared, tmp_path):
        runs = [
            ["train", f"--config={prepared[1]}", f"--workdir={tmp_path / name}"] for name in ("one", "other")
        ]
        for status, line, _ in start(runs):
            assert status == 2
            assert "this process does not see what process 0 writes there" in line
        assert not any(path.name.startswith(".shared") for path in (tmp_path / "one").iterdir())

    def test_a_verb_of_one_process(self, tmp_path):
        prepare = ["prepare", "--source=synthetic:users=9,items=20,seed=0", f"--out={tmp_path / 'dataset'}"]
        for status, line, _ in start([prepare, prepare]):
            assert status == 2
            assert "prepare runs in one process" in line
        assert not (tmp_path / "dataset").exists()

    @pytest.mark.slow
    def test_a_process_that_never_comes(self, prepared, tmp_path):
        train = ["train", f"--config={prepared[1]}", f"--workdir={tmp_path / 'run'}"]
        ((status, line, seconds),) = start([train, train], present=1)
        assert status == 1
        assert "process 1 of 2 did not come within 45 s" in line
        assert seconds < 60
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_stopped_leaves_no_process(
    prepared: tuple[Path, Path], tmp_path: Path, how: signal.Signals
):
    train = [
        "train",
        f"--config={prepared[1]}",
        "--config.train.steps=100000",
        f"--workdir={tmp_path / 'run'}",
    ]
    launcher = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "local.sh"), "2", *train],
        env=environment(4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (tmp_path / "run" / "checkpoints" / "8").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    running = subprocess.run(
        ["pgrep", "-f", f"workdir={tmp_path / 'run'}"], capture_output=True, text=True, check=True
    )
    launcher.send_signal(how)
    assert launcher.wait(timeout=30) == AGAIN
    left = subprocess.run(
        ["pgrep", "-f", f"dynrec.*workdir={tmp_path / 'run'}"], capture_output=True, check=False
    )
    assert len(running.stdout.split()) >= 3, "the launcher and two processes"
    assert left.stdout == b""
