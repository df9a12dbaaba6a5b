"""A copy of a run folder in an object store: kept up to date while the run goes on, and what other machines begin with.

Of each checkpoint the manifest goes last, so that one that was cut short is seen not to be whole. The copy is no reason
for a run to end: what cannot be written is told, and tried again with the next checkpoint.
"""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dynrec_jax.data.remote import fetched, is_remote, reason, store_of, without_secrets
from dynrec_jax.errors import ConfigError, MachineError, Preempted
from dynrec_jax.files import LOCK, is_temporary
from dynrec_jax.train import manifest

CHECKPOINTS = "checkpoints"
OWN = ("damaged", LOCK)  # what stays on this machine
END_SECONDS = 600.0  # that the last copy may take behind the end of a run


def check_address(address: str) -> None:
    """Raises ConfigError, DataError or MachineError where no copy can be kept at an address."""
    if not is_remote(address):
        raise ConfigError(
            f"--copy_to={address}: expected the address of a folder in an object store, as gs://bucket/runs/shop"
        )
    store_of(address)


def begin_from(address: str, folder: Path, cache_dir: str = "") -> bool:
    """Makes a run folder that is not there yet from its copy; returns whether it did.

    Raises:
      DataError: there is no such store.
      MachineError: the store cannot be read, or the disk is full.
    """
    if (folder / "config.json").exists():
        return False
    files, root = store_of(address)
    try:
        files.invalidate_cache()
        if not files.exists(f"{root.rstrip('/')}/config.json"):
            return False
    except Exception as error:  # each store has its own kinds
        raise MachineError(f"{without_secrets(address)}: cannot be read ({reason(error)})") from None
    here = fetched(address, cache_dir)
    # The config comes last: with it a folder is a run.
    for path in sorted(_parts(here), key=lambda path: path.name == "config.json"):
        place = folder / path.relative_to(here)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return True


@contextmanager
def kept(folder: Path, address: str) -> Iterator[Callable[[], None]]:
    """Gives what has the copy of a run folder brought up to date; it is so at the end, unless that comes by an error.

    Raises:
      MachineError: at the end, the copy could not be written.
    """
    copies = Copies(folder, address, lambda line: sys.stderr.write(f"dynrec: {line}\n"))
    try:
        yield copies.update
    except Preempted:
        copies.close()
        raise
    copies.close()


class Copies:
    """Writes the copy in a thread: all that is new whenever it is told to."""

    def __init__(self, folder: Path, address: str, say: Callable[[str], object]):
        """`say` takes a line for the user; raises as `store_of`."""
        self._folder, self._say = folder, say
        self._told = without_secrets(address)
        self._files, root = store_of(address)
        self._root = root.rstrip("/")
        self._new, self._ending, self._owed = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def update(self) -> None:
        """Has what is new copied, in the background."""
        self._new.set()

    def close(self) -> None:
        """Copies the rest, and returns when all is there; raises MachineError where that cannot be."""
        self._ending = True
        self._new.set()
        self._thread.join(END_SECONDS)
        if self._owed or self._thread.is_alive():
            raise MachineError(
                f"{self._told}: the copy of {self._folder} is not up to date; what is here is whole, and the same "
                "command copies the rest"
            )

    def _run(self) -> None:
        while True:
            self._new.wait()
            self._new.clear()
            ending = self._ending
            try:
                self._copy()
                self._owed = False
            except Exception as error:  # each store has its own kinds
                self._owed = True
                self._say(
                    f"{self._told}: cannot be written ({reason(error)}); tried again with the next checkpoint"
                )
            if ending:
                return

    def _copy(self) -> None:
        self._files.invalidate_cache()
        there = self._there()
        for path in _parts(self._folder):
            name = path.relative_to(self._folder).as_posix()
            done = name.startswith(f"{CHECKPOINTS}/") and path.name != manifest.NAME
            try:
                # What a checkpoint holds does not change any more, but for its manifest.
                if not done or there.get(name) != path.stat().st_size:
                    self._files.put_file(str(path), f"{self._root}/{name}")
            except FileNotFoundError:
                if path.exists():
                    raise
                # The run has retired that checkpoint in the meantime.
        for step in {name.split("/")[1] for name in there if name.startswith(f"{CHECKPOINTS}/")}:
            if not (self._folder / CHECKPOINTS / step).is_dir():
                self._files.rm(f"{self._root}/{CHECKPOINTS}/{step}", recursive=True)

    def _there(self) -> dict[str, int]:
        try:
            found = self._files.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(f"{self._root}/"): int(info["size"]) for name, info in found.items()}


def _parts(folder: Path) -> Iterator[Path]:
    """The files of a run folder that belong into a copy; of a checkpoint the manifest last."""

    def order(path: Path) -> tuple[bool, bool, Path]:
        return path.is_relative_to(folder / CHECKPOINTS), path.name == manifest.NAME, path

    for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=order):
        parts = path.relative_to(folder).parts
        unfinished = parts[0] == CHECKPOINTS and not (len(parts) > 2 and parts[1].isdigit())
        if parts[0] not in OWN and not unfinished and not is_temporary(path):
            yield path
