"""Ends a run that is stuck, or has lost a process, and has all processes stop at the same point when one is told to.

Every process has a thread beside the one that works. Once a second it tells process 0 what its process is doing
(`pulse.py`), over a connection of its own; process 0 answers, and decides for all:

- a process that is not heard of any more is stopped, or its machine is gone;
- where nobody shows a sign of life, the run is stuck, and the process that the others wait for is named;
- a process that ends with an error, or without a word, ends the others, whatever they wait for;
- a process that gets SIGTERM stops all of them at a point that none has passed yet.

Seconds are those in which this process ran: one that was stopped by its user, and goes on, finds nothing amiss.
"""

import contextlib
import faulthandler
import math
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NamedTuple

from dynrec_jax.errors import AGAIN, Preempted, one_line, status_of
from dynrec_jax.parallel.processes import Processes
from dynrec_jax.parallel.pulse import Seen
from dynrec_jax.parallel.star import Line, connected

TICK_SECONDS = 1.0
GRACE_SECONDS = 3.0  # in which a process may end by itself once another has
LINGER_SECONDS = 0.3  # until the others have read why this process ends
SILENT_TICKS = 4  # after which a process, where all stand still, is the one that is the reason
COMPILE_SECONDS = 3_600.0  # that a compiler may take, of which there is no sign of life
LONG = 10  # so many times longer may take what gives few signs of life:
ORDER = (
    "start",
    "restore",
    "texts",
    "data",
    "step",
    "evaluation",
    "save",
    "copy",
)  # of what a step is made of
LONG_PHASES = ("start", "restore", "texts", "save", "copy")


class Watchdog:
    """Watches from `with` on; of one process too."""

    def __init__(self, processes: Processes, seconds: float, stops: bool = False):
        """Starts to watch inside `with`; all processes make it together.

        Args:
          processes: that work together.
          seconds: without a sign of life, after which the run is ended; 0 for any number.
          stops: whether SIGTERM stops the run where `stop_here` is asked, instead of ending the process.
        """
        self._processes, self._seconds, self._stops = processes, seconds, stops
        self._gate = _Gate()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._wake, self._woken = socket.socketpair()
        self._clock, self._ticked = 0.0, time.monotonic()
        self._lines: dict[int, Line] = {}
        self._standing: dict[int, _Standing] = {}
        self._counts: dict[int, int] | None = None  # by process, while it is settled where to stop
        self._settled = False
        self._verdict: _Verdict | None = None
        self._told = False
        self._gone = threading.Event()
        self._closing: dict[str, Any] | None = None
        self._before: Any = None

    def __enter__(self) -> "Watchdog":
        self._processes.pulse.starts()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        if self._processes.count > 1:
            self._lines = connected(self._processes)
        self._standing = {index: _Standing() for index in (self._processes.index, *self._lines)}
        if self._stops and threading.current_thread() is threading.main_thread():
            # The byte is written whatever the main thread is at; its own handler has nothing to do.
            self._before = (
                signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False),
                signal.signal(signal.SIGTERM, lambda number, frame: None),
                # By it somebody asks for a recording, perhaps before there is anything to record.
                signal.signal(signal.SIGUSR1, lambda number, frame: None),
            )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fault = None
        if error is not None and not isinstance(error, Preempted):
            phase = self._processes.pulse.failed or self._processes.pulse.phase
            known = "" if status_of(error) is not None else f"{type(error).__name__}: "
            fault = [status_of(error) or 1, phase, self._processes.pulse.step, f"{known}{one_line(error)}"]
        self._closing = {"done": fault}
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        self._gone.wait(timeout=2 * TICK_SECONDS)
        if self._lines:
            time.sleep(LINGER_SECONDS)  # who ends at once would take back what it has sent
        if self._before is not None:
            signal.set_wakeup_fd(self._before[0])
            signal.signal(signal.SIGTERM, self._before[1])
            signal.signal(signal.SIGUSR1, self._before[2])
        self._wake.close()

    def stop_here(self) -> bool:
        """Whether the run stops at this point; all processes ask at the same points, and all get the same answer."""
        return self._gate.passes()

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:  # a run that nobody watches any more still goes on
            traceback.print_exc()
            self._gone.set()
            self._gate.stop_at(math.inf)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for index, line in self._lines.items():
                selector.register(line.connection, selectors.EVENT_READ, index)
            tick = time.monotonic()
            while self._closing is None:
                for key, _ in selector.select(max(0.0, tick - time.monotonic())):
                    if key.data is None:
                        self._hear_signal()
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                if time.monotonic() >= tick:
                    self._tick()
                    tick = time.monotonic() + TICK_SECONDS
        for line in self._lines.values():
            line.send(self._closing)
        self._gone.set()
        self._gate.release()
        self._woken.close()
        self._linger()

    def _linger(self, seconds: float = math.inf) -> None:
        """Reads on without looking: closed with something unread, a connection would lose what it has sent."""
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for line in self._lines.values():
                with contextlib.suppress(ValueError):  # closed by the other end before
                    selector.register(line.connection, selectors.EVENT_READ, line)
            while selector.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(min(left, 60.0)):
                    try:
                        more = key.data.connection.recv(65_536)
                    except OSError:
                        more = b""
                    if not more:
                        selector.unregister(key.fileobj)

    def _hear_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if bytes([signal.SIGTERM]) in self._woken.recv(64):
                self._on_notice()

    def _hear(self, index: int) -> bool:
        """Takes what a process has sent; False at the end of what it sends."""
        line, standing = self._lines[index], self._standing[index]
        try:
            messages = line.receive()
        except OSError:
            messages = None
        if messages is None:
            if not standing.done:
                what = f"has ended, {standing.seen.told()}; its own log says why"
                self._found(_Verdict(1, self._named(index), what))
                self._tell()
            standing.done = True
            return False
        standing.heard = self._clock
        for message in messages:
            self._take(index, message)
        return True

    def _take(self, index: int, message: dict[str, Any]) -> None:
        standing = self._standing[index]
        for name, value in message.items():
            if name == "seen":
                standing.look(Seen(*value), self._clock)
            elif name == "done":
                standing.done = True
                if self._counts is not None:
                    self._settle_if_all()
                if not self._processes.first:  # nobody settles any more where to stop; what is settled stays
                    self._gate.release()
                if value is not None:
                    status, phase, step, text = value
                    self._found(
                        _Verdict(status, self._named(index), f"failed in {phase} after step {step}: {text}")
                    )
            elif name == "end":
                self._found(_Verdict(*value))
            elif name == "stop":
                self._on_notice()
            elif name == "where":
                self._gate.hold()
                self._lines[index].send({"count": self._gate.count})
            elif name == "count":
                self._settle(index, value)
            elif name == "stop_at":
                self._stop_at(value)

    def _tick(self) -> None:
        now = time.monotonic()
        # A second that took minutes was one in which this process was stopped.
        self._clock += min(now - self._ticked, 2 * TICK_SECONDS)
        self._ticked = now
        own = self._processes.pulse.seen()
        self._standing[self._processes.index].look(own, self._clock)
        self._standing[self._processes.index].heard = self._clock
        for line in self._lines.values():
            line.send({"seen": list(own)})
        if self._verdict is None and self._seconds:
            self._judge()
        if self._verdict is not None and self._clock >= self._verdict.at:
            self._end(self._verdict)

    def _judge(self) -> None:
        """Looks whether a process is not heard of, or none shows a sign of life."""
        there = {index: each for index, each in self._standing.items() if not each.done}
        silent, longest = max(
            ((index, self._clock - each.heard) for index, each in there.items()), key=lambda one: one[1]
        )
        # The one that the others wait for is behind them; its time counts, and that of a compiler anywhere.
        index, last = min(there.items(), key=lambda one: one[1].behind)
        allowed = max(
            self._allowed(each.seen) for each in there.values() if each is last or each.seen.compiles
        )
        still = (
            # Of all processes, process 0 alone sees what the others do; without it, each looks after itself.
            (self._processes.first or self._standing[0].done)
            and all(self._clock - each.moved > self._seconds for each in there.values())
            and self._clock - last.moved > allowed
        )
        if longest > self._seconds or (still and longest > SILENT_TICKS * TICK_SECONDS):
            told = there[silent].seen.told()
            what = f"has not been heard of for {longest:.0f} s; the last was: {told}"
            self._found(_Verdict(1, self._named(silent), what, stacks=True))
        elif still:
            what = f"shows no sign of life for {allowed:.0f} s, {last.seen.told()}"
            self._found(_Verdict(1, self._named(index), what, stacks=True))

    def _allowed(self, seen: Seen) -> float:
        if seen.compiles:
            return max(self._seconds, COMPILE_SECONDS)
        return self._seconds * (LONG if seen.phase in LONG_PHASES else 1)

    def _named(self, index: int) -> str:
        return f"process {index} of {self._processes.count}" if self._processes.count > 1 else "this process"

    def _found(self, verdict: "_Verdict") -> None:
        """Remembers the first verdict; process 0 tells the others, which have some time to end by themselves."""
        if self._verdict is not None or self._closing is not None:
            return
        grace = 0.0 if verdict.stacks else GRACE_SECONDS
        self._verdict = verdict._replace(at=self._clock + grace)
        if self._processes.first:
            for line in self._lines.values():
                line.send({"end": list(verdict)})
        if verdict.stacks:
            self._end(verdict)
        # Where all have found the same, they are about to say it themselves. Later, JAX may end this process with fifty
        # lines before it has said anything.
        timer = threading.Timer(LINGER_SECONDS / 2, self._tell)
        timer.daemon = True
        timer.start()

    def _end(self, verdict: "_Verdict") -> None:
        """Ends this process: nothing that it waits for will come."""
        self._tell()
        if verdict.stacks:
            faulthandler.dump_traceback(all_threads=True)
        self._linger(LINGER_SECONDS)
        os._exit(verdict.status)

    def _tell(self) -> None:
        if self._told or self._verdict is None or self._closing is not None:
            return
        self._told, (_, who, what, stacks, _) = True, self._verdict
        more = "; --watchdog=SECONDS allows more, 0 any number" if stacks else ""
        sys.stderr.write(f"dynrec: {who} {what}{more}\n")
        sys.stderr.flush()

    def _on_notice(self) -> None:
        """This process, or another one, is told to stop."""
        if not self._processes.first:
            for line in self._lines.values():
                line.send({"stop": True})
        elif self._counts is None:
            self._gate.hold()
            self._counts = {0: self._gate.count}
            for line in self._lines.values():
                line.send({"where": True})
            self._settle_if_all()

    def _settle(self, index: int, count: int) -> None:
        assert self._counts is not None
        self._counts[index] = count
        self._settle_if_all()

    def _settle_if_all(self) -> None:
        assert self._counts is not None
        done = [index for index, each in self._standing.items() if each.done]
        if self._settled or len(self._counts.keys() | done) < self._processes.count:
            return
        self._settled = True
        # 0: nobody has done anything yet that is not on the disk. Where one is done, the others soon are.
        most = max(self._counts.values())
        at = math.inf if done else most + 1 if most else 0
        for line in self._lines.values():
            line.send({"stop_at": at})
        self._stop_at(at)

    def _stop_at(self, point: float) -> None:
        if point == 0:
            sys.stderr.write(f"dynrec: {Preempted.before_a_step}\n")
            sys.stderr.flush()
            self._linger(LINGER_SECONDS)
            os._exit(AGAIN)
        self._gate.stop_at(point)


class _Standing:
    """What is known of a process: what it did last, and when it was heard of and showed a sign of life."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.heard = self.moved = 0.0
        self.done = False

    @property
    def behind(self) -> tuple[Any, ...]:
        """The least of it is the one that others wait for: it waits for nobody, and has come least far."""
        phase = ORDER.index(self.seen.phase) if self.seen.phase in ORDER else 0
        # All make the same calls, and so give about the same signs of life.
        return self.seen.waits, self.seen.step, phase, self.seen.beats, self.moved

    def look(self, seen: Seen, now: float) -> None:
        # A compiler has its own time, from its start on.
        if (seen.beats, seen.compiles) != (self.seen.beats, self.seen.compiles):
            self.moved = now
        self.seen = seen


class _Verdict(NamedTuple):
    """Why a run ends.

    Attributes:
      status: exit status of all.
      who: the process that is the reason.
      what: what is the matter with it.
      stacks: whether the stacks of all threads tell more; then nobody will end by itself.
      at: by this process's clock, when it ends.
    """

    status: int
    who: str
    what: str
    stacks: bool = False
    at: float = 0.0


class _Gate:
    """Points that all processes pass in the same order; where to stop is settled while nobody passes one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False
        self.count = 0
        self._at = math.inf

    def passes(self) -> bool:
        """Counts a point; whether the run stops there."""
        with self._lock:
            self.count += 1
            return self.count >= self._at

    def hold(self) -> None:
        if not self._held:
            self._lock.acquire()
            self._held = True

    def stop_at(self, point: float) -> None:
        self._at = point
        self.release()

    def release(self) -> None:
        if self._held:
            self._held = False
            self._lock.release()
