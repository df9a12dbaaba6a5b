"""Folders and files of object stores, copied to this machine before they are read.

A copy lies in the cache, by its address; what has not changed since is not fetched again, and a copy that was cut short
goes on with what it lacks.
"""

import hashlib
import json
import re
import time
from pathlib import Path, PurePosixPath
from typing import Any

from dynrec_jax.data.cache import default_cache_dir
from dynrec_jax.errors import DataError, MachineError, one_line
from dynrec_jax.files import held, remove_temporary, sync, temporary_name, write_whole

# What fsspec calls the stores; each but `memory`, which is this process's own, needs a package of its own.
STORES = ("gs", "gcs", "s3", "s3a", "az", "abfs", "hf", "memory")
# What changes where a file does, as the stores call it. A file that has none of them is fetched each time: weights of
# another training have the same size.
STAMPS = (
    *("etag", "ETag", "md5Hash", "blob_id", "generation"),
    *("mtime", "LastModified", "last_modified", "updated", "created"),
)
LEFT_OUT = ("damaged", ".lock")  # folders and files that nobody opens
UNFINISHED = (".tmp-", ".orbax-checkpoint-tmp")  # in the names of those that are still written
KNOWN = ".fetched.json"
EVERY = 5.0  # seconds after which what has come is noted, so that a killed process has not fetched it in vain
SECRET = re.compile(
    r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)|(?<=\?)[^\s'\"]+"
)  # passwords and signatures of addresses

Listed = dict[
    str, tuple[str, dict[str, Any]]
]  # names below the address -> (the store's own, what it tells of it)


def is_remote(path: str) -> bool:
    """Whether a path is an address of an object store."""
    return "://" in path


def store_of(address: str) -> tuple[Any, str]:
    """The file system (fsspec's) of an address, and the path there.

    Raises:
      DataError: a store that is not known, or no path of one.
      MachineError: it cannot be reached, or its package is not installed.
    """
    told = without_secrets(address)
    store, _, place = address.partition("://")
    if store not in STORES:
        raise DataError(f"{told}: {store} is no store that is read here; expected one of {', '.join(STORES)}")
    if "::" in place or {".", ".."} & set(place.split("/")):
        raise DataError(f"{told}: expected {store}://BUCKET/PATH, without :: and ..")
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(address)
    except Exception as error:  # each store has its own kinds
        raise MachineError(f"{told}: {reason(error)}") from None
    return files, str(root)


def fetched(address: str, cache_dir: str | Path = "") -> Path:
    """A copy of a folder or a file on this machine's disk; a path of this machine as it is.

    One process of this machine fetches an address at a time; who comes later finds what is there.

    Args:
      address: such as `gs://bucket/runs/shop`, or a path.
      cache_dir: where copies lie; the default cache where empty.

    Raises:
      DataError: a store that is not known, or nothing is there.
      MachineError: the store cannot be reached, or its package is not installed; what came is not what is there; the
        disk is full.
    """
    if not is_remote(address):
        return Path(address)
    told = without_secrets(address)
    files, root = store_of(address)
    base = root.rstrip("/")
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    folder = Path(cache_dir or default_cache_dir()) / "fetched" / digest
    here = folder / (PurePosixPath(base).name or "root")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder, wait=True):
            _copy(told, files, _listed(told, files, base or root), here)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written ({error}); {told} is copied there") from None
    return here


def _listed(told: str, files: Any, base: str) -> Listed:
    """The files at or below an address; raises as `fetched`."""
    try:
        files.invalidate_cache()  # a listing that this process had before says nothing of now
        found = files.find(base, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as error:
        raise MachineError(f"{told}: cannot be read ({reason(error)})") from None
    if not found:
        raise DataError(f"{told}: nothing is there")
    listed: Listed = {}
    for whole, info in found.items():
        # Consoles leave such where they show a folder.
        if whole.endswith("/") or info.get("type") == "directory":
            continue
        name = "" if whole == base else whole.removeprefix(f"{base.rstrip('/')}/")
        if name == whole or not _is_below(name):
            raise DataError(f"{told}: holds {whole!r}, which is no file below it")
        parts = name.split("/")
        if set(LEFT_OUT) & set(parts) or any(word in part for part in parts for word in UNFINISHED):
            continue
        listed[name] = whole, info
    return listed


def _is_below(name: str) -> bool:
    """Whether a name leads to a file of a folder, or is the empty one of a file that was asked for itself."""
    return not name or not {"", ".", ".."} & set(name.split("/"))


def _copy(told: str, files: Any, wanted: Listed, here: Path) -> None:
    """Makes `here` what is wanted; raises MachineError."""
    record = here.with_name(f".{here.name}{KNOWN}")
    try:
        known = dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    known = {name: stamp for name, stamp in known.items() if _is_below(name)}
    for name in known.keys() - wanted.keys():  # what is gone there is gone here
        _remove(here, name)
    there = {
        name: known[name] for name in known.keys() & wanted.keys() if _is_there(here, name, known, wanted)
    }
    missing = sorted(wanted.keys() - there.keys())
    if there == known and not missing:
        return
    # First of all the record says no more than stays true, however this ends.
    write_whole(record, json.dumps(there))
    noted = time.monotonic()
    try:
        for name in missing:
            _fetch(told, files, *wanted[name], here / name if name else here)
            there[name] = _stamp(wanted[name][1])
            if time.monotonic() - noted > EVERY:
                write_whole(record, json.dumps(there))
                noted = time.monotonic()
    finally:
        write_whole(record, json.dumps(there))


def _is_there(here: Path, name: str, known: dict[str, Any], wanted: Listed) -> bool:
    """Whether a file was fetched and has not changed since, in the store or here."""
    place, info = here / name if name else here, wanted[name][1]
    stamp = _stamp(info)
    return (
        stamp is not None
        and known[name] == stamp
        and place.is_file()
        and place.stat().st_size == info.get("size")
    )


def _fetch(told: str, files: Any, whole: str, info: dict[str, Any], place: Path) -> None:
    """Copies one file, which is there whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_temporary(place.parent)
    temporary = temporary_name(place)
    try:
        try:
            files.get_file(whole, str(temporary))
        except Exception as error:
            raise MachineError(
                f"{told}: {whole} cannot be copied ({reason(error)}); the same command goes on with what is missing"
            ) from None
        came, size = temporary.stat().st_size, info.get("size")
        if size is not None and came != size:
            raise MachineError(
                f"{told}: {came:,} bytes of {whole} came, and {size:,} are listed: it has changed, or was cut off; the "
                "same command goes on with what is missing"
            )
        sync(temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _remove(here: Path, name: str) -> None:
    """Removes a file that was fetched, and folders that are empty without it: one would look like a run's damage."""
    place = here / name if name else here
    place.unlink(missing_ok=True)
    for parent in place.parents:
        if parent == here.parent or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()


def _stamp(info: dict[str, Any]) -> str | None:
    """What changes where a file does; None where the store tells nothing of the kind."""
    found = [str(info[key]) for key in STAMPS if info.get(key)]
    return " ".join([str(info.get("size")), *found]) if found else None


def reason(error: Exception) -> str:
    """What a store's error says, without passwords."""
    return without_secrets(f"{type(error).__name__}: {one_line(error)}")


def without_secrets(text: str) -> str:
    """A text without the passwords and signatures of addresses in it."""
    return SECRET.sub("…", text)
