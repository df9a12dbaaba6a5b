"""Whether the process that holds a trial still lives."""

import os
import platform
import signal
from functools import cache
from pathlib import Path
from typing import Any

Identity = dict[str, Any]


@cache
def machine() -> str:
    """This machine since it was started, and the processes that are visible here: numbers of others mean nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()}:{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def own() -> Identity:
    """This process."""
    return {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}


def is_dead(identity: Identity) -> bool:
    """Whether that process certainly has ended; those of other machines may have."""
    if identity.get("machine") != machine():
        return False
    return started(int(identity.get("pid", 0))) != identity.get("started")


def end_stopped(identity: Identity) -> None:
    """Kills that process where it is one of this machine and stopped (SIGSTOP)."""
    pid = int(identity.get("pid", 0))
    if (
        identity.get("machine") == machine()
        and started(pid) == identity.get("started")
        and _state(pid) == "T"
    ):
        os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    return _stat(pid)[0]


def started(pid: int) -> int:
    """When a process of this machine was started, in the kernel's ticks; -1 where there is none, or a dead one."""
    try:
        state, *rest = _stat(pid)
        return -1 if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return -1


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; its name, before, may hold anything."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    return text.rpartition(")")[2].split()
