"""Workers that are killed and stopped at random moments: no trial is lost, done twice, or left running for ever."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynrec_jax.config import default_config
from dynrec_jax.files import write_whole
from dynrec_jax.sweep import over, product
from dynrec_jax.sweep.definition import Sweep, make
from dynrec_jax.sweep.ledger import COMPLETE, Row
from dynrec_jax.sweep.storage import Storage
from dynrec_jax.sweep.study import StudyLedger
from tests.sweep.pretend import METRIC, result

PROGRAM = Path(__file__).with_name("pretend.py")
GRACE = 3.0
STEPS = 40
DEADLINE = 400.0


class Crew:
    """Workers in processes of their own; whoever dies is replaced as long as there is work."""

    def __init__(self, workdir: Path, storage: str, size: int):
        self.workdir, self._storage = workdir, storage
        self._log = (workdir / "log").open("ab")
        self.processes = [self.start() for _ in range(size)]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(PROGRAM), str(self.workdir), self._storage, str(GRACE)]
        return subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)

    def replace(self) -> list[int]:
        """Starts new ones for those that were killed; returns how others ended."""
        ended = []
        for place, process in enumerate(self.processes):
            status = process.poll()
            if status is not None and status < 0:
                self.processes[place] = self.start()
            elif status is not None:
                ended.append(status)
        return ended

    @property
    def alive(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self._log.close()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Callable[[str, int, Sweep], Crew]]:
    made = []

    def start(storage: str, size: int, sweep: Sweep) -> Crew:
        write_whole(tmp_path / "sweep.json", json.dumps(sweep.plain()))
        made.append(Crew(tmp_path, storage, size))
        return made[-1]

    yield start
    for each in made:
        each.end()


def sweep_of(rates: int, seeds: int) -> Sweep:
    base = default_config()
    base.train.steps = STEPS
    rates_ = [0.002 * (n + 1) for n in range(rates)]
    return make(base, product(over("train.learning_rate", rates_), over("seed", range(seeds))))


def watch(crew: Crew, ledger: StudyLedger, between: Callable[[], None], seconds: float) -> list[Row]:
    """Does something every few moments until all trials have ended; whoever is killed is replaced."""
    limit = time.monotonic() + DEADLINE
    while not ledger.done():
        assert time.monotonic() < limit, [row for row in ledger.rows() if row.state != COMPLETE]
        between()
        assert set(crew.replace()) <= {0}, (crew.workdir / "log").read_text()[-3000:]
        time.sleep(seconds)
    return ledger.rows()


def check(rows: list[Row], sweep: Sweep) -> None:
    """Every trial is there once, complete, with what an undisturbed one measures."""
    assert [row.number for row in rows] == list(range(sweep.total))
    assert {row.state for row in rows} == {COMPLETE}
    assert len({sweep.identity(row.point) for row in rows}) == sweep.total
    for row in rows:
        expected = result(row.point["train.learning_rate"], row.point["seed"], STEPS)
        assert row.metrics[METRIC] == expected, row


def kill_many(crew: Crew, ledger: StudyLedger, kills: int, seed: int) -> tuple[list[Row], int]:
    """Kills workers at random moments, and stops some for longer than the grace period."""
    rng = random.Random(seed)
    left, stopped, stops = kills, [], 0

    def disturb() -> None:
        nonlocal left, stops
        for since, process in list(stopped):
            if time.monotonic() - since > 1.5 * GRACE:
                stopped.remove((since, process))
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
        held = {process.pid for _, process in stopped}
        able = [process for process in crew.alive if process.pid not in held]
        if not able:
            return
        victim = rng.choice(able)
        if left and rng.random() < 0.8:
            victim.kill()
            victim.wait()
            left -= 1
        elif not stopped and stops < max(2, kills // 10):
            with ledger.storage.locked():  # of those who are stopped inside the lock, a test of its own tells
                victim.send_signal(signal.SIGSTOP)
            stopped.append((time.monotonic(), victim))
            stops += 1

    rows = watch(crew, ledger, disturb, rng.uniform(0.3, 0.6))
    for _, process in stopped:
        process.send_signal(signal.SIGCONT)
    # A worker that wakes up when all is done, or comes late, ends as if it had come in time.
    late = crew.start()
    for process in [late, *crew.alive]:
        assert process.wait(60) == 0, (crew.workdir / "log").read_text()[-3000:]
    return rows, kills - left


@pytest.mark.parametrize(
    "kills", [6, *(pytest.param(number, marks=pytest.mark.slow) for number in (30, 100))]
)
def test_killed_and_stopped_workers_lose_nothing(
    tmp_path: Path, crew: Callable[[str, int, Sweep], Crew], kills: int
) -> None:
    sweep, storage = sweep_of(5, 2 + kills // 5), f"sqlite:///{tmp_path / 'sweep.db'}"
    workers = crew(storage, 8, sweep)
    ledger = StudyLedger(sweep, Storage(storage), "pretended", tmp_path, GRACE)
    rows, killed = kill_many(workers, ledger, kills, seed=kills)
    check(rows, sweep)
    assert killed == kills
    assert sum(row.attempts - 1 for row in rows) >= kills // 3  # most met a worker at work


@pytest.mark.slow
def test_four_workers_on_postgres_of_which_two_are_killed(
    tmp_path: Path, crew: Callable[[str, int, Sweep], Crew], postgres_address: str
) -> None:
    sweep = sweep_of(4, 4)
    workers = crew(postgres_address, 4, sweep)
    ledger = StudyLedger(sweep, Storage(postgres_address), "pretended", tmp_path, GRACE)
    left = 2

    def kill() -> None:
        nonlocal left
        if left and sum(row.state == COMPLETE for row in ledger.rows()) >= 3 * (3 - left):
            victim = workers.alive[left]
            victim.kill()
            victim.wait()
            left -= 1

    check(watch(workers, ledger, kill, 0.2), sweep)
    assert left == 0


@pytest.mark.slow
def test_a_stopped_worker_loses_its_trial_and_writes_nothing_when_it_wakes_up(
    tmp_path: Path, crew: Callable[[str, int, Sweep], Crew]
) -> None:
    sweep, storage = sweep_of(1, 1), f"sqlite:///{tmp_path / 'sweep.db'}"
    workers = crew(storage, 1, sweep)
    ledger = StudyLedger(sweep, Storage(storage), "pretended", tmp_path, GRACE)
    while not ledger.rows()[0].step:
        time.sleep(0.05)
    (stopped,) = workers.processes
    with ledger.storage.locked():  # not while it holds the lock itself
        stopped.send_signal(signal.SIGSTOP)
    workers.processes.append(workers.start())
    rows = watch(workers, ledger, lambda: None, 0.2)
    check(rows, sweep)
    assert (rows[0].attempts, rows[0].folder) == (2, "trials/0000-2")
    assert len(list((tmp_path / "trials/0000-2/checkpoints").iterdir())) == STEPS // 5
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(30) == 0
    assert "another worker has taken it over" in (tmp_path / "logs" / "0000.log").read_text()
    check(ledger.rows(), sweep)


def test_a_worker_that_is_asked_to_end_gives_its_trial_back(
    tmp_path: Path, crew: Callable[[str, int, Sweep], Crew]
) -> None:
    sweep, storage = sweep_of(2, 1), f"sqlite:///{tmp_path / 'sweep.db'}"
    workers = crew(storage, 1, sweep)
    ledger = StudyLedger(sweep, Storage(storage), "pretended", tmp_path, GRACE)
    while not ledger.rows()[0].step:
        time.sleep(0.05)
    workers.processes[0].terminate()
    assert workers.processes[0].wait(30) == 0
    task = ledger.claim()
    assert task is not None
    assert (task.number, task.attempt) == (0, 2)
    assert "given back" in (tmp_path / "logs" / "0000.log").read_text()
