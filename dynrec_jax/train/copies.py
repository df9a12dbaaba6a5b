"""A copy of a run folder in an object store: kept up to date while the run goes on, and what other machines begin with.

Of each checkpoint the manifest goes last, so that one that was cut short is seen not to be whole. The copy is no reason
for a run to end: what cannot be written is told, and tried again with the next checkpoint.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynrec_jax.data.remote import fetched, is_remote, reason, store_of, without_secrets
from dynrec_jax.errors import ConfigError, HeldRunError, MachineError, Preempted
from dynrec_jax.files import LOCK, is_temporary
from dynrec_jax.parallel.pulse import Pulse
from dynrec_jax.train import manifest
from dynrec_jax.train.attempts import FILE, tokens, tokens_of

CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
OWN = (DAMAGED, LOCK)  # what stays on this machine
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
      ConfigError: what lies at the address is no copy of the run that is here.
      DataError: there is no such store.
      MachineError: the store cannot be read, or the disk is full.
    """
    files, root = store_of(address)
    told, root = without_secrets(address), root.rstrip("/")
    try:
        files.invalidate_cache()
        if not files.exists(f"{root}/config.json"):
            return False
        there = tokens(_text(files, f"{root}/{FILE}"))
    except Exception as error:  # each store has its own kinds
        raise MachineError(f"{told}: cannot be read ({reason(error)})") from None
    if (folder / "config.json").exists():
        here = tokens_of(folder)
        if here[:1] != there[:1] or not here:
            raise ConfigError(
                f"--copy_to={told}: holds the copy of another run than {folder}; give an address where nothing is"
            )
        return False
    copied = fetched(address, cache_dir)
    # The config comes last: with it a folder is a run.
    for path in sorted(_parts(copied), key=lambda path: path.name == "config.json"):
        place = folder / path.relative_to(copied)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return True


@contextmanager
def kept(folder: Path, address: str, pulse: Pulse) -> Iterator[Callable[[], None]]:
    """Gives what has the copy of a run folder brought up to date; it is so at the end, unless that comes by an error.

    Raises:
      MachineError: at the end, the copy could not be written.
    """
    copies = Copies(folder, address, lambda line: sys.stderr.write(f"dynrec: {line}\n"))
    try:
        yield copies.update
    except Preempted:
        copies.close(pulse)
        raise
    copies.close(pulse)


class Copies:
    """Writes the copy in a thread: all that is new whenever it is told to."""

    def __init__(self, folder: Path, address: str, say: Callable[[str], object]):
        """`say` takes a line for the user; raises as `store_of`."""
        self._folder, self._say = folder, say
        self._told = without_secrets(address)
        self._files, root = store_of(address)
        self._root = root.rstrip("/")
        self._sent: dict[str, tuple[int, int]] = {}  # small files: when they were changed, and their size
        self._steps: dict[str, bytes] = {}  # what was copied of checkpoints: their manifests
        self._new, self._ending, self._owed = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def update(self) -> None:
        """Has what is new copied, in the background."""
        self._new.set()

    def close(self, pulse: Pulse) -> None:
        """Copies the rest, and returns when all is there; raises MachineError where that cannot be."""
        self._ending = True
        self._new.set()
        until = time.monotonic() + END_SECONDS
        with pulse.at("copy"):
            while self._thread.is_alive() and time.monotonic() < until:
                self._thread.join(1.0)
                pulse.beat()
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
        self._check_ours()
        steps: dict[str, list[Path]] = {}
        for path in _parts(self._folder):
            name = path.relative_to(self._folder)
            if name.parts[0] == CHECKPOINTS:
                steps.setdefault(name.parts[1], []).append(path)
                continue
            stamp = path.stat().st_mtime_ns, path.stat().st_size
            if self._sent.get(str(name)) != stamp:
                self._files.put_file(str(path), f"{self._root}/{name.as_posix()}")
                self._sent[str(name)] = stamp
        for step, paths in steps.items():
            self._copy_step(step, paths)
        # Those alone that this run has retired: what else lies there may be all that is left of a step.
        for step in [step for step in self._steps if not (self._folder / CHECKPOINTS / step).is_dir()]:
            if not (self._folder / DAMAGED / step).exists():
                self._files.rm(f"{self._root}/{CHECKPOINTS}/{step}", recursive=True)
            del self._steps[step]

    def _copy_step(self, step: str, paths: list[Path]) -> None:
        """A checkpoint: without a manifest until all else is there."""
        place = f"{self._root}/{CHECKPOINTS}/{step}"
        try:
            own = (self._folder / CHECKPOINTS / step / manifest.NAME).read_bytes()
            if self._steps.get(step) == own or _bytes(self._files, f"{place}/{manifest.NAME}") == own:
                self._steps[step] = own
                return
            if self._files.exists(place):  # of another start, or cut short
                self._files.rm(place, recursive=True)
            for path in paths:
                self._files.put_file(str(path), f"{self._root}/{path.relative_to(self._folder).as_posix()}")
            self._steps[step] = own
        except FileNotFoundError:
            if all(path.exists() for path in paths):
                raise
            # The run has retired that checkpoint in the meantime.

    def _check_ours(self) -> None:
        """Raises HeldRunError where a start that is not known here has written there."""
        there = tokens(_text(self._files, f"{self._root}/{FILE}"))
        if not set(there) <= set(tokens_of(self._folder)):
            raise HeldRunError("the run was started again elsewhere, and goes on there")


def _bytes(files: Any, place: str) -> bytes:
    try:
        return bytes(files.cat_file(place))
    except FileNotFoundError:
        return b""


def _text(files: Any, place: str) -> str:
    return _bytes(files, place).decode(errors="replace")


def _parts(folder: Path) -> Iterator[Path]:
    """The files of a run folder that belong into a copy; of a checkpoint the manifest last."""

    def order(path: Path) -> tuple[bool, bool, Path]:
        # With a config a folder is a run, and with a manifest a checkpoint is one.
        return path.is_relative_to(folder / CHECKPOINTS), path.name in (manifest.NAME, "config.json"), path

    for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=order):
        parts = path.relative_to(folder).parts
        unfinished = parts[0] == CHECKPOINTS and not (len(parts) > 2 and parts[1].isdigit())
        if parts[0] not in OWN and not unfinished and not is_temporary(path):
            yield path
