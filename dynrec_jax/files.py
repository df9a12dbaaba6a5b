"""Files that are whole or not there: written under a temporary name, synced, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"  # in a folder that one process may hold


class HeldError(Exception):
    """Another process holds the folder."""


@contextlib.contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds a folder, against other processes that ask; the lock goes with the process, however it ends.

    Raises:
      HeldError: another process holds it, and this one is not to `wait`.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise HeldError(str(folder)) from None
        except OSError:  # a file system without locks: nothing can be held, and nothing is refused
            pass
        yield


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with held(folder):
            return False
    except HeldError:
        return True


def temporary_name(path: Path) -> Path:
    """Where this process writes a file that is renamed to `path` when it is whole."""
    return path.with_name(f".{path.name}.tmp-{_machine()}-{os.getpid()}")


def _machine() -> str:
    """Processes of several machines, with the same numbers, may write to one folder."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def is_temporary(path: Path) -> bool:
    """Whether a file is one that is still written, or that a killed process left."""
    return path.name.startswith(".") and path.suffix.startswith(".tmp-")


def remove_temporary(folder: Path) -> None:
    """Removes what killed processes of this machine left half-written in a folder."""
    for path in folder.iterdir():
        pid = path.suffix.removeprefix(f".tmp-{_machine()}-")
        if is_temporary(path) and pid.isdigit() and not is_running(int(pid)):
            path.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, of text or of bytes, so that it is there whole or not at all.

    Raises:
      FileExistsError: a folder or a device is there, which would be replaced.
      OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "what is there is no file", str(path))
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether a process of that number lives on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync(path: Path) -> None:
    """Has the operating system put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
