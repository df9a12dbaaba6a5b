"""Folders and files of object stores, copied to this machine before they are read.

A copy lies in the cache, by its address; what has not changed since is not fetched again.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from dynrec_jax.data.cache import default_cache_dir
from dynrec_jax.errors import DataError, MachineError, one_line
from dynrec_jax.files import temporary_name, write_whole

# What fsspec calls the stores; each but `memory`, which is this process's own, needs a package of its own.
STORES = ("gs", "gcs", "s3", "s3a", "az", "abfs", "hf", "memory")
STAMPS = ("etag", "ETag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
LEFT_OUT = ("damaged/", ".tmp-")  # what nobody opens
KNOWN = ".fetched.json"


def is_remote(path: str) -> bool:
    """Whether a path is an address of an object store."""
    return "://" in path


def fetched(address: str, cache_dir: str | Path = "") -> Path:
    """A copy of a folder or a file on this machine's disk; a path of this machine as it is.

    Args:
      address: such as `gs://bucket/runs/shop`, or a path.
      cache_dir: where copies lie; the default cache where empty.

    Raises:
      DataError: a store that is not known, or nothing is there.
      MachineError: the store cannot be reached, or its package is not installed; the disk is full.
    """
    if not is_remote(address):
        return Path(address)
    store = address.partition("://")[0]
    if store not in STORES:
        raise DataError(
            f"{address}: {store} is no store that is read here; expected one of {', '.join(STORES)}"
        )
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(address)
        found = files.find(root, detail=True)
    except ImportError as error:
        raise MachineError(f"{address}: {one_line(error)}") from None
    except Exception as error:  # each store has its own kinds
        raise MachineError(f"{address}: cannot be read ({type(error).__name__}: {one_line(error)})") from None
    if not found:
        raise DataError(f"{address}: nothing is there")
    base = root.rstrip("/")
    names = {"" if name == base else name[len(base) :].lstrip("/"): info for name, info in found.items()}
    wanted = {name: info for name, info in names.items() if not any(each in name for each in LEFT_OUT)}
    folder = (
        Path(cache_dir or default_cache_dir()) / "fetched" / hashlib.sha256(address.encode()).hexdigest()[:16]
    )
    here = folder / PurePosixPath(base).name
    _copy(address, files, wanted, here)
    return here


def _copy(address: str, files: Any, wanted: dict[str, Any], here: Path) -> None:
    record = here.with_name(f".{here.name}{KNOWN}")
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    stamps = {name: _stamp(info) for name, info in wanted.items()}
    try:
        for name in sorted(wanted):
            place = here / name if name else here
            if here not in (place, *place.parents) or ".." in PurePosixPath(name).parts:
                raise DataError(f"{address}: holds {name!r}, which lies outside of it")
            if (
                known.get(name) == stamps[name]
                and place.is_file()
                and place.stat().st_size == wanted[name]["size"]
            ):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(place)
            try:
                files.get_file(wanted[name]["name"], str(temporary))
                temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)
        for name in known.keys() - wanted.keys():  # what is gone there is gone here
            (here / name).unlink(missing_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(stamps))
    except (DataError, MachineError):
        raise
    except Exception as error:  # each store has its own kinds
        raise MachineError(
            f"{address}: cannot be copied ({type(error).__name__}: {one_line(error)})"
        ) from None


def _stamp(info: dict[str, Any]) -> str:
    """What changes where a file does."""
    return " ".join([str(info.get("size")), *(str(info[key]) for key in STAMPS if key in info)])
