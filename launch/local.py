"""What `local.sh` does once there is an environment: starts the processes of one run, watches and restarts them."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LOOK_SECONDS = 0.05
KILL_SECONDS = 2.0  # from SIGTERM, of a run that has failed, to SIGKILL
GOES_ON, MISTAKE = 75, 2  # exit statuses of dynrec


class Processes:
    """The processes of one start."""

    def __init__(self, number: int, arguments: Sequence[str]):
        """Starts `dynrec ARGUMENT …` that often."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        shared = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number)}
        shared.setdefault("JAX_NUM_CPU_DEVICES", "4")
        # In a group of their own: what is typed at the terminal reaches them by way of this process.
        self._all = [
            subprocess.Popen(
                ["dynrec", *arguments], env={**shared, "JAX_PROCESS_ID": str(index)}, process_group=0
            )
            for index in range(number)
        ]
        self._seen: set[int] = set()

    def look(self) -> list[int]:
        """Exit statuses of those that have ended since the last look, as a shell gives them."""
        ended = [each for each in self._all if each.pid not in self._seen and each.poll() is not None]
        self._seen.update(each.pid for each in ended)
        return [each.returncode if each.returncode >= 0 else 128 - each.returncode for each in ended]

    @property
    def left(self) -> bool:
        """Whether one has not ended yet."""
        return len(self._seen) < len(self._all)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to those that are left."""
        for each in self._all:
            if each.pid not in self._seen:
                each.send_signal(number)


class Told:
    """Which signal told this process to stop, if one has."""

    def __init__(self) -> None:
        """Takes SIGTERM and SIGINT from now on."""
        self.by: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        self.by = self.by or number


def run(number: int, arguments: Sequence[str], told: Told) -> int:
    """One start; the exit status of the first process that failed."""
    processes, status = Processes(number, arguments), 0
    signals: list[tuple[float, signal.Signals]] = []  # when which is due
    stopping = False
    while processes.left:
        now = time.monotonic()
        for one in processes.look():
            if one and (not status or (one == GOES_ON and told.by is not None)):
                # Told to stop, those that JAX has ended behind one that was through have nothing to say.
                status = one
                # What one process found, it has told the others where it could; none is left behind.
                grace = now + seconds("DYNREC_GRACE", 5.0)
                signals = signals or [(grace, signal.SIGTERM), (grace + KILL_SECONDS, signal.SIGKILL)]
        if told.by is not None and not stopping:
            stopping = True
            processes.send(signal.SIGTERM)
            signals = [(now + seconds("DYNREC_STOP", 60.0), signal.SIGKILL)]
        while signals and now >= signals[0][0]:
            processes.send(signals.pop(0)[1])
        time.sleep(LOOK_SECONDS)
    return status


def seconds(name: str, default: float) -> float:
    """A time that the environment may set."""
    return float(os.environ.get(name) or default)


def newest(workdir: Path) -> int | None:
    """The newest checkpoint of a run folder."""
    steps = [path.name for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return max(map(int, steps), default=None)


def workdir_of(arguments: Sequence[str]) -> Path | None:
    """The run folder of a training; None where it is none."""
    if arguments[:1] != ["train"]:
        return None
    named = [word.partition("=")[2] for word in arguments if word.lstrip("-").startswith("workdir=")]
    named += [value for word, value in itertools.pairwise(arguments) if word in ("--workdir", "-workdir")]
    return Path(named[-1]) if named else None


def main(number: int, arguments: Sequence[str]) -> int:
    """Starts, and a training again after a fault; returns the exit status."""
    told, workdir, vain = Told(), workdir_of(arguments), 0
    most = int(os.environ.get("DYNREC_RESTARTS") or 3)
    while True:
        before = None if workdir is None else newest(workdir)
        status = run(number, arguments, told)
        if told.by is not None:
            return status if status in (0, MISTAKE, GOES_ON) else 128 + told.by
        if workdir is None or status in (0, MISTAKE):
            return status
        after = newest(workdir)
        vain = vain + 1 if after == before else 0
        if vain >= most:
            say(f"status {status}; {vain} starts brought no new checkpoint, so there is no further one")
            return status
        place = "" if after is None else f" from step {after}"
        say(f"a process ended with status {status}; starts again{place}")


def say(text: str) -> None:
    """A line for the user."""
    sys.stderr.write(f"local: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
