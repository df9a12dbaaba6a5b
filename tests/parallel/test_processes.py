"""Processes of one run: all come or the missing one is named; what one found, all say."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from dynrec_jax.errors import ConfigError, DataError, MachineError
from dynrec_jax.parallel.processes import ALONE, Processes, join, several

PROLOGUE = """
import json, os, sys
from dynrec_jax.errors import ConfigError, DataError, MachineError, report_errors
from dynrec_jax.parallel.processes import join

def run():
    processes = join(seconds=float(os.environ["SECONDS"]))
    index = processes.index
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def launch(
    body: str, count: int, indices: tuple[int, ...], seconds: float = 20.0
) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of real processes that run `body`."""
    script = PROLOGUE + textwrap.indent(textwrap.dedent(body), "    ") + "\nsys.exit(report_errors(run))\n"
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "SECONDS": str(seconds),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in indices
    ]
    ended = [process.communicate(timeout=60) for process in started]
    return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]


def test_values_are_exchanged_in_the_order_of_the_processes():
    ended = launch(
        "print(json.dumps([processes.exchange([index, 'ä']), processes.exchange(None)]))", 3, (2, 0, 1)
    )
    for status, out, err in ended:
        assert (status, err) == (0, "")
        assert json.loads(out) == [[[0, "ä"], [1, "ä"], [2, "ä"]], [None, None, None]]


def test_one_process_fails_and_all_say_what_it_found():
    ended = launch(
        """
        def work():
            if index:
                raise DataError(f"log {index}: no such file")
            return "fine"
        processes.agree(work)
        """,
        3,
        (0, 1, 2),
    )
    assert [status for status, _, _ in ended] == [2, 2, 2]
    assert {err for _, _, err in ended} == {"dynrec: process 1: log 1: no such file\n"}


def test_a_mistake_of_ours_keeps_its_traceback_and_ends_the_others():
    (status, _, err), (other_status, _, other_err) = launch("processes.agree(lambda: {}[index])", 2, (1, 0))
    assert (status, other_status) == (1, 1)
    assert "Traceback" in err
    assert "Traceback" in other_err

    (status, _, err), (other_status, _, other_err) = launch(
        "processes.agree(lambda: {0: 'fine'}[index])", 2, (1, 0)
    )
    assert (status, other_status) == (1, 1)
    assert "Traceback" in err
    assert other_err == "dynrec: process 1: KeyError: 1\n"


def test_what_differs_is_named_in_all():
    ended = launch(
        """
        processes.check_same({"a": 1, "b": 2}, "never said")
        processes.check_same({"steps": 10 + index, "same": 0, "content": "x"}, "start all alike")
        """,
        2,
        (0, 1),
    )
    told = "dynrec: the processes differ: steps is 10 in process 0 and 11 in process 1; start all alike\n"
    assert [(status, err) for status, _, err in ended] == [(2, told)] * 2


@pytest.mark.parametrize(
    ("comes", "missing", "told"),
    [((0, 2), "process 1 of 3", "did not come within 3 s"), ((1, 2), "process 0 of 3", "did not answer at")],
)
def test_a_process_that_never_comes_is_named_in_time(comes: tuple[int, ...], missing: str, told: str):
    began = time.monotonic()
    ended = launch("raise AssertionError", 3, comes, seconds=3.0)
    assert time.monotonic() - began < 25
    for status, _, err in ended:
        assert status == 1
        assert err.startswith(f"dynrec: {missing}")
        assert told in err
        assert err.count("\n") == 1


def test_a_process_that_ends_is_noticed():
    ended = launch("processes.exchange(1) if index else sys.exit(7)", 2, (0, 1))
    assert ended[0][0] == 7
    assert ended[1][0] == 1
    assert "process 0 of 2 has ended" in ended[1][2]


def test_who_is_none_of_ours_is_passed_over_and_another_number_of_processes_is_refused():
    port = free_port()
    environment = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    script = PROLOGUE + "\nsys.exit(report_errors(run))\n"
    zero = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **environment, "SECONDS": "20"},
        stderr=subprocess.PIPE,
        text=True,
    )
    stranger = call(port)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    other = call(port)
    other.sendall(json.dumps({"process": 1, "processes": 3}).encode() + b"\n")
    answer = json.loads(other.makefile().readline())
    assert answer["fault"][0] == "ConfigError"
    assert "process 1 says that there are 3 processes, and process 0 expects 2" in answer["fault"][1]
    assert zero.communicate(timeout=30)[1] == f"dynrec: {answer['fault'][1]}\n"
    assert zero.returncode == 2
    stranger.close()
    other.close()


def call(port: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_one_process_is_alone():
    assert join({}) is ALONE
    assert join({"JAX_NUM_PROCESSES": "1"}) is ALONE
    assert not several({})
    assert several({"JAX_NUM_PROCESSES": "2"})
    assert ALONE.exchange({"a": 1}) == [{"a": 1}]
    assert ALONE.agree(lambda: 3) == 3
    ALONE.check_same({"a": 1}, "")
    with pytest.raises(DataError, match="mine"):
        ALONE.agree(fail)
    ALONE.start_jax()


def fail() -> None:
    raise DataError("mine")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': expected a number"),
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID='': expected a number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: expected 0 to 1"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "expected host:port of process 0"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "expected host:port of process 0"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(changed: dict[str, str], told: str):
    good = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    with pytest.raises(ConfigError, match=told):
        join({**good, **changed})


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        }
        with pytest.raises(MachineError, match=f"cannot listen on 127.0.0.1:{port}"):
            join(environment)


def test_a_process_is_the_first_or_not():
    assert Processes(0, 2).first
    assert not Processes(1, 2).first
