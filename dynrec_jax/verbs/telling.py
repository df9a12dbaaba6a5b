"""How a verb tells of long work that has no progress of its own, and keeps what it found."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dynrec_jax.errors import MachineError
from dynrec_jax.files import write_whole
from dynrec_jax.parallel.processes import Processes


def teller(processes: Processes) -> Callable[[str], None]:
    """Writes lines to standard error; of several processes, the first one does."""

    def say(line: str) -> None:
        if processes.first:
            print(line, file=sys.stderr, flush=True)

    return say


def write_json(path: Path, result: Mapping[str, Any]) -> Path:
    """Writes what was found, whole or not at all, and makes the folder around it; returns where.

    Raises:
      MachineError: it cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error})") from None
    return path
