import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from sqlalchemy.exc import OperationalError

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.sweep import storage
from dynrec_jax.sweep.storage import Storage, file_system, parsed

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:50 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
41 40 8:2 / /home/me/scratch rw - xfs /dev/sdb1 rw
42 22 0:51 / /with\\040space rw - fuse.gcsfuse bucket rw
45 22 0:53 / /données rw - nfs4 server:/d rw
43 22 0:52 / /twice rw - nfs server:/twice rw
44 22 8:3 / /twice rw - ext4 /dev/sdc1 rw
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(storage, "MOUNTS", tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/données/sweep.db", "nfs4"),
        ("/home/me/sweep.db", "nfs4"),
        ("/home/me/scratch/sweep.db", "xfs"),
        ("/homely/sweep.db", "ext4"),
        ("/with space/a/sweep.db", "fuse.gcsfuse"),
        ("/twice/sweep.db", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_mount(mounts: None, path: str, kind: str) -> None:
    assert file_system(Path(path)) == kind


def test_sqlite_on_a_network_file_system_is_refused(mounts: None) -> None:
    with pytest.raises(ConfigError, match=r"/home/me/sweep.db lies on a network file system \(nfs4\)"):
        Storage("sqlite:////home/me/sweep.db")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("sweep.log", "no database's address"),
        ("journal:///sweep.log", "journal is not supported"),
        ("oracle://host/name", "oracle is not supported"),
        ("sqlite://", "need a file"),
        ("sqlite:///:memory:", "need a file"),
        ("postgresql://me:secret@127.0.0.1:1/name", "cannot be opened"),
        ("postgresql://127.0.0.1:1/name?user=me&password=secret", "cannot be opened"),
        ("sqlite:///x.db?password=secret", "need a file"),
    ],
)
def test_an_address_that_cannot_be_used_is_told_without_its_password(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Storage(address)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_drivers_are_those_that_the_extras_install() -> None:
    assert parsed("postgresql://h/n").drivername == "postgresql+psycopg"
    assert parsed("mysql://h/n").drivername == "mysql+pymysql"
    assert parsed("postgresql+psycopg2://h/n").drivername == "postgresql+psycopg2"


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "sweep.db").write_text(
        "not a database, but a text that is long enough to be read as one\n" * 20
    )
    with pytest.raises(ConfigError, match="cannot be opened"):
        Storage(f"sqlite:///{tmp_path / 'sweep.db'}")


def _count(address: str, file: Path, times: int) -> None:
    held = Storage(address)
    for _ in range(times):
        with held.locked(), held.locked():  # whoever holds it may hold it again
            number = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(number + 1))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_lock_is_for_one_thread_of_one_process(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = f"sqlite:///{tmp_path / 'sweep.db'}"
    if kind == "postgres":
        address = request.getfixturevalue("postgres_address")
    file = tmp_path / "count"
    file.write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(address, file, 20)) for _ in range(2)]
    for worker in workers:
        worker.start()
    threads = [threading.Thread(target=_count, args=(address, file, 20)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for each in [*workers, *threads]:
        each.join()
    assert file.read_text() == "80"


def test_a_database_that_is_gone_for_a_while_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, waited = Storage(f"sqlite:///{tmp_path / 'sweep.db'}"), []
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    lines: list[str] = []
    calls = iter([OperationalError("select", {}, Exception("server closed")), None])

    def work() -> str:
        if (fault := next(calls)) is not None:
            raise fault
        return "done"

    assert held.patiently(work, lines.append) == "done"
    assert len(waited) == 1
    assert "server closed" in lines[0]

    def never() -> None:
        raise sqlalchemy.exc.OperationalError("select", {}, Exception("server closed"))

    with pytest.raises(MachineError, match="does not answer"):
        held.patiently(never)
    assert 60 < sum(waited) < 600


HOLDER = """
import sys, time
from dynrec_jax.sweep.storage import Storage
with Storage(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_process_that_is_stopped_while_it_holds_the_lock_stops_nobody_else(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = f"sqlite:///{tmp_path / 'sweep.db'}"
    if kind == "postgres":
        address = request.getfixturevalue("postgres_address")
    program = HOLDER.replace("Storage(sys.argv[1])", "Storage(sys.argv[1], 1.0)")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program, address], stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with Storage(address, 1.0).locked():
                assert time.monotonic() - began < 30
        finally:
            holder.kill()


def test_whoever_stands_still_while_it_opens_a_database_opens_it_again(
    postgres_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [1.8, 0.0]

    class Late(optuna.storages.RDBStorage):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            time.sleep(slow.pop(0))  # the lock is held for one second, and then taken away
            super().__init__(*arguments, **named)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Late)
    storage = Storage(postgres_address, hold=1.0)
    assert slow == []
    with storage.locked():
        assert storage.trials.get_all_studies() is not None
