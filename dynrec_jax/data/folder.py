"""Folders that are whole or not there: written under a temporary name, renamed at the end."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynrec_jax.errors import DataError
from dynrec_jax.files import is_running, sync, sync_tree


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `out`, which becomes `out` when the block ends well.

    On any exception it is removed, with the parents that were made for it. What killed runs left is removed
    first.

    Raises:
      DataError: `out` exists, before or at the end, or its parent is a file.
    """
    refuse_existing(out)
    made = make_parents(out.parent)
    remove_leftovers(out)
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        refuse_existing(out)
        temporary.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            parent.rmdir() if not any(parent.iterdir()) else None
        raise


def refuse_existing(out: Path) -> None:
    """Raises DataError where something of that name exists already."""
    if os.path.lexists(out):
        raise DataError(
            f"{out}: exists already and is left as it is; choose another --out or remove it first"
        )


def make_parents(parent: Path) -> list[Path]:
    """Creates a folder and its parents; gives those that were not there, innermost first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{parent}: is not a folder; choose another --out") from None
    return missing


def remove_leftovers(out: Path) -> None:
    """Removes temporary folders of killed runs that were writing `out`."""
    prefix = f".{out.name}.tmp-"
    for folder in out.parent.glob(f"{glob.escape(prefix)}*"):
        pid = folder.name.removeprefix(prefix)
        if pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
