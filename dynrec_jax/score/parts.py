"""The output folder of scoring: Parquet parts that are whole or not there, and a manifest that says whose they are."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynrec_jax.data.arrow import to_arrow
from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.evaluate.recommender import Lists
from dynrec_jax.files import is_temporary, remove_temporary, temporary_name, write_whole

# Readers of Parquet folders (pandas, Arrow, Spark) leave out files that begin with an underscore.
MANIFEST = "_score.json"
SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
)


class Parts:
    """A folder of `part-00000-of-00007.parquet` files that one job, or its continuation, writes."""

    def __init__(self, out: Path, manifest: dict[str, Any], number: int):
        """Makes the folder, or goes on with the one that an interrupted job of the same manifest left.

        Raises:
          ConfigError: the folder belongs to another job, or is something else.
          MachineError: it cannot be written.
        """
        self.out = out
        self._number = number
        self._manifest = {**manifest, "parts": number}
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out}: is a file; choose another --out")
        found = read_manifest(out / MANIFEST)
        if found is not None:
            changed = sorted(
                key for key in {*found, *self._manifest} if found.get(key) != self._manifest.get(key)
            )
            if changed:
                told = "; ".join(
                    f"{key}: {found.get(key)!r} -> {self._manifest.get(key)!r}" for key in changed
                )
                raise ConfigError(f"{out}: holds the output of another job ({told}); choose another --out")
            remove_temporary(out)
            return
        if out.exists() and any(path for path in out.iterdir() if not is_temporary(path)):
            raise ConfigError(f"{out}: exists and is not the output of scoring; choose another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
            remove_temporary(out)
            write_whole(out / MANIFEST, json.dumps(self._manifest, indent=2) + "\n")
        except (NotADirectoryError, PermissionError) as error:
            raise ConfigError(
                f"{out}: no folder can be made there ({error.strerror}); choose another --out"
            ) from None
        except OSError as error:
            raise MachineError(f"{out}: cannot be written ({error})") from None

    def path(self, part: int) -> Path:
        """Where a part lies."""
        return self.out / part_name(part, self._number)

    def done(self, part: int, rows: int) -> bool:
        """Whether a part is there with this many rows."""
        try:
            return pq.read_metadata(self.path(part)).num_rows == rows
        except (OSError, pa.ArrowException):
            return False

    def write(self, part: int, users: pa.Array, lists: Lists, items: pa.Array) -> None:
        """Writes a part under a temporary name and renames it when it is on the disk.

        Raises:
          MachineError: the disk is full or fails; nothing that looks whole is left.
        """
        path = self.path(part)
        temporary = temporary_name(path)
        try:
            with temporary.open("wb") as file:
                pq.write_table(to_table(users, lists, items), file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise MachineError(
                f"{path}: cannot be written ({error}); complete parts are kept, and the same command goes on from them"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)


def to_table(users: pa.Array, lists: Lists, items: pa.Array) -> pa.Table:
    """Columns user_id, item_ids, scores; places that could not be filled are left out of the lists."""
    real = lists.ids > 0
    offsets = to_arrow(np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32))
    ids = items.take(to_arrow(lists.ids[real] - 1)).cast(pa.string())
    scores = to_arrow(lists.scores[real])
    columns = [users.cast(pa.string()), pa.ListArray.from_arrays(offsets, ids)]
    return pa.Table.from_arrays([*columns, pa.ListArray.from_arrays(offsets, scores)], schema=SCHEMA)


def part_name(part: int, number: int) -> str:
    """The file of a part, of so many."""
    return f"part-{part:05d}-of-{number:05d}.parquet"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a folder's manifest says; None where it has none. Raises ConfigError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise ConfigError(f"{path}: is damaged; remove the folder, or choose another --out") from None
    return found if isinstance(found, dict) else {}
