"""Saves, each in a fork, that `kill_at.c` meets on the way: a request a line, [folder, n, error], an answer back.

A fork goes on with the run in the folder and saves one more step. The n-th call that changes the disk fails with an
error's number, or where that is 0 ends the fork; with n = 0 none does. Where the save fails and the run would go on,
it is tried again. The answer is a Python object as JSON: `status` of the fork, and of one that ended by itself `calls`,
how many there were, and `told`: how each save ended, None where it is on the disk.
"""

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from dynrec_jax.errors import MachineError
from dynrec_jax.parallel.rows import lazy_adam
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.state import TrainState

FIRST, KEPT = 1, 1  # the step that is there, and how many are kept: the save removes it at its end


def state_of(step: int) -> TrainState:
    """A state whose every number depends on the step; its table is large enough for a file of its own."""
    rng = np.random.default_rng(step)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    tables = {"item_id": jnp.asarray(rng.normal(size=(2_000, 2)), jnp.float32)}
    opt_state = optax.adam(0.1).init({"params": params})
    return TrainState(
        jnp.int32(step), params, tables, opt_state, {"item_id": lazy_adam().init(tables["item_id"])}
    )


def save(folder: str, step: int) -> list[str | None]:
    """Saves one step in `folder/checkpoints`, as a run does; how each try ended."""
    told: list[str | None] = []
    checkpoints = Checkpoints(Path(folder) / "checkpoints", KEPT)
    for _ in range(2):
        checkpoints.save(state_of(step), step, {"step": step, "standing": {}}, None)
        checkpoints.wait()
        told.extend(full for _, full in checkpoints.poll())
        if told[-1] is None:
            break
    checkpoints.close()
    return told


def answered(folder: str, at: int, by: int) -> dict[str, Any]:
    """In the fork."""
    os.environ["KILL_IN"], os.environ["KILL_AT"] = folder, str(at)
    if by:
        os.environ["KILL_BY"] = str(by)
    try:
        told: Any = save(folder, FIRST + 1)
    except MachineError as error:
        told = [f"MachineError: {error}"]
    return {"told": told, "calls": ctypes.CDLL(None).kill_at_calls()}


def serve() -> None:
    """Answers until the input ends."""
    for line in sys.stdin:
        answer, tell = os.pipe()
        if pid := os.fork():
            os.close(tell)
            with os.fdopen(answer) as file:
                said = json.loads(file.read() or "{}")
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            sys.stdout.write(json.dumps({"status": status, **said}) + "\n")
            sys.stdout.flush()
            continue
        try:
            os.write(tell, json.dumps(answered(*json.loads(line))).encode())
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)


if __name__ == "__main__":
    serve()
