"""Connections beside those of `processes.py`, on which nobody waits for anybody: of process 0 to all others."""

import contextlib
import hmac
import json
import secrets
import socket
import time
from typing import Any

from dynrec_jax.errors import MachineError, one_line
from dynrec_jax.parallel.processes import JOIN_SECONDS, Processes, keep_alive

SEND_SECONDS = 1.0


class Line:
    """JSON objects over a connection, one a line; what cannot be sent is lost, as when the other end is gone."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._left = b""
        keep_alive(connection)
        connection.settimeout(SEND_SECONDS)

    def send(self, message: Any) -> None:
        """Sends one, or loses it."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """What has come since the last call; None at the end."""
        read = self.connection.recv(65_536)
        if not read:
            return None
        *lines, self._left = (self._left + read).split(b"\n")
        return [json.loads(line) for line in lines]


def connected(processes: Processes) -> dict[int, Line]:
    """The connections of process 0 to all others, and of each of them to process 0."""
    server = socket.create_server(("", 0), backlog=processes.count) if processes.first else None
    mine = None if server is None else [server.getsockname()[1], secrets.token_hex(16)]
    port, token = processes.exchange(mine)[0]
    if server is None:
        return {0: _call(processes, port, token)}
    lines: dict[int, Line] = {}
    deadline = time.monotonic() + JOIN_SECONDS
    with server:
        while len(lines) < processes.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, processes.count)) - lines.keys())
                raise MachineError(
                    f"process {missing[0]} of {processes.count} does not reach port {port} of process 0, over which "
                    f"the processes watch each other; open the ports between the machines"
                ) from None
            line = Line(connection)
            index = _greeted(line, token)
            if index is None:
                connection.close()  # not one of ours: a port scanner, say
            else:
                lines[index] = line
    return lines


def _greeted(line: Line, token: str) -> int | None:
    try:
        hello = line.receive()
        return int(hello[0]["process"]) if hello and hmac.compare_digest(hello[0]["token"], token) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _call(processes: Processes, port: int, token: str) -> Line:
    try:
        connection = socket.create_connection((processes.host, port), timeout=JOIN_SECONDS)
    except OSError as error:
        raise MachineError(
            f"process {processes.index} of {processes.count} does not reach {processes.host}:{port} of process 0, over "
            f"which the processes watch each other ({one_line(error)}); open the ports between the machines"
        ) from None
    line = Line(connection)
    line.send({"process": processes.index, "token": token})
    return line
