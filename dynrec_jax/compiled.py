"""Compiled programs, kept between processes: a second start does without seconds of compiling.

JAX keeps such programs itself, but it writes its files in place. What a killed run tore is read again at each start,
with a warning, and never mended; with a bound on the size, a kill between a file and its time stamp stops all later
writes; and where zstd packs the files, nothing would notice a flipped bit in machine code. So JAX is given this
store, which writes whole files, proves them when it reads them, and never fails a run. JAX has no public way to be
given one, hence the one private name; a JAX without that name compiles anew each time.

JAX's keys name the program, the flags, the versions and the kind of the device, on CPU with its instructions.
"""

import contextlib
import hashlib
import logging
import os
import stat
from pathlib import Path
from typing import Any, cast

import jax

from dynrec_jax.files import is_temporary, remove_temporary, write_whole

SUFFIX = ".xla"
BOUND = 1 << 30  # bytes of a folder; a run of experiments/ml1m.py leaves 0.9 MB there on CPU
WORTH = 0.1  # seconds of compiling from which a program is kept: to write and prove it takes 0.01

log = logging.getLogger(__name__)


def keep_compiled(folder: Path) -> None:
    """From here on this process takes compiled programs from a folder, and leaves there what it compiles.

    Nothing happens where JAX's own cache was turned off or told a folder (`JAX_ENABLE_COMPILATION_CACHE`,
    `JAX_COMPILATION_CACHE_DIR`). A folder that cannot be made, or that others may write to, is not used.
    """
    set_in_jax = jax.config.values
    if not set_in_jax["jax_enable_compilation_cache"] or set_in_jax["jax_compilation_cache_dir"]:
        return
    try:
        from jax._src import compilation_cache

        if not hasattr(compilation_cache, "_cache"):
            raise ImportError
    except ImportError:
        log.warning("this version of JAX takes no store of compiled programs; each start compiles anew")
        return
    store = Store.opened(folder)
    if store is not None:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
        compilation_cache._cache = cast(Any, store)


class Store:
    """A folder of programs by key, as JAX's cache asks for it: `get` and `put`, which never raise OSError."""

    def __init__(self, folder: Path, bound: int = BOUND):
        """Of a folder that is there; `bound` is in bytes."""
        self._path = folder  # JAX names it so in its log
        self._bound = bound
        self._told = False

    @classmethod
    def opened(cls, folder: Path) -> "Store | None":
        """The store in a folder, which is made; None, and a word about it, where that cannot be."""
        store = cls(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
                store._say("others may write there, and programs are code")
                return None
            remove_temporary(folder)
        except OSError as error:
            if not folder.is_dir():
                store._say(error)
                return None
        return store

    def get(self, key: str) -> bytes | None:
        """The program of a key; None where there is none, or not what was written."""
        path = self._file(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        size = hashlib.sha256().digest_size
        if content[:size] != _proof(path.name, content[size:]):
            return None  # the new one that JAX compiles now takes its place
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used go first
        return content[size:]

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program; where the folder cannot be written, says so once."""
        path = self._file(key)
        if len(value) > self._bound:
            return
        try:
            self._make_room(len(value))
            write_whole(path, _proof(path.name, value) + value)
        except FileNotFoundError:  # another process has just made room, or the folder is gone
            return
        except OSError as error:
            self._say(error)

    def _file(self, key: str) -> Path:
        # On CPU a program is cut for a number of threads, which JAX's key leaves out.
        name = hashlib.sha256(f"{key} {_threads()}".encode()).hexdigest()
        return self._path / (name + SUFFIX)

    def _make_room(self, more: int) -> None:
        files = []
        for path in self._path.iterdir():
            try:
                about = path.stat()
            except FileNotFoundError:  # another process has just made room
                continue
            if path.suffix == SUFFIX or is_temporary(path):
                files.append((about.st_mtime, about.st_size, path))
        size = more + sum(size for _, size, _ in files)
        for _, freed, path in sorted(files):
            if size <= self._bound:
                return
            path.unlink(missing_ok=True)
            size -= freed

    def _say(self, reason: str | OSError) -> None:
        told = reason if isinstance(reason, str) else reason.strerror or reason
        if not self._told:
            log.warning("%s: compiled programs are not kept there: %s", self._path, told)
        self._told = True


def _threads() -> int:
    # Not every system tells which cores a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _proof(name: str, program: bytes) -> bytes:
    return hashlib.sha256(name.encode() + program).digest()
