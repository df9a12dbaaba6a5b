"""Training runs as a user starts them, each in a process of its own, and what two of them must have in common."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dynrec_jax.train.hooks import CLOCK

SERVER = Path(__file__).with_name("fork_server.py")
DEADLINE = 120.0  # seconds that any one command may take


class Command:
    """A `dynrec` command under way."""

    def __init__(self, server: "Server", pid: int, log: Path):
        self._server = server
        self._log = log
        self.pid = pid

    def status(self, seconds: float = 0.0) -> int | None:
        """Its exit status (negative for a signal), waited for `seconds`; None while it runs."""
        return self._server.ask({"wait": self.pid, "seconds": seconds})["status"]

    def kill(self) -> int:
        """SIGKILL to the process and all that it started; the exit status, which is 0 where it had ended."""
        os.killpg(self.pid, signal.SIGKILL)  # a pid is given to nobody else before it was waited for
        status = self.status(DEADLINE)
        assert status is not None
        return status

    def finish(self) -> None:
        """Waits until it is through; fails with what it said if that took too long or went wrong."""
        status = self.status(DEADLINE)
        if status is None:
            self.kill()
        assert status == 0, f"exit status {status}:\n{self.said()}"

    def said(self) -> str:
        """All that went to standard output and error, of earlier commands with the same log too."""
        return self._log.read_text(encoding="utf-8", errors="replace")


class Server:
    """Starts commands; see `fork_server.py`."""

    def __init__(self, process: subprocess.Popen[str], compiled: Path):
        self._process = process
        self._compiled = compiled

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def train(self, config: Path, workdir: Path, **changes: Any) -> Command:
        """Starts `dynrec train`; `changes` are keys with `__` for the dot."""
        log = log_of(workdir)
        changes = {"compiled_dir": self._compiled, **changes}
        keys = [f"--config.{name.replace('__', '.')}={value}" for name, value in changes.items()]
        arguments = ["train", f"--config={config}", f"--workdir={workdir}", *keys]
        answer = self.ask({"start": arguments, "log": str(log)})
        return Command(self, answer["pid"], log)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server whose commands keep what they compile in `folder`, on one CPU device, killed or not."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as process:
        yield Server(process, folder)


def log_of(workdir: Path) -> Path:
    """Where all that the commands of a run said is kept."""
    return workdir.with_name(f"{workdir.name}.log")


def lines(workdir: Path) -> list[dict[str, Any]]:
    """All lines of metrics, without what the clock says."""
    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    read = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in read]


def saved(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def leaves(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name, optimizer included, read by Orbax alone."""
    found = {}
    reader = ocp.PyTreeCheckpointHandler()
    for part in ("model", "optimizer"):
        folder = checkpoint.absolute() / part
        arrays = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).tree
        )
        read = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arrays))
        for path, leaf in jax.tree_util.tree_leaves_with_path(read):
            found[part + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def assert_same_arrays(checkpoint: Path, other: Path, told: str) -> None:
    """Two checkpoints hold the same leaves, bit for bit."""
    one, two = leaves(checkpoint), leaves(other)
    assert one.keys() == two.keys(), told
    for name, array in one.items():
        assert array.dtype == two[name].dtype, f"{told}: {name}"
        assert array.tobytes() == two[name].tobytes(), f"{told}: {name}"
