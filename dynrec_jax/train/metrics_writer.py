"""Metrics over time: JSON lines, and TensorBoard where it is asked for."""

import json
import math
import os
from pathlib import Path
from typing import Any

from dynrec_jax.errors import ConfigError
from dynrec_jax.files import write_whole


class MetricsWriter:
    """Appends to `metrics.jsonl`: one object a line, with `step` and scalars.

    Opened at a step, it drops the lines of later steps: what a killed run had reported beyond its checkpoint
    happens again. A last line that was cut off is dropped too.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool):
        """Raises ConfigError where TensorBoard is asked for and not installed."""
        board: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "config.logging.tensorboard: tensorboardX is not installed; "
                    "pip install 'dynrec-jax[tensorboard]'"
                ) from None
            board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        path = folder / "metrics.jsonl"
        _rewind(path, start)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._board = board

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of scalars; the file is flushed."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _rewind(path: Path, start: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))
