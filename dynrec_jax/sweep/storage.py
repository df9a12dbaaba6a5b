"""Where a sweep's trials are recorded: a database that its workers share, and one lock over all of them.

SQLite for the workers of one machine; PostgreSQL or MySQL for those of many. Optuna's tables hold the trials, so that
its dashboard reads them. SQLite on a network file system loses data (SQLite's own documentation, "How To Corrupt"),
and Optuna's journal file cannot be read any more after a worker has died in the middle of a line: neither is offered.
"""

import contextlib
import fcntl
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import optuna
import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.pool import NullPool

from dynrec_jax.errors import ConfigError, MachineError, one_line
from dynrec_jax.sweep import life

Result = TypeVar("Result")

NETWORK = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "glusterfs", "orangefs",
    "pvfs2", "panfs", "wekafs", "fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "fuse.glusterfs", "fuse.ceph-fuse",
    "fuse.rclone", "fuse.blobfuse2", "fuse.juicefs", "fuse.moosefs", "fuse.lizardfs", "ncpfs", "coda", "ocfs2", "gfs2",
)  # fmt: skip
EXTRAS = {"postgresql": "postgres", "mysql": "mysql"}
REACH_SECONDS = 10  # until a database that does not answer is given up
LOCK_NUMBER = int.from_bytes(b"dynrec", "big")  # PostgreSQL's locks have numbers
HOLD_SECONDS = 60  # that a connection may be silent while it holds the lock
LOOK_SECONDS = 0.01  # between looks at whether SQLite's lock is free
BUSY_SECONDS = 60.0  # that a write waits for others
AGAIN_SECONDS = (
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    *(30.0,) * 5,
)  # between looks for a database that was lost
MOUNTS = Path("/proc/self/mountinfo")


class Storage:
    """A database of sweeps.

    Attributes:
      url: its address.
      trials: Optuna's view of it.
    """

    def __init__(self, address: str, hold: float = HOLD_SECONDS):
        """Opens it; makes SQLite's file and all tables where they are not there.

        `hold` is for how many seconds a process that shows no sign of life may hold the lock.

        Raises:
          ConfigError: no such kind of database, a driver that is not installed, SQLite on a network file system, or a
            database that does not answer.
        """
        self.url = parsed(address)
        self._kind = self.url.get_backend_name()
        arguments: dict[str, Any] = {}
        if self._kind == "sqlite":
            arguments["timeout"] = BUSY_SECONDS
            self._file = Path(self.url.database or "").absolute()
            check_local(self._file)
        else:
            arguments["connect_timeout"] = REACH_SECONDS
        if self._kind == "postgresql":  # a machine that is gone must not be waited for by all others
            arguments |= {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
        self._held = threading.local()
        self._hold = hold
        try:
            self._engine = sqlalchemy.create_engine(self.url, poolclass=NullPool, connect_args=arguments)
            try:
                self.trials = self._tables(arguments)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                # It answered, and gave the lock to others because this process stood still for too long.
                self.trials = self._tables(arguments)
        except ImportError:
            extra = EXTRAS[self._kind]
            raise ConfigError(
                f"--storage={self}: its driver is not installed; pip install 'dynrec-jax[{extra}]'"
            ) from None
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            raise ConfigError(
                f"--storage={self}: cannot be opened ({one_line(cause)}); expected a database that answers and that "
                "you may write to"
            ) from None

    def _tables(self, arguments: dict[str, Any]) -> optuna.storages.BaseStorage:
        """Optuna's view of the tables, which are made where they are not there."""
        with self.locked(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            database = optuna.storages.RDBStorage(
                self.url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": arguments, "poolclass": NullPool},
            )
            return optuna.storages.get_storage(database)  # which remembers trials that have ended

    def __str__(self) -> str:
        return shown(self.url)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds all sweeps of this database for one thread of one process; goes with the process, however it ends."""
        if getattr(self._held, "depth", 0):
            self._held.depth += 1
        else:
            self._held.depth = 1
            self._held.stack = contextlib.ExitStack()
            try:
                self._held.stack.enter_context(self._lock())
            except BaseException:
                self._held.depth = 0
                raise
        try:
            yield
        finally:
            self._held.depth -= 1
            if not self._held.depth:
                self._held.stack.close()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if self._kind == "sqlite":
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.with_name(self._file.name + ".lock").open("a+", encoding="utf-8") as file:
                self._take(file)
                try:
                    yield
                finally:
                    file.truncate(0)  # or a later look would take this process for the holder
        elif self._kind == "postgresql":
            with self._engine.connect() as connection, connection.begin():
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({LOCK_NUMBER})"))
                # Whoever is stopped while it holds the lock loses the connection, and the lock with it.
                seconds = f"{max(1, round(self._hold))}s"
                connection.execute(
                    sqlalchemy.text(f"SET LOCAL idle_in_transaction_session_timeout = '{seconds}'")
                )
                yield
        else:
            with self._engine.connect() as connection:
                connection.execute(sqlalchemy.text(f"SET SESSION wait_timeout = {max(1, round(self._hold))}"))
                locked = sqlalchemy.text(f"SELECT GET_LOCK('dynrec', {HOLD_SECONDS})")
                if connection.execute(locked).scalar() != 1:
                    raise OperationalError("GET_LOCK", {}, Exception("the lock is held for too long"))
                yield

    def _take(self, file: IO[str]) -> None:
        """Locks a file; a process that is stopped while it holds it, for longer than is allowed, is ended.

        What it was writing is undone by SQLite, its trial is gone on with, and whoever waits is not stopped with it.
        """
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOOK_SECONDS)
            if time.monotonic() - began > self._hold:
                began = time.monotonic()
                file.seek(0)
                with contextlib.suppress(ValueError, OSError):
                    life.end_stopped(json.loads(file.read()))
        file.truncate(0)
        file.write(json.dumps(life.own()))
        file.flush()

    def patiently(self, work: Callable[[], Result], say: Callable[[str], None] = lambda line: None) -> Result:
        """What `work` gives, under the lock; a database that is gone for some minutes is waited for.

        Raises:
          MachineError: it does not come back.
        """
        for seconds in (*AGAIN_SECONDS, None):
            done: list[Result] = []
            try:
                with self.locked():
                    done.append(work())
                return done[0]
            except (OperationalError, InterfaceError, optuna.exceptions.StorageInternalError) as error:
                if done:  # it is recorded, and only the lock's connection was lost
                    return done[0]
                told = one_line(getattr(error, "orig", None) or error)
                if seconds is None:
                    raise MachineError(
                        f"{self}: does not answer ({told}); the same command goes on when it does"
                    ) from None
                say(f"{self}: {told}; trying again")
                time.sleep(seconds)
        raise AssertionError


def shown(url: URL) -> str:
    """An address without what is secret in it."""
    return url.set(query={}).render_as_string(hide_password=True)


def parsed(address: str) -> URL:
    """A database's address.

    Raises:
      ConfigError: it is none, or of a kind that is not offered.
    """
    expected = (
        "expected sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME or mysql://USER:PASSWORD@HOST/NAME"
    )
    try:
        url = make_url(address)
        kind = url.get_backend_name()
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        elif url.drivername == "mysql":
            url = url.set(drivername="mysql+pymysql")
        if kind in ("sqlite", *EXTRAS):
            if kind == "sqlite" and (not url.database or url.database == ":memory:" or url.query):
                raise ConfigError(f"--storage={shown(url)}: a sweep's workers need a file; {expected}")
            return url
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise ConfigError(f"--storage: is no database's address; {expected}") from None
    raise ConfigError(f"--storage: {kind} is not supported; {expected}")


def check_local(file: Path) -> None:
    """Raises ConfigError where a file lies, or would, on a network file system."""
    kind = file_system(file)
    if kind in NETWORK:
        raise ConfigError(
            f"--storage: {file} lies on a network file system ({kind}), where SQLite loses data; put --workdir on a "
            "local disk, name a database server with --storage=postgresql://…, or divide a grid with --shard=i/n"
        )


def file_system(file: Path) -> str:
    """The kind of the file system that a path lies on, or would; "" where that is not known."""
    path = Path(os.path.realpath(file))
    best, found = -1, ""
    try:
        lines = MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        left, _, right = line.partition(" - ")
        # Octal escapes stand for spaces in names.
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), left.split()[4]))
        if (
            path.is_relative_to(mounted) and len(mounted.parts) >= best
        ):  # of two at one place, the later one is seen
            best, found = len(mounted.parts), right.split()[0]
    return found
