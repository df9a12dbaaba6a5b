"""The output folder of scoring: parts that are whole or not there, and whose they are.

`_score.json` says which job the folder is of, and `_parts.log` the rows, size and SHA-256 of each part, written
before the part is there. What a part's line does not describe is no part: it is made again. Several workers may fill
one folder; the first good copy of a part stays.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.files import held, is_temporary, remove_temporary, sync, temporary_name, write_whole
from dynrec_jax.score.formats import FORMATS

# Readers of Parquet folders (pandas, Arrow, Spark) leave out files that begin with an underscore or a dot.
MANIFEST = "_score.json"
RECORDS = "_parts.log"

Record = dict[str, Any]


class Parts:
    """A folder of `part-00000-of-00007.parquet` files that one job, or its continuation, writes."""

    def __init__(self, out: Path, manifest: dict[str, Any], number: int, file_format: str = "parquet"):
        """Makes the folder, or goes on with the one that an interrupted job of the same manifest left.

        Raises:
          ConfigError: the folder belongs to another job, or is something else.
          MachineError: it cannot be written.
        """
        self.out = out
        self._number = number
        self._format = file_format
        self._manifest = {**manifest, "parts": number}
        self._records = _Records(out / RECORDS)
        if check_folder(out, self._manifest):
            remove_temporary(out)
            return
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
        return self.out / part_name(part, self._number, self._format)

    def done(self, rows: Sequence[int]) -> list[int]:
        """The parts that are there, by the rows that each must have: read whole, and compared with their digests."""
        self._records.read()
        return [part for part, count in enumerate(rows) if self._good(part, count)]

    def _good(self, part: int, rows: int) -> bool:
        path = self.path(part)
        record = self._records.known.get(path.name, {})
        return record.get("rows") == rows and is_whole(path, record)

    def write(self, part: int, table: pa.Table) -> None:
        """Writes a part under a temporary name, and renames it when it and its digest are on the disk.

        Raises:
          MachineError: the disk is full or fails; nothing that looks whole is left.
        """
        path = self.path(part)
        temporary = temporary_name(path)
        try:
            with temporary.open("wb+") as file:
                FORMATS[self._format](table, file)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = temporary.stat().st_size
            record = {"part": path.name, "rows": table.num_rows, "bytes": size, "sha256": digest}
            with held(self.out, wait=True):
                self._commit(part, temporary, record)
        except OSError as error:
            raise MachineError(
                f"{path}: cannot be written ({error}); complete parts are kept, and the same command goes on from them"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _commit(self, part: int, temporary: Path, record: Record) -> None:
        self._records.read()
        if self._good(part, record["rows"]):
            return  # another worker's: what is good is never replaced
        if self._records.known.get(record["part"]) != record:
            self._records.add(record)
        os.replace(temporary, self.path(part))
        sync(self.out)

    def finish(self) -> None:
        """Puts the parts' lines in order, once all parts are there: the folder is then the same however it was made.

        Raises:
          MachineError: they cannot be written.
        """
        try:
            with held(self.out, wait=True):
                self._records.put_in_order()
        except OSError as error:
            raise MachineError(f"{self.out / RECORDS}: cannot be written ({error})") from None


class _Records:
    """The lines of `_parts.log`; of several lines of a part the last counts.

    Attributes:
      known: by the part's name.
    """

    def __init__(self, path: Path):
        self._path = path
        self._end = 0  # of the lines that were read
        self.known: dict[str, Record] = {}

    def read(self) -> None:
        """Reads the lines that are new; what a kill cut off is no line."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._end:  # another worker put them in order
                    self._end = 0
                file.seek(self._end)
                content = file.read()
        except FileNotFoundError:
            return
        content = content[: content.rfind(b"\n") + 1]
        self._end += len(content)
        for line in content.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("part"), str):
                self.known[record["part"]] = record

    def add(self, record: Record) -> None:
        """Adds a line behind those that were read, on the disk when this returns."""
        new = not self._path.exists()
        with self._path.open("ab") as file:
            file.truncate(self._end)  # half a line that a kill left
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self._end += len(_line(record))
        self.known[record["part"]] = record
        if new:
            sync(self._path.parent)

    def put_in_order(self) -> None:
        """One line a part, by name."""
        self.read()
        lines = b"".join(_line(self.known[name]) for name in sorted(self.known))
        if lines and self._path.read_bytes() != lines:
            write_whole(self._path, lines)
            self._end = len(lines)


def records(folder: Path) -> dict[str, Record]:
    """What was written of each part of a folder, by its name."""
    found = _Records(folder / RECORDS)
    found.read()
    return found.known


def is_whole(path: Path, record: Record) -> bool:
    """Whether a part is there and is what was written: it is read whole."""
    try:
        if path.stat().st_size != record["bytes"]:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
    except (OSError, KeyError):
        return False


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def check_folder(out: Path, manifest: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder, which need not be there, holds the output of scoring.

    Args:
      out: the folder.
      manifest: of the job whose output it may hold; None for any.

    Raises:
      ConfigError: it holds the output of another job or something else, or no folder can be there.
    """
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise ConfigError(f"{file}: is a file; choose another --out")
    found = read_manifest(out / MANIFEST)
    others = [path for path in out.iterdir() if not is_temporary(path)] if out.exists() else []
    if found is None and others:  # perhaps of another worker, who has begun since
        found = read_manifest(out / MANIFEST)
    if found is None and others:
        raise ConfigError(f"{out}: exists and is not the output of scoring; choose another --out")
    if found is None or manifest is None:
        return found is not None
    changed = sorted(key for key in {*found, *manifest} if found.get(key) != manifest.get(key))
    if changed:
        told = "; ".join(f"{key}: {found.get(key)!r} -> {manifest.get(key)!r}" for key in changed)
        raise ConfigError(f"{out}: holds the output of another job ({told}); choose another --out")
    return True


def check_both(out: Path, names: Sequence[str]) -> None:
    """As `check_folder`, of a folder that holds several such outputs and nothing else."""
    for name in names:
        check_folder(out / name)
    if out.exists() and any(path.name not in names for path in out.iterdir()):
        raise ConfigError(f"{out}: holds more than the folders {' and '.join(names)}; choose another --out")


def part_name(part: int, number: int, file_format: str = "parquet") -> str:
    """The file of a part, of so many."""
    return f"part-{part:05d}-of-{number:05d}.{file_format}"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a folder's manifest says; None where it has none. Raises ConfigError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise ConfigError(f"{path}: is damaged; remove the folder, or choose another one") from None
    return found if isinstance(found, dict) else {}
