"""One save, as one process sees it: written in a thread, then sealed and renamed by process 0."""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynrec_jax.errors import HeldRunError, one_line
from dynrec_jax.files import sync, sync_tree
from dynrec_jax.train import arrays, manifest
from dynrec_jax.train.manifest import Manifest

BUSY, DONE = "busy", "done"
# The operating system's words, which TensorStore keeps. Disks of a network have faults that pass.
FULL = ("No space left", "quota exceeded")
PASSING = ("Input/output error", "Stale file handle", "Remote I/O error", "Connection timed out")


class Save:
    """A save under way.

    Attributes:
      manifest: of what is saved; once it is committed, with the files.
      folder: where it is written.
      committing: whether the arrays are written in all processes.
      error: what went wrong in this process.
    """

    def __init__(self, body: Manifest, folder: Path):
        self.manifest, self.folder = body, folder
        self.committing = False
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def attempt(self, work: Callable[[], Any]) -> Any:
        """Does a part of the work, unless one before went wrong; remembers what goes wrong."""
        if self.error is None:
            try:
                return work()
            except Exception as error:
                self.error = error
        return None

    def run(self, work: Callable[[], Any]) -> None:
        """The same in the background."""
        self._thread = threading.Thread(target=self.attempt, args=(work,), name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Returns when nothing runs in the background."""
        if self._thread is not None:
            self._thread.join()

    def stands(self) -> Any:
        """How it stands in this process, as it travels: BUSY, DONE, or what went wrong."""
        if self._thread is not None and self._thread.is_alive():
            return BUSY
        if self.error is None:
            return DONE
        found = {"full": full_disk(self.error), "passing": words_in(self.error, PASSING)}
        return {**found, "held": isinstance(self.error, HeldRunError), "told": one_line(self.error)}

    def write(self, trees: Mapping[str, Any], then: Callable[[], None]) -> None:
        """Copies this process's part to the host; writes it in the background, and does what comes then."""
        wait = self.attempt(lambda: arrays.start_to_write(self.folder, trees))

        def work() -> None:
            wait()
            then()

        self.run(work)

    def commit(self, name: Path, trees: Iterable[str], may_write: Callable[[], None]) -> None:
        """Has the whole on the disk and, if it still may, gives it its name; for one process, when all have written."""
        arrays.merge(self.folder, trees)
        self.manifest = manifest.seal(self.folder, self.manifest)
        sync_tree(self.folder)
        may_write()
        os.rename(self.folder, name)
        try:
            sync(name.parent)
        except OSError:  # whether it would outlast a power failure is not known
            os.rename(name, self.folder)
            raise


def full_disk(error: BaseException) -> str | None:
    """The words for a full disk in what was raised, or None where it was something else."""
    words = words_in(error, FULL)
    return f"{words} on device" if words == FULL[0] else words


def of_the_disk(error: BaseException) -> bool:
    """Whether it is the operating system that refused, and not a mistake of ours."""
    return (
        isinstance(error, OSError)
        or words_in(error, ("os_error_code", "OS error", *FULL, *PASSING)) is not None
    )


def words_in(error: BaseException, known: Sequence[str]) -> str | None:
    """Which of some words stand in what was raised, or in what that came from."""
    link: BaseException | None = error
    while link is not None:
        for words in known:
            if words.lower() in str(link).lower():
                return words
        link = link.__cause__ or link.__context__
    return None


def remove(folder: Path) -> None:
    """Removes a checkpoint: at once for those who look, and then from the disk."""
    going = folder.with_name(f"{folder.name}{arrays.UNFINISHED}-removed")
    with contextlib.suppress(OSError):  # the next start of the run sees it again
        os.rename(folder, going)
        shutil.rmtree(going, ignore_errors=True)


def remove_unfinished(folder: Path, start: str = "") -> None:
    """Removes what saves that failed or were killed have left; those of one start alone, where it is named."""
    for path in folder.glob(f"*{arrays.UNFINISHED}*{start and f'{start}*'}"):
        shutil.rmtree(path, ignore_errors=True)
