"""A run that is stuck, or loses a process, ends in all processes; one that is told to stop, stops alike in all."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from dynrec_jax.errors import AGAIN
from dynrec_jax.parallel.pulse import Seen
from dynrec_jax.parallel.watchdog import _Standing

PROLOGUE = """
import os, signal, sys, time
from pathlib import Path
from dynrec_jax.cli import _leave
from dynrec_jax.errors import DataError, Preempted
from dynrec_jax.parallel import watchdog
from dynrec_jax.parallel.processes import join
from dynrec_jax.parallel.watchdog import Watchdog

watchdog.TICK_SECONDS = 0.1
watchdog.GRACE_SECONDS = 0.5
processes = join()
index, pulse = processes.index, processes.pulse

def work(dog):
"""
EPILOGUE = """
try:
    with Watchdog(processes, float(os.environ["SECONDS"]), stops=True) as dog:
        print("watched", flush=True)
        work(dog)
except DataError as error:
    print(error, file=sys.stderr)
    os._exit(2)
except Preempted:
    os._exit(75)
"""


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    """Kills what a test that failed leaves behind."""
    yield
    for process in Started.all:
        with process:
            process.kill()
    Started.all.clear()


class Started:
    """Real processes that run a body under a watchdog."""

    all: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, body: str, count: int, seconds: float):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        script = PROLOGUE + textwrap.indent(textwrap.dedent(body), "    ") + EPILOGUE
        shared = {
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "SECONDS": str(seconds),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", script],
                env={**shared, "JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        self.all.extend(self.processes)
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "watched\n"
        self.began = time.monotonic()

    def end(self, index: int) -> tuple[int, str, str]:
        """Exit status and what it said, on standard output and error."""
        out, err = self.processes[index].communicate(timeout=30)
        return self.processes[index].returncode, out, err


def run(body: str, count: int = 2, seconds: float = 0.0) -> list[tuple[int, str, str]]:
    started = Started(body, count, seconds)
    return [started.end(index) for index in range(count)]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_ends_the_others(stopped: int):
    body = f"""
    pulse.step = 7
    with pulse.at("evaluation"):
        time.sleep(0.5)
        if index == {stopped}:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    """
    started = Started(body, 3, seconds=2.0)
    others = [index for index in range(3) if index != stopped]
    ended = [started.end(index) for index in others]
    assert time.monotonic() - started.began < 10
    told = f"process {stopped} of 3 has not been heard of for 2 s; the last was: in evaluation after step 7"
    for status, _, err in ended:
        assert status == 1
        assert told in err
        assert "most recent call first" in err
        assert "in work" in err
    # Woken up, it ends as well: by what process 0 has sent it, or since nobody is left.
    os.kill(started.processes[stopped].pid, signal.SIGCONT)
    status, _, err = started.end(stopped)
    assert status == 1
    assert "dynrec: process" in err


def test_who_waits_in_what_may_take_long_does_not_make_it_longer():
    ended = run(
        """
        if index:
            with pulse.at("save"):
                processes.exchange(None)
        with pulse.at("data"):
            time.sleep(60)
        """,
        seconds=1.0,
    )
    for status, _, err in ended:
        assert status == 1
        assert "process 0 of 2 shows no sign of life for 1 s, in data after step 0" in err


@pytest.mark.parametrize("stuck", [0, 1])
def test_where_nobody_goes_on_the_one_is_named_for_whom_the_others_wait(stuck: int):
    ended = run(
        f"""
        for step in range(3):
            pulse.step = step
            with pulse.at("data"):
                if (step, index) == (2, {stuck}):
                    time.sleep(60)
            with pulse.at("step"):
                processes.exchange(None)
        """,
        seconds=2.0,
    )
    for status, _, err in ended:
        assert status == 1
        assert f"process {stuck} of 2 shows no sign of life for 2 s, in data after step 2; --watchdog=" in err
    assert "time.sleep" not in ended[1 - stuck][2]
    assert "in work" in ended[stuck][2]


def test_one_process_is_watched_as_well():
    ((status, _, err),) = run("with pulse.at('data'): time.sleep(60)", 1, seconds=1.0)
    assert status == 1
    assert err.startswith("dynrec: this process shows no sign of life for 1 s, in data after step 0")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Seen("step", 4), Seen("data", 4, waits=True)),
        (Seen("step", 3), Seen("data", 4)),
        (Seen("data", 4), Seen("step", 4)),
        (Seen("step", 4), Seen("save", 4)),
        (Seen("texts", 4), Seen("step", 4)),
        (Seen("evaluation", 4, beats=70), Seen("evaluation", 4, beats=71)),
    ],
)
def test_who_has_come_least_far_is_behind(one: Seen, other: Seen):
    standings = _Standing(), _Standing()
    for standing, seen in zip(standings, (one, other), strict=True):
        standing.look(seen, 0.0)
    assert standings[0].behind < standings[1].behind


def test_what_takes_its_time_is_no_alarm():
    ended = run(
        """
        time.sleep(2.5)  # the start may take ten times as long
        for _ in range(4):
            with pulse.at("data"):
                time.sleep(0.8)
        if index:
            with pulse.at("step"):
                processes.exchange(None)
        else:
            for _ in range(25):  # the other waits, and this one goes on
                pulse.beat()
                time.sleep(0.1)
            processes.exchange(None)
        """,
        seconds=1.5,
    )
    assert [(status, err) for status, _, err in ended] == [(0, "")] * 2


def test_a_compiler_has_its_own_time():
    body = """
    from dynrec_jax.parallel import pulse as module
    module.COMPILER = "<string>" if index else "nothing"  # this very file
    with pulse.at("step"):
        time.sleep(3)
    """
    assert [(status, err) for status, _, err in run(body, seconds=1.0)] == [(0, "")] * 2


def test_a_process_that_was_stopped_by_its_user_goes_on():
    body = """
    with pulse.at("data"):
        for _ in range(20):  # one long sleep would be over when it wakes up
            time.sleep(0.1)
    """
    started = Started(body, 1, seconds=3.0)
    (process,) = started.processes
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert started.end(0)[0] == 0


@pytest.mark.parametrize("which", [0, 2])
def test_an_error_ends_all_with_its_words_whatever_they_wait_for(which: int):
    body = f"""
    pulse.step = 3
    with pulse.at("data"):
        time.sleep(0.3)
        if index == {which}:
            raise ValueError("shard 5 is odd")
        time.sleep(60)
    """
    ended = run(body, 3)
    for index, (status, _, err) in enumerate(ended):
        assert status == 1
        if index == which:
            assert "Traceback" in err
        else:
            assert (
                err
                == f"dynrec: process {which} of 3 failed in data after step 3: ValueError: shard 5 is odd\n"
            )


def test_a_users_mistake_keeps_its_status():
    ended = run("if index: raise DataError('log: no such file')\ntime.sleep(60)", 2)
    assert [status for status, _, _ in ended] == [2, 2]
    assert ended[0][2] == "dynrec: process 1 of 2 failed in start after step 0: log: no such file\n"


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_vanishes_ends_the_others(which: int):
    started = Started("with pulse.at('step'): time.sleep(60)", 2, seconds=0.0)
    time.sleep(0.5)
    started.processes[which].kill()
    status, _, err = started.end(1 - which)
    assert status == 1
    assert err == f"dynrec: process {which} of 2 has ended, in step after step 0; its own log says why\n"
    assert time.monotonic() - started.began < 5


STEPS = """
while True:
    time.sleep(0.01 * (1 + index))
    processes.exchange(None)
    pulse.step += 1
    if dog.stop_here():
        print(pulse.step)
        raise Preempted
    if pulse.step == 3 and index == processes.count - 1:
        print("on the way", flush=True)
"""


@pytest.mark.parametrize("told", [[0], [2], [0, 1, 2], [1, 1, 1]])
def test_all_stop_at_the_same_point(told: list[int]):
    started = Started(STEPS, 3, seconds=0.0)
    last = started.processes[-1].stdout
    assert last is not None
    last.readline()
    for index in told:
        started.processes[index].send_signal(signal.SIGTERM)
    ended = [started.end(index) for index in range(3)]
    assert [(status, err) for status, _, err in ended] == [(AGAIN, "")] * 3
    assert len({out for _, out, _ in ended}) == 1
    assert 3 < int(ended[0][1]) < 100


@pytest.mark.parametrize("count", [1, 2])
def test_before_the_first_step_a_run_stops_at_once(count: int):
    started = Started("time.sleep(60)\n" + STEPS, count, seconds=0.0)
    started.processes[-1].send_signal(signal.SIGTERM)
    for index in range(count):
        status, _, err = started.end(index)
        assert status == AGAIN
        assert (
            err
            == "dynrec: stopped by SIGTERM before a step was done; the same command starts again, or goes on\n"
        )
    assert time.monotonic() - started.began < 10


def test_those_who_are_done_are_waited_for_by_nobody():
    ended = run("time.sleep(2.5 * index)", seconds=1.0)
    assert [(status, err) for status, _, err in ended] == [(0, "")] * 2


@pytest.mark.parametrize("done", [0, 1])
def test_told_to_stop_when_one_is_through_all_come_to_their_end(done: int):
    body = f"""
    if index != {done}:
        time.sleep(1.0)
        print(dog.stop_here())
    """
    started = Started(body, 2, seconds=0.0)
    started.processes[done].wait(10)
    started.processes[1 - done].send_signal(signal.SIGTERM)
    assert started.end(1 - done)[:2] == (0, "False\n")
