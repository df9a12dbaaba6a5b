"""A ledger without a database: a grid divided over jobs beforehand, each of which leaves its results as files.

Shard i of n does the trials i, i + n, i + 2n, …, and nobody else does: so it works on network file systems, where
SQLite does not, and a job array needs no server. A trial that has ended leaves `results/NNNN.json`; who works on one
holds its lock, which goes with the process.
"""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import IO, Any

from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.files import write_whole
from dynrec_jax.sweep.definition import Sweep
from dynrec_jax.sweep.ledger import (
    COMPLETE,
    FAILED,
    KILLER,
    MOST_DEATHS,
    RUNNING,
    UNMEASURED,
    WAITING,
    Row,
    Task,
    folder_name,
)
from dynrec_jax.sweep.space import Grid

BACK = "given back"


def parse(text: str) -> tuple[int, int]:
    """`i/n` as two numbers, i from 0; raises ConfigError."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        index, count = map(int, parts)
        if index < count:
            return index, count
    raise ConfigError(f"--shard={text}: expected i/n, a part and the number of parts, from 0/n to n-1/n")


class ShardLedger:
    """A ledger in the sweep's folder, for one part of a grid."""

    def __init__(self, sweep: Sweep, workdir: Path, index: int, count: int):
        """Raises ConfigError where the sweep is no plain grid."""
        if not isinstance(sweep.what, Grid) or sweep.what.pruner != "none":
            raise ConfigError(
                "--shard: divides a plain grid; a search, or trials that are pruned, need to know of the others: "
                "leave --shard out, and let workers join with --storage"
            )
        self.sweep = sweep
        self._workdir, self._index, self._count = workdir, index, count
        self._held: dict[int, IO[str]] = {}
        self._seconds = 0.0  # of work on the trial that is held, as was told last
        for name in ("results", "claims"):
            try:
                (workdir / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"{workdir}: no folder can be made there ({error.strerror}); choose another --workdir"
                ) from None

    def _numbers(self) -> range:
        return range(self._index, self.sweep.total, self._count)

    def claim(self) -> Task | None:
        """As `Ledger`."""
        assert isinstance(self.sweep.what, Grid)
        for number in self._numbers():
            if number in self._held or self._result(number).exists():
                continue
            file = (self._workdir / "claims" / f"{number:04d}").open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            except OSError:  # a file system without locks: one job a shard, then
                pass
            if self._result(number).exists():  # ended between the two looks
                file.close()
                continue
            self._held[number] = file
            self._seconds = 0.0
            before, progress = self._attempts(number), self._progress(number)
            task = Task(number, self.sweep.what.points[number], len(before) + 1, folder_name(number))
            # Each attempt left what checkpoints there were at its beginning.
            if len(before) >= MOST_DEATHS and set(before[-MOST_DEATHS:]) == {progress}:
                self.finish(task._replace(attempt=len(before)), FAILED, None, {}, KILLER.format(MOST_DEATHS))
                continue
            file.write(progress + "\n")
            file.flush()
            return task
        return None

    def _attempts(self, number: int) -> list[str]:
        """What checkpoints there were when each attempt at a trial began; those that were given back are no more."""
        path = self._workdir / "claims" / f"{number:04d}"
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8").splitlines()
            return [
                "-" if lines[at + 1 : at + 2] == [BACK] else each
                for at, each in enumerate(lines)
                if each != BACK
            ]
        return []

    def _progress(self, number: int) -> str:
        with contextlib.suppress(OSError):
            names = (self._workdir / folder_name(number) / "checkpoints").iterdir()
            return "checkpoints " + " ".join(sorted(path.name for path in names))
        return "checkpoints"

    def done(self) -> bool:
        """As `Ledger`, of this shard."""
        return all(self._result(number).exists() for number in self._numbers())

    def beat(self, task: Task, seconds: float) -> None:
        """Remembers the seconds; the lock says who is alive."""
        self._seconds = seconds

    def report(self, task: Task, step: int, value: float, last: bool = False) -> bool:
        """Nothing is given up."""
        return False

    def finish(
        self, task: Task, state: str, step: int | None, metrics: dict[str, float], reason: str = ""
    ) -> None:
        """As `Ledger`."""
        if state == COMPLETE and self.sweep.metric not in metrics:
            state, reason = FAILED, UNMEASURED
        result = {
            "state": state,
            "step": step,
            "metrics": metrics,
            "seconds": round(self._seconds, 1),
            "attempts": task.attempt,
            "reason": reason,
            "folder": task.folder,
        }
        write_whole(self._result(task.number), json.dumps(result, indent=2) + "\n")
        self.release(task)

    def release(self, task: Task) -> None:
        """As `Ledger`."""
        if (file := self._held.pop(task.number, None)) is not None:
            if not self._result(task.number).exists():
                file.write(BACK + "\n")
            file.close()

    def rows(self) -> list[Row]:
        """As `Ledger`, of all shards whose results are here."""
        assert isinstance(self.sweep.what, Grid)
        return [self._row(number) for number in range(self.sweep.total)]

    def _result(self, number: int) -> Path:
        return self._workdir / "results" / f"{number:04d}.json"

    def _row(self, number: int) -> Row:
        assert isinstance(self.sweep.what, Grid)
        point, path = self.sweep.what.points[number], self._result(number)
        if not path.exists():
            attempts = len(self._attempts(number))
            return Row(number, RUNNING if attempts else WAITING, point, attempts=attempts)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return Row(number, point=point, value=found["metrics"].get(self.sweep.metric), **found)
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}: damaged; remove it, and the same command does its trial again"
            ) from None
