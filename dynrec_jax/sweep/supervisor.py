"""The workers of one machine: started, watched, started again when they die, and shown while they work."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.live import Live

from dynrec_jax.errors import MachineError
from dynrec_jax.sweep import machines, table
from dynrec_jax.sweep.definition import Sweep, told
from dynrec_jax.sweep.ledger import ENDS, RUNNING, Ledger, Row

LOOK_SECONDS = 1.0
WRITE_SECONDS = 10.0  # between tables on the disk, while it goes on
END_SECONDS = 30.0  # that workers have to give their trials back
AGAIN_SECONDS = 1.0  # before a worker that died is started again
MOST_FAULTS = (
    3  # ends of a worker by a fault of its own, before any trial has ended, after which it is given up
)
MOST_IDLE_DEATHS = 5  # deaths of a worker before it has even claimed a trial


class Member:
    """A worker of this machine, whichever process is it now."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str], log: Path):
        self.index, self._command, self._environment, self._log = index, command, environment, log
        self.process: subprocess.Popen[bytes] | None = None
        self.faults = self.idle_deaths = 0  # one after the other, as `_look_after` counts them
        self._again = 0.0

    def start(self) -> None:
        """Starts its process, apart from the terminal: an interrupt reaches it through its supervisor."""
        file: IO[bytes]
        with self._log.open("ab") as file:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )

    def look(self) -> int | None:
        """How its process ended, where it has since the last look."""
        if self.process is None:
            if self._again and time.monotonic() >= self._again:
                self._again = 0.0
                self.start()
            return None
        status = self.process.poll()
        if status is None:
            return None
        self.process = None
        return status

    def again(self) -> None:
        """Has a later look start it again."""
        self._again = time.monotonic() + AGAIN_SECONDS

    @property
    def busy(self) -> bool:
        """Whether it works, or will again."""
        return self.process is not None or bool(self._again)

    def last_words(self) -> str:
        """The last line of its log."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""


class Supervisor:
    """Has workers do a sweep, and shows how far it is."""

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        workdir: Path,
        members: list[Member],
        write: Callable[[list[Row]], None],
        console: Console | None = None,
    ):
        """`write` puts the tables on the disk."""
        self._sweep, self._ledger, self._workdir = sweep, ledger, workdir
        self._members, self._write = members, write
        self._console = console or Console(stderr=True, highlight=False)
        self._told: dict[int, str] = {}
        self._written = time.monotonic()
        self._began = time.monotonic()
        self._ended_before = 0
        self._progress = (0, 0)  # trials that have ended, and attempts at all of them

    def run(self) -> list[Row]:
        """Returns all trials when nothing is left to do here.

        Raises:
          KeyboardInterrupt: from the terminal, or by SIGTERM; the workers have given their trials back.
          MachineError: workers cannot work here; the message is what the last one said.
        """
        rows = self._ledger.rows()
        self._ended_before = sum(row.state in ENDS for row in rows)
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            for member in self._members:
                member.start()
            with contextlib.ExitStack() as opened:
                live = None
                if self._console.is_terminal:
                    live = opened.enter_context(Live(console=self._console, auto_refresh=False))
                while any(member.busy for member in self._members):
                    time.sleep(LOOK_SECONDS)
                    rows = self._ledger.rows()
                    self._look_after(rows)
                    self._show(rows, live)
                    if time.monotonic() - self._written > WRITE_SECONDS:
                        self._written = time.monotonic()
                        self._write(rows)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked again, it would leave workers behind
            self._end()
            signal.signal(signal.SIGTERM, before)
        rows = self._ledger.rows()
        self._show(rows, None)
        return rows

    def _look_after(self, rows: list[Row]) -> None:
        """Starts workers that died again, unless they cannot work here.

        A trial that kills its workers fails by itself, after some; a full disk, or a broken installation, does not end.
        """
        progress = sum(row.state in ENDS for row in rows), sum(row.attempts for row in rows)
        ended, claimed = (now > before for now, before in zip(progress, self._progress, strict=True))
        self._progress = progress
        for member in self._members:
            member.faults = 0 if ended else member.faults
            member.idle_deaths = 0 if ended or claimed else member.idle_deaths
            status = member.look()
            if status is None or (status == 0 and self._ledger.done()):
                continue
            member.faults += status > 0
            member.idle_deaths += 1
            how = f"signal {-status}" if status < 0 else f"status {status}"
            if member.faults >= MOST_FAULTS or member.idle_deaths >= MOST_IDLE_DEATHS:
                raise MachineError(
                    f"worker {member.index} cannot work here: it ended again and again ({how}), at last with: "
                    f"{member.last_words() or 'nothing'}"
                )
            member.again()
            self._say(f"worker {member.index} ended ({how}) and is started again; its trial goes on")

    def _end(self) -> None:
        """Has the workers end: asked to give their trials back, and then killed."""
        alive = [member.process for member in self._members if member.process is not None]
        for process in alive:
            process.terminate()
        limit = time.monotonic() + END_SECONDS
        for process in alive:
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _show(self, rows: list[Row], live: Live | None) -> None:
        if live is not None:
            live.update(table.rich_table(self._sweep, rows), refresh=True)
        for row in rows:
            if row.state != self._told.get(row.number) and row.state in (RUNNING, *ENDS):
                first = row.number not in self._told
                self._told[row.number] = row.state
                if live is None and not (first and self._ended_before and row.state in ENDS):
                    self._say(self._line(row, rows))

    def _line(self, row: Row, rows: list[Row]) -> str:
        if row.state == RUNNING:
            return f"trial {row.number}: {told(row.point)}"
        value = "" if row.value is None else f" {self._sweep.metric} {row.value:.4f}"
        reason = f" ({row.reason})" if row.reason else ""
        ended = sum(each.state in ENDS for each in rows)
        spent, new = time.monotonic() - self._began, max(1, ended - self._ended_before)
        left = spent / new * (self._sweep.total - ended)
        return (
            f"trial {row.number}: {row.state}{value}{reason}; {ended} of {self._sweep.total} ended, "
            f"elapsed {spent / 60:.1f} min, left about {left / 60:.1f}"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def members(
    count: int, command: Callable[[int], list[str]], workdir: Path, secret: dict[str, str]
) -> list[Member]:
    """The workers of this machine; `command` starts one, `secret` goes to each by its environment."""
    gpus, chips = machines.own_gpus(os.environ), machines.own_chips(os.environ)
    logs = workdir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return [
        Member(
            index,
            command(index),
            {**machines.environment_of(index, count, gpus, chips), **secret},
            logs / f"worker-{os.getpid()}-{index}.log",
        )
        for index in range(count)
    ]


def python(module: str, *arguments: str) -> list[str]:
    """A command that runs a module of ours with this Python."""
    return [sys.executable, "-m", module, *arguments]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
