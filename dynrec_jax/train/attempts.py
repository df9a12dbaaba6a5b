"""The starts of a run: when the first was, and who writes in its folder now."""

import json
import os
import platform
import secrets
import time
from pathlib import Path
from typing import Any, NamedTuple

from dynrec_jax.errors import HeldRunError
from dynrec_jax.files import sync

FILE = "attempts.jsonl"


class Attempt(NamedTuple):
    """One start of a run.

    Attributes:
      number: how many came before it.
      token: tells it from all others.
      first: when the run was started first, in seconds since 1970.
    """

    number: int
    token: str
    first: float


def begin(folder: Path, step: int, processes: int) -> Attempt:
    """Notes a start in a run folder; from now on no earlier one may write checkpoints there.

    Args:
      folder: the run folder.
      step: of the newest checkpoint there.
      processes: how many there are.
    """
    path, now = folder / FILE, time.time()
    earlier = _read(path)
    attempt = Attempt(len(earlier), secrets.token_hex(8), float(earlier[0]["began"]) if earlier else now)
    line = {
        "attempt": attempt.number,
        "began": now,
        "step": step,
        "processes": processes,
        "machine": platform.node(),
        "pid": os.getpid(),
        "token": attempt.token,
    }
    with path.open("ab") as file:
        # A line that a full disk has cut off ends here.
        file.write((b"" if _ends_well(path) else b"\n") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(folder)
    return attempt


def check_current(folder: Path, attempt: Attempt) -> None:
    """Raises HeldRunError where the run was started again elsewhere, by somebody to whom this one seemed dead."""
    newest = (_read(folder / FILE) or [{}])[-1]
    if newest.get("token") != attempt.token:
        by = (
            f" by process {newest['pid']} of {newest['machine']}"
            if {"pid", "machine"} <= newest.keys()
            else ""
        )
        raise HeldRunError(
            f"{folder}: this run was started again{by}, and goes on there; this process has written nothing since, and "
            "ends"
        )


def tokens(text: str) -> list[str]:
    """The tokens of the starts that a file's text lists, the first start's first."""
    return [str(line["token"]) for line in _lines(text)]


def tokens_of(folder: Path) -> list[str]:
    """Those of a run folder; none where it has not been started yet."""
    return [str(line["token"]) for line in _read(folder / FILE)]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return _lines(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return []


def _lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            read = json.loads(line)
            float(read["began"]), str(read["token"])
        except (ValueError, KeyError, TypeError):
            continue
        found.append(read)
    return found


def _ends_well(path: Path) -> bool:
    return path.stat().st_size == 0 or path.read_bytes().endswith(b"\n")
