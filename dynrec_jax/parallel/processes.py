"""The processes of one run: who is there, what each has found, and one answer for all.

A control channel beside JAX's own: every process holds a TCP connection to process 0, and small JSON values travel
over it. It stands before JAX is started, so that a process that never comes is named instead of aborting all, and
one process's mistake ends all with its message instead of a hang. Arrays do not go this way.

Three environment variables say who is there: `JAX_COORDINATOR_ADDRESS` (`host:port` of process 0),
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0). The launcher sets them, or they are derived from what the cluster
sets (`dynrec_jax.parallel.clusters`).
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dynrec_jax.errors import ConfigError, DataError, MachineError, NonFiniteError, UserError, one_line
from dynrec_jax.files import temporary_name
from dynrec_jax.parallel.clusters import ADDRESS, COUNT, INDEX, ORIGIN, find
from dynrec_jax.parallel.pulse import Pulse

Result = TypeVar("Result")

JOIN_SECONDS = 45.0  # until a process that has not come is given up
HEARTBEAT_SECONDS = 900  # of JAX, which names nobody: the watchdog is quicker
SHUTDOWN_SECONDS = 30  # that a process which is done waits for the others
FAULTS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ConfigError, DataError, UserError, MachineError, NonFiniteError)
}


class Processes:
    """The processes of a run as one of them sees it; all of them make the same calls in the same order.

    Attributes:
      index: this process's number, from 0.
      count: how many there are.
      pulse: what this process is doing.
    """

    def __init__(self, index: int = 0, count: int = 1, peers: "list[_Line] | None" = None, jax_at: str = ""):
        self.index, self.count, self.pulse = index, count, Pulse()
        self._peers = peers or []  # of process 0: all others in their order; of the others: process 0
        self._jax_at = jax_at

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what a run writes once."""
        return self.index == 0

    @property
    def host(self) -> str:
        """The machine of process 0, as the others reach it."""
        return self._jax_at.rpartition(":")[0].strip("[]")

    def exchange(self, value: Any) -> list[Any]:
        """The values (JSON) of all processes, in their order.

        Raises:
          MachineError: a process has ended.
        """
        if self.count == 1:
            return [value]
        with self.pulse.waiting():
            return self._exchange(value)

    def _exchange(self, value: Any) -> list[Any]:
        if self.first:
            values = [value, *(peer.receive() for peer in self._peers)]
            for peer in self._peers:
                peer.send(values)
            return values
        (zero,) = self._peers
        zero.send(value)
        return list(zero.receive())

    def agree(self, work: Callable[[], Result]) -> Result:
        """Does `work` in every process; where it fails in one, all raise the fault of the lowest.

        Raises:
          UserError, MachineError, NonFiniteError: with the number of the process in front where there are several.
        """
        if self.count == 1:
            return work()
        result: Any = None
        own: Exception | None = None
        try:
            result = work()
        except Exception as error:
            own = error
        faults = self.exchange(None if own is None else _told(own))
        if own is not None and not isinstance(own, tuple(FAULTS.values())):
            raise own  # our own mistake: its traceback belongs in the log of the process that made it
        for index, fault in enumerate(faults):
            if fault is not None:
                kind, text = fault
                raise FAULTS.get(kind, MachineError)(f"process {index}: {text}") from own
        return result

    def first_does(self, work: Callable[[], Any]) -> None:
        """Has process 0 do `work` while the others wait; where it fails, all fail."""
        self.agree(work if self.first else lambda: None)

    def check_same(self, values: Mapping[str, Any], advice: str) -> None:
        """Raises ConfigError, naming the first differences, where processes hold different values."""
        everybody = self.exchange(dict(values))
        told = []
        for index, other in enumerate(everybody):
            for key in sorted({*everybody[0], *other}):
                here, there = everybody[0].get(key), other.get(key)
                if here != there:
                    told.append(f"{key} is {here!r} in process 0 and {there!r} in process {index}")
        if told:
            more = f" and {len(told) - 3} more" if len(told) > 3 else ""
            raise ConfigError(f"the processes differ: {'; '.join(told[:3])}{more}; {advice}")

    def check_shared(self, folder: Path) -> None:
        """Raises ConfigError where a process does not see what process 0 writes to a folder."""
        if self.count == 1:
            return
        # A temporary name: what is left where this is killed is cleared like any file that was not finished.
        name = self.exchange(temporary_name(folder / f"shared-{secrets.token_hex(8)}").name)[0]
        self.first_does((folder / name).touch)

        def look() -> None:
            if not (folder / name).exists():
                raise ConfigError(
                    f"{folder}: this process does not see what process 0 writes there; give all the same folder, on a "
                    "disk that they share"
                )

        try:
            self.agree(look)
        finally:
            if self.first:
                (folder / name).unlink(missing_ok=True)

    def start_jax(self) -> None:
        """Joins JAX's own cluster of the same processes; before anything touches a device."""
        if self.count > 1:
            import jax

            # With it, JAX would catch the first SIGTERM and go on; nobody here asks it about preemption.
            jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(
                self._jax_at,
                self.count,
                self.index,
                initialization_timeout=int(JOIN_SECONDS),
                # Who is there is known. What JAX finds in Slurm's variables would leave each process one GPU only.
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )


def _told(error: Exception) -> list[str]:
    """A fault as it travels: its kind and its text."""
    kind = next((name for name, kind in FAULTS.items() if isinstance(error, kind)), None)
    return [kind, one_line(error)] if kind else ["MachineError", f"{type(error).__name__}: {one_line(error)}"]


ALONE = Processes()


def join(environment: Mapping[str, str] = os.environ, seconds: float = JOIN_SECONDS) -> Processes:
    """Meets the other processes that the launcher has started; `ALONE` where it started one.

    Raises:
      ConfigError: the variables contradict each other.
      MachineError: a process did not come in time; which one is said.
    """
    found = find(environment)
    address, count, index = _read(found)
    if count == 1:
        return ALONE
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    try:
        if index == 0:
            return _gather(host, int(port), count, deadline, seconds)
        return _call(host, int(port), index, count, deadline, seconds)
    except MachineError as error:
        # Where an older job left them, the process that is waited for was never to come.
        raise MachineError(f"{error} (this process goes by {found[ORIGIN]})") from None


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher or the cluster says that this is one process of several.

    Raises:
      ConfigError: the variables contradict each other.
    """
    return bool(find(environment))


def _read(environment: Mapping[str, str]) -> tuple[str, int, int]:
    if not environment:
        return "", 1, 0
    numbers = {}
    for name in (COUNT, INDEX):
        text = environment.get(name, "")
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(f"{name}={text!r}: expected a number; the launcher sets it for every process")
        numbers[name] = int(text)
    count, index = numbers[COUNT], numbers[INDEX]
    if count < 1:
        raise ConfigError(f"{COUNT}={count}: expected 1 or more")
    if index >= count:
        raise ConfigError(f"{INDEX}={index}: expected 0 to {count - 1}, since {COUNT}={count}")
    address = environment.get(ADDRESS, "")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) >= 2**16:
        raise ConfigError(f"{ADDRESS}={address!r}: expected host:port of process 0, since {COUNT}={count}")
    return address, count, index


class _Line:
    """JSON values over a connection, one a line."""

    def __init__(self, connection: socket.socket, who: str):
        self._connection, self.who = connection, who
        keep_alive(connection)
        self._file = connection.makefile("rb")

    def send(self, value: Any) -> None:
        try:
            self._connection.sendall(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise self._gone(error) from None

    def receive(self) -> Any:
        try:
            line = self._file.readline()
        except OSError as error:
            raise self._gone(error) from None
        if not line.endswith(b"\n"):
            raise self._gone(None)
        return json.loads(line)

    def wait(self, until: float | None) -> None:
        """How long `receive` may take: to a moment, or for ever."""
        self._connection.settimeout(None if until is None else max(until - time.monotonic(), 0.001))

    def close(self) -> None:
        self._file.close()
        self._connection.close()

    def _gone(self, error: OSError | None) -> MachineError:
        reason = f" ({one_line(error)})" if error else ""
        return MachineError(f"{self.who} has ended{reason}; its own log says why")


def keep_alive(connection: socket.socket) -> None:
    """Has the kernel notice within a minute that the other machine is gone; it would take hours by itself."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _gather(host: str, port: int, count: int, deadline: float, seconds: float) -> Processes:
    """Process 0: listens until all have come."""
    local = host in ("localhost", "127.0.0.1", "::1", "[::1]")
    try:
        server = socket.create_server(("127.0.0.1" if local else "", port), backlog=count)
    except OSError as error:
        raise MachineError(
            f"process 0 cannot listen on {host}:{port} ({one_line(error)}); set {ADDRESS} to a free port"
        ) from None
    peers: dict[int, _Line] = {}
    with server:
        while len(peers) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, count) if i not in peers]
                who = f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {count}"
                fault = (
                    f"{who} did not come within {seconds:.0f} s; see whether it was started, and whether it can "
                    f"reach process 0 at {host}:{port}"
                )
                raise _refuse(peers, MachineError(fault)) from None
            line = _Line(connection, "a process")
            line.wait(min(deadline, time.monotonic() + 5.0))
            try:
                hello = line.receive()
                index, named = int(hello["process"]), int(hello["processes"])
            except (MachineError, ValueError, KeyError, TypeError):
                line.close()  # not one of ours: a port scanner, say
                continue
            if named != count or not 0 < index < count or index in peers:
                peers[-1] = line
                told = "came twice" if index in peers else f"says that there are {named} processes"
                fault = (
                    f"process {index} {told}, and process 0 expects {count}; set {COUNT} and {INDEX} alike"
                )
                raise _refuse(peers, ConfigError(fault))
            line.wait(None)
            line.who = f"process {index} of {count}"
            peers[index] = line
    with socket.create_server(("", 0)) as probe:
        jax_at = f"{host}:{probe.getsockname()[1]}"
    for line in peers.values():
        line.send({"jax": jax_at})
    return Processes(0, count, [peers[i] for i in range(1, count)], jax_at)


def _refuse(peers: dict[int, _Line], fault: Exception) -> Exception:
    """Tells those that have come, who are to end as well."""
    for line in peers.values():
        with contextlib.suppress(MachineError):  # that one has ended by itself
            line.send({"fault": [type(fault).__name__, str(fault)]})
    return fault


def _call(host: str, port: int, index: int, count: int, deadline: float, seconds: float) -> Processes:
    """The others: call process 0 until it answers."""
    connection = None
    while connection is None:
        try:
            connection = socket.create_connection((host.strip("[]"), port), timeout=5.0)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise MachineError(
                    f"process 0 of {count} did not answer at {host}:{port} within {seconds:.0f} s "
                    f"({one_line(error)}); see whether it was started, and whether {ADDRESS} names its machine"
                ) from None
            time.sleep(0.1)
    zero = _Line(connection, f"process 0 of {count}")
    zero.send({"process": index, "processes": count})
    zero.wait(time.monotonic() + seconds + 10.0)  # process 0 counts from its own start
    answer = zero.receive()
    zero.wait(None)
    if "fault" in answer:
        kind, text = answer["fault"]
        raise FAULTS.get(kind, MachineError)(text)
    return Processes(index, count, [zero], answer["jax"])
