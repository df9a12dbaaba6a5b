"""A worker, with trainings that do what a test needs, in this process."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.config import default_config
from dynrec_jax.errors import DataError, HeldRunError, MachineError
from dynrec_jax.sweep import over, pruned
from dynrec_jax.sweep.definition import Sweep, make
from dynrec_jax.sweep.ledger import COMPLETE, FAILED, PRUNED, RUNNING
from dynrec_jax.sweep.storage import Storage
from dynrec_jax.sweep.study import StudyLedger
from dynrec_jax.sweep.supervisor import MOST_FAULTS, Member, Supervisor
from dynrec_jax.sweep.worker import Worker

METRIC = "ndcg@10"
Train = Callable[[Any, Path, Any], dict[str, Any]]


def sweep_of(trials: int, steps: int = 20, pruner: str = "none") -> Sweep:
    c = default_config()
    c.train.steps, c.train.evaluate_every = steps, 5
    return make(c, pruned(over("seed", range(trials)), pruner))


def trained(folder: Path, step: int, value: float) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": step, f"validation/{METRIC}": value, "validation/mrr": value / 2}) + "\n"
        )
    return {"step": step, "best": value, "best_step": step}


def work(path: Path, sweep: Sweep, train: Train) -> StudyLedger:
    ledger = StudyLedger(sweep, Storage(f"sqlite:///{path / 'sweep.db'}"), "test", path, 60.0)
    worker = Worker(sweep, ledger, path, train, 60.0, lambda line: sys.stdout.write(line + "\n"))
    worker.run()
    return ledger


def test_metrics_are_those_of_the_best_step_and_logs_are_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
        sys.stdout.write(f"seed {config.seed} trains\n")
        os.write(2, b"a library warns\n")
        for step, value in ((5, 0.25), (10, 0.75), (20, 0.5)):
            assert watch(step, value) is None
            trained(folder, step, value)
        return {"step": 20, "best": 0.75, "best_step": 10}

    with capfd.disabled():  # pytest's own standard output is not the process's
        rows = work(tmp_path, sweep_of(2), train).rows()
    assert [(row.state, row.value, row.step, row.metrics["mrr"]) for row in rows] == [
        (COMPLETE, 0.75, 10, 0.375)
    ] * 2
    log = (tmp_path / "logs" / "0001.log").read_text()
    assert "trial 1: seed=1" in log
    assert "seed 1 trains" in log
    assert "a library warns" in log


def test_a_trial_that_fails_says_why_and_the_next_one_is_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = [DataError("the dataset is gone"), ValueError("a bug\nof two lines"), MemoryError()]

    def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
        if config.seed < 3:
            raise faults[config.seed]
        return trained(folder, 20, 0.5)

    with capfd.disabled():
        rows = work(tmp_path, sweep_of(4), train).rows()
    assert [row.state for row in rows] == [FAILED, FAILED, FAILED, COMPLETE]
    assert rows[0].reason == "the dataset is gone"
    assert rows[1].reason == "ValueError: a bug of two lines (logs/0001.log)"
    assert "MemoryError" in rows[2].reason
    assert "Traceback" in (tmp_path / "logs" / "0001.log").read_text()


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left"), MachineError("the disk is full")])
def test_a_fault_of_the_machine_is_not_the_trial_s(tmp_path: Path, fault: Exception) -> None:
    def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
        raise fault

    with pytest.raises(MachineError):
        work(tmp_path, sweep_of(2), train)
    ledger = work(tmp_path, sweep_of(2), lambda config, folder, watch: trained(folder, 20, 0.5))
    assert [(row.state, row.attempts) for row in ledger.rows()] == [(COMPLETE, 2), (COMPLETE, 1)]


def test_a_folder_that_somebody_holds_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynrec_jax.sweep.worker.IDLE_SECONDS", 0.01)
    calls = iter([True])

    def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
        if next(calls, False):
            raise HeldRunError("another process trains there")
        return trained(folder, 20, 0.5)

    assert [(row.state, row.attempts) for row in work(tmp_path, sweep_of(1), train).rows()] == [(COMPLETE, 2)]


def test_pruned_at_once_and_never_at_the_end(tmp_path: Path) -> None:
    def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
        for step in (5, 10, 15, 20):
            value = (step if config.seed < 5 or step == 20 else 0) / 100 - config.seed / 1000
            standing = trained(folder, step, value)
            if watch(step, value):
                return standing
        return standing

    rows = work(tmp_path, sweep_of(7, pruner="median"), train).rows()
    assert [row.state for row in rows] == [COMPLETE] * 4 + [PRUNED] * 3
    assert rows[6].reason == "median: behind the others at step 5"


def test_one_that_ended_by_itself_is_complete(tmp_path: Path) -> None:
    def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
        standing = trained(folder, 5, 1.0 - config.seed / 10)
        watch(5, 1.0 - config.seed / 10)
        return {**standing, "stopped": "no better ndcg@10"}

    rows = work(tmp_path, sweep_of(8, pruner="median"), train).rows()
    assert {row.state for row in rows} == {COMPLETE}


def test_a_trial_that_was_given_up_and_killed_is_not_trained_again(tmp_path: Path) -> None:
    sweep = sweep_of(6, pruner="median")
    ledger = StudyLedger(sweep, Storage(f"sqlite:///{tmp_path / 'sweep.db'}"), "test", tmp_path, 60.0)
    for value in (0.9, 0.8, 0.7, 0.6, 0.9, 0.5):
        task = ledger.claim()
        assert task is not None
        trained(tmp_path / task.folder, 5, value)
        if not ledger.report(task, 5, value):
            ledger.finish(task, COMPLETE, 5, {METRIC: value})
    assert [row.state for row in ledger.rows()] == [COMPLETE] * 5 + [RUNNING]
    ledger.release(task)

    def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
        raise AssertionError("it is trained")

    rows = work(tmp_path, sweep, train).rows()
    assert (rows[5].state, rows[5].step, rows[5].value) == (PRUNED, 5, 0.5)


def supervised(path: Path, program: str) -> Supervisor:
    sweep = sweep_of(2)
    ledger = StudyLedger(sweep, Storage(f"sqlite:///{path / 'sweep.db'}"), "test", path, 60.0)
    member = Member(0, [sys.executable, "-c", program], {}, path / "log")
    return Supervisor(sweep, ledger, path, [member], lambda rows: None)


def test_a_worker_that_cannot_work_here_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynrec_jax.sweep.supervisor.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("dynrec_jax.sweep.supervisor.LOOK_SECONDS", 0.05)
    with pytest.raises(MachineError, match=r"worker 0 cannot work here: .*the disk is full"):
        supervised(tmp_path, "print('the disk is full'); raise SystemExit(1)").run()
    assert (tmp_path / "log").read_text().count("the disk is full") == MOST_FAULTS


def test_a_worker_that_ends_while_there_is_work_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynrec_jax.sweep.supervisor.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("dynrec_jax.sweep.supervisor.LOOK_SECONDS", 0.05)
    # As if it had been asked to end: it says it is fine, and nothing is done. At last something is wrong.
    with pytest.raises(MachineError):
        supervised(tmp_path, "print('ended')").run()
    assert (tmp_path / "log").read_text().count("ended") > 1


def test_workers_end_with_their_supervisor(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "worker = 'from dynrec_jax.sweep import machines; machines.end_with_parent(); print(1, flush=True);"
        " import time; time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', worker], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    limit = time.monotonic() + 10
    while Path(f"/proc/{worker}/stat").exists() and " Z " not in Path(f"/proc/{worker}/stat").read_text():
        assert time.monotonic() < limit
        time.sleep(0.05)
