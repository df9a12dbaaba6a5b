"""Saves, each in a fork, that `kill_at.c` ends on the way: a request a line, [folder, n], a status (or a count) back.

A fork goes on with the run in the folder and saves one more step. With n = 0 nothing ends it, and the answer is the
number of calls that could have.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

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


def save(folder: str, step: int) -> None:
    """Saves one step in `folder/checkpoints`, as a run does."""
    checkpoints = Checkpoints(Path(folder) / "checkpoints", KEPT)
    assert checkpoints.save(state_of(step), step, {"step": step, "standing": {}}, None)
    checkpoints.close()


def serve() -> None:
    """Answers until the input ends."""
    for line in sys.stdin:
        folder, at = json.loads(line)
        answer, tell = os.pipe()
        if pid := os.fork():
            os.close(tell)
            with os.fdopen(answer) as file:
                count = file.read()
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            sys.stdout.write(f"{int(count) if count and at == 0 else status}\n")
            sys.stdout.flush()
            continue
        os.environ["KILL_IN"], os.environ["KILL_AT"] = folder, str(at)
        save(folder, FIRST + 1)
        os.write(tell, str(ctypes.CDLL(None).kill_at_calls()).encode())
        os._exit(0)


if __name__ == "__main__":
    serve()
