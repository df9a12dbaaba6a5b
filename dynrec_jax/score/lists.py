"""Lists that were written by scoring, read again a batch at a time."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from dynrec_jax import config as configs
from dynrec_jax.data.arrow import numbers
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.evaluate.recommender import GROUP_USERS
from dynrec_jax.parallel.digest import tree_digest
from dynrec_jax.score.formats import FORMATS
from dynrec_jax.score.options import LISTS, SPLITS
from dynrec_jax.score.parts import MANIFEST, RECORDS, is_whole, part_name, read_manifest, records
from dynrec_jax.workdir import Run

KINDS = {"user_id": pa.string(), "item_ids": pa.list_(pa.string())}
NEEDED = {
    **dict.fromkeys(("dataset", "config", "weights", "split"), str),
    **dict.fromkeys(("step", "k", "parts"), int),
    "filter_seen": bool,
}
AGAIN = "the same `dynrec score` goes on from the parts that are there"


class Written(NamedTuple):
    """An output folder of scoring, whole.

    Attributes:
      folder: where it lies.
      about: its manifest.
      files: its parts, in order.
    """

    folder: Path
    about: dict[str, Any]
    files: list[Path]


def open_written(folder: Path) -> Written:
    """Finds the parts of an output folder.

    Raises:
      DataError: it is none, its job is not done, or its manifest or a part is damaged.
    """
    about = read_manifest(folder / MANIFEST) if folder.is_dir() else None
    if about is None:
        raise DataError(f"{folder}: holds no {MANIFEST}; expected a folder that `dynrec score` wrote")
    if lacking := [key for key in NEEDED if key not in about]:
        raise DataError(f"{folder / MANIFEST}: has no {', '.join(lacking)}; score again")
    if (what := about.get("what", LISTS)) != LISTS:
        raise DataError(f"{folder}: holds --what={what}; expected lists for users")
    number, ending = about["parts"], about.get("file_format", "parquet")
    wrong = [key for key, kind in NEEDED.items() if type(about[key]) is not kind]
    wrong += [key for key in ("k", "parts") if key not in wrong and about[key] < 1]
    wrong += [] if ending in list(FORMATS) else ["file_format"]
    wrong += [] if about["split"] in SPLITS else ["split"]
    if wrong:
        raise DataError(f"{folder / MANIFEST}: {wrong[0]} is {about.get(wrong[0])!r}; score again")
    there = {path.name for path in folder.iterdir()}
    names = (part_name(part, number, ending) for part in range(number))
    if (first := next((name for name in names if name not in there), None)) is not None:
        found = sum(name.endswith(part_name(0, number, ending)[10:]) for name in there)
        raise DataError(
            f"{folder}: {number - found} of {number} parts are missing, the first is {first}; {AGAIN}"
        )
    files, known = [folder / part_name(part, number, ending) for part in range(number)], records(folder)
    for file in files:
        if not is_whole(file, known.get(file.name, {})):
            raise DataError(f"{file}: is not what {RECORDS} says was written; remove it, and {AGAIN}")
    return Written(folder, about, files)


def check_config(written: Written, workdir: Path, config: ml_collections.ConfigDict, content: str) -> None:
    """Whether lists may be of a run, before it is opened.

    Args:
      written: the lists.
      workdir: the run folder.
      config: of the run.
      content: the content hash of the dataset that the run is of.

    Raises:
      ConfigError: they are of another dataset or run, or of items that the run's dataset does not have.
    """
    about, folder = written.about, written.folder
    if about["dataset"] != content:
        raise ConfigError(
            f"{folder}: holds lists of dataset {about['dataset'][:12]}, and {workdir} was trained on {content[:12]}; "
            "give the run that made them"
        )
    if about["config"] != hashlib.sha256(configs.to_json(config).encode()).hexdigest():
        raise ConfigError(
            f"{folder}: holds lists of a run of another config, {about.get('workdir')}, than {workdir}; give the run "
            "that made them"
        )
    if about.get("items") is not None:
        raise ConfigError(
            f"{folder}: holds lists with items of --items, which no history has and no metric here is of; score without"
        )


def check_weights(written: Written, run: Run) -> None:
    """Raises ConfigError where lists were made by other weights than a run's, or are longer than its catalogue."""
    if written.about["k"] > run.items.number:
        raise ConfigError(
            f"{written.folder}: holds lists of {written.about['k']:,} items, and {run.path} has {run.items.number:,}; "
            "give the run that made them"
        )
    if written.about["weights"] != tree_digest((run.params, run.tables)):
        raise ConfigError(
            f"{written.folder}: was made by other weights than those of {run.path} at step {run.step}; give the run "
            "that made it, or score again"
        )


def batches(written: Written, users: int = GROUP_USERS) -> Iterator[tuple[pa.Array, pa.ListArray]]:
    """Ids of at most `users` users, and their lists of item ids, at a time: one row group's columns are in memory.

    Raises:
      DataError: a part is not readable, or has other columns.
    """
    for path in written.files:
        try:
            for batch in _read(path, users):
                ids, lists = (batch.column(name).cast(kind) for name, kind in KINDS.items())
                if ids.null_count or lists.null_count or lists.flatten().null_count:
                    raise DataError(f"{path}: a user has no id, no list or an item without id; score again")
                yield ids, lists
        except (OSError, KeyError, pa.ArrowException) as error:
            cause = " ".join(str(error).split())
            raise DataError(
                f"{path}: not readable as a part of scoring ({cause}); remove it, and {AGAIN}"
            ) from None


def _read(path: Path, users: int) -> Iterator[pa.RecordBatch]:
    """Batches of a part in any of `formats.FORMATS`."""
    if path.suffix == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(users, columns=list(KINDS))
    elif path.suffix == ".arrow":
        yield from pa.ipc.open_file(path).read_all().to_batches(users)
    else:
        # Told the kinds, or ids that look like dates would be dates; in one block, since a line may be longer than one.
        kinds = pa_json.ParseOptions(explicit_schema=pa.schema(KINDS), unexpected_field_behavior="ignore")
        whole = pa_json.ReadOptions(block_size=max(path.stat().st_size, 1))
        table = pa_json.read_json(path, read_options=whole, parse_options=kinds)
        yield from table.combine_chunks().to_batches(users)


def item_numbers(lists: pa.ListArray, item_ids: pa.Array, k: int, folder: Path) -> np.ndarray:
    """int32[U, k], indices of the items in lists, best first; 0 behind the last one of a list.

    Args:
      lists: of item ids.
      item_ids: those of the catalogue, item 1 first.
      k: length of the longest list.
      folder: where they come from, for messages.

    Raises:
      DataError: an item is not in the catalogue, or a list is longer than `k`.
    """
    ids = lists.flatten()
    place = pc.index_in(ids, value_set=item_ids)
    if place.null_count:
        name = ids[pc.index(place.is_valid(), False).as_py()].as_py()
        raise DataError(
            f"{folder}: recommends {name!r}, which is no item of the dataset; give the run that made it"
        )
    length_U = numbers(lists.value_lengths())
    if (length_U > k).any():
        raise DataError(f"{folder}: has a list of {int(length_U.max())} items; {MANIFEST} says {k} at most")
    found = np.zeros((len(lists), k), np.int32)
    found[np.arange(k) < length_U[:, None]] = numbers(place) + 1
    return found
