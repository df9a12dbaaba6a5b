"""A process that has imported what training needs and forks a `dynrec` command from itself whenever it is asked to.

A new Python spends seconds on importing JAX, a fork of this one milliseconds; and the fork is as new a process to the
kernel, to JAX (no backend is made before the fork) and to whoever kills it. Reads JSON lines and answers each:

    {"start": ["train", …], "log": FILE}  ->  {"pid": N}, in a process group of its own
    {"wait": N, "seconds": S}  ->  {"status": N}: negative for a signal, null where it still runs
"""

import importlib
import json
import os
import sys
import time
from typing import Any

import dynrec_jax.cli
import dynrec_jax.compiled
import dynrec_jax.train.peak

# What a command would spend its time on; pandas because pyarrow looks for it.
HEAVY = (
    "dynrec_jax.train.loop",
    "dynrec_jax.verbs.train",
    "dynrec_jax.workdir",
    "jaxlib.mlir.dialects.mhlo",
    "pandas",
)


def serve() -> dict[str, Any] | None:
    """Answers until the input ends, and returns None; in a fork, returns the request that it was forked for."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" not in request:
            answer = {"status": wait(request["wait"], request["seconds"])}
        elif pid := os.fork():
            os.setpgid(pid, pid)  # here, so that the group is there before anybody kills it
            answer = {"pid": pid}
        else:
            return request
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def wait(pid: int, seconds: float) -> int | None:
    """The exit status of a fork; None where it runs on for `seconds`."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def command(arguments: list[str], log: str) -> int:
    """Runs `dynrec` in this process; returns its exit status."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard, place in enumerate((os.open(os.devnull, os.O_RDONLY), out, out)):
        os.dup2(place, standard)
    dynrec_jax.compiled.WORTH = 0.0  # the smallest program is kept: more writes for a kill to meet
    dynrec_jax.train.peak.measured = lambda: 1e12
    return dynrec_jax.cli.main(arguments)


if __name__ == "__main__":
    for module in HEAVY:
        importlib.import_module(module)
    forked = serve()
    if forked is not None:
        sys.exit(command(forked["start"], forked["log"]))
