"""The manifest of a checkpoint: what it holds, and how anyone can tell that it still does.

A checkpoint is a folder named by its step. Its `manifest.json` has a body, which is the step, the validation value,
the run's progress, the digest of every leaf and the size and SHA-256 of every file, and beside it the body's own
SHA-256, the seal. It is written last: a folder without one was never finished, or is damaged.
"""

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dynrec_jax.errors import DataError, one_line
from dynrec_jax.files import write_whole

FORMAT = 1
NAME = "manifest.json"
EARLIER = "_CHECKPOINT_METADATA"  # what checkpoints have that were written before there were manifests
SMALL = 1 << 20  # bytes of a file that costs nothing to read whole
# Why a file cannot be read although nothing is wrong with it.
ELSEWHERE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Damaged(DataError):
    """A checkpoint is not as it was written; the message says what of it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      step: of the run.
      value: the validation metric of this step, where it was measured.
      progress: where the run stands besides.
      leaves: of each leaf by name: [digest, shape, type].
      files: of each file by its path in the folder: [bytes, SHA-256].
    """

    step: int
    value: float | None
    progress: dict[str, Any]
    leaves: dict[str, list[Any]]
    files: dict[str, list[Any]]

    def part(self, trees: Iterable[str]) -> "Manifest":
        """What it says of the leaves and files of some of its trees."""
        below = tuple(f"{tree}/" for tree in trees)
        leaves = {name: entry for name, entry in self.leaves.items() if name.startswith(below)}
        files = {name: entry for name, entry in self.files.items() if name.startswith(below)}
        return replace(self, leaves=leaves, files=files)


def describe(digests: Sequence[str], arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The manifest's entries for arrays by name."""
    return {
        name: [digest, list(array.shape), str(array.dtype)]
        for digest, (name, array) in zip(digests, arrays.items(), strict=True)
    }


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Writes the manifest of a folder that is complete but for it; returns it with the files that are there."""
    files = {name: [path.stat().st_size, _sha256(path)] for name, path in _files(folder)}
    whole = replace(manifest, files=files)
    write(folder, whole)
    return whole


def write(folder: Path, manifest: Manifest) -> None:
    """Writes a manifest whole, or not at all; in place of the one that is there."""
    write_whole(folder / NAME, json.dumps(to_json(manifest), indent=1) + "\n")


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest with its seal."""
    body = {"format": FORMAT, **asdict(manifest)}
    return {"body": body, "sha256": _seal_of(body)}


def from_json(told: Any) -> Manifest:
    """The manifest that `to_json` gave; raises Damaged where the seal does not fit."""
    try:
        body = told["body"]
        if told["sha256"] != _seal_of(body):
            raise Damaged(f"{NAME} is not what was written")
        if body["format"] != FORMAT:
            raise DataError(f"its format is {body['format']}, and this version reads {FORMAT}")
        return Manifest(**{name: value for name, value in body.items() if name != "format"})
    except (KeyError, TypeError):
        raise Damaged(f"{NAME} is not what was written") from None


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint in a folder.

    Raises:
      Damaged: it is missing, was changed, or is of another step than the folder's name says.
      DataError: the checkpoint is of another version.
    """
    try:
        text = (folder / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if (folder / EARLIER).exists():
            raise DataError(
                f"{folder}: was written by an earlier version, without digests; train again, or open it with that "
                "version"
            ) from None
        raise Damaged(f"{NAME} is missing") from None
    except OSError as error:
        if error.errno in ELSEWHERE:
            raise
        raise Damaged(f"{NAME} cannot be read ({error.strerror})") from None
    try:
        manifest = from_json(json.loads(text))
    except (ValueError, RecursionError):
        raise Damaged(f"{NAME} is not what was written") from None
    except Damaged:
        raise
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    if str(manifest.step) != folder.name:
        raise Damaged(f"it is the checkpoint of step {manifest.step}")
    return manifest


def cheap_check(folder: Path, manifest: Manifest) -> list[str]:
    """What a look at sizes, and at the small files' content, finds wrong."""
    found = (_fault(folder / name, name, entry, SMALL) for name, entry in manifest.files.items())
    return [fault for fault in found if fault]


def full_check(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """What reading all of the files finds wrong, or of one of `parts` parts of them."""
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))
    found = (_fault(folder / name, name, manifest.files[name], None) for name in largest_first[part::parts])
    return [fault for fault in found if fault]


def _fault(path: Path, name: str, entry: list[Any], up_to: int | None) -> str | None:
    size, digest = entry
    try:
        if not path.is_file():
            return f"{name} is missing"
        if (there := path.stat().st_size) != size:
            return f"{name} has {there} bytes, not {size}"
        if (up_to is None or size <= up_to) and _sha256(path) != digest:
            return f"{name} is not what was written"
    except OSError as error:
        if error.errno in ELSEWHERE:
            raise
        return f"{name} cannot be read ({error.strerror or one_line(error)})"
    return None


def _seal_of(body: Any) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
