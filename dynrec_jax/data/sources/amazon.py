"""`amazon:PATH`: reviews of Amazon's products as they were published in 2014, 2018 and 2023, plain or gzip.

PATH is a file of reviews, or a folder with one. A review is an event at the time at which it was written, its stars the
rating. What describes the products is read from the meta file beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from dynrec_jax.data.sources.amazon_items import (
    PRODUCTS,
    USERS,
    first_record,
    identifier,
    product,
    read_meta,
    records,
)
from dynrec_jax.data.sources.columns import refuse_columns
from dynrec_jax.data.sources.lines import require_file
from dynrec_jax.data.sources.source import Job, Source, finish, raw_schema
from dynrec_jax.errors import DataError

SCHEMA = raw_schema(times=True, events=False, ratings=True)
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
META = "meta_"
EXPECTED = "Amazon's reviews, a JSON object a line"
# Fields of a review by the name of its user's: time, its unit, rating.
FIELDS = {
    "reviewerID": ("unixReviewTime", "seconds", "overall"),
    "user_id": ("timestamp", "milliseconds", "rating"),
}
ROWS = 50_000


def read(job: Job) -> Source:
    """Reads a file of reviews, and the meta file that goes with it where there is one.

    Raises:
      DataError: No such file, a folder with several, a file that holds no reviews, a line that is no object.
      ConfigError: A column was named: they are known.
    """
    refuse_columns(job.columns, "amazon")
    path = Path(job.path)
    reviews, meta = in_folder(path, job.own_items) if path.is_dir() else (path, None)
    require_file(reviews, EXPECTED)
    first = first_record(reviews)
    user = next((name for name in USERS if name in first), None)
    if user is None:
        found = ", ".join(first) or "none"
        raise DataError(f"{reviews}: fields {found}; expected reviews, with {' or '.join(USERS)}")
    if job.own_items and not path.is_dir():
        meta = beside(reviews)
    items = read_meta(job.con, require_file(meta, "a meta file"), "raw_items") if meta else None
    return finish(
        job,
        f"amazon:{reviews.name}",
        SCHEMA,
        batches(reviews, user),
        lambda line: f"{reviews}:{line}",
        time_unit=FIELDS[user][1],
        items=items,
    )


def batches(path: Path, user: str) -> Iterator[pa.RecordBatch]:
    """A file's reviews, in its order; what a row lacks is missing."""
    time, _, rating = FIELDS[user]
    rows: list[tuple[Any, ...]] = []
    types = SCHEMA.types
    for line, row in records(path):
        texts = (None if (value := row.get(name)) is None else str(value) for name in (time, rating))
        rows.append((identifier(path, line, user, row.get(user)), product(path, line, row), *texts, line))
        if len(rows) == ROWS:
            yield pa.record_batch(list(map(pa.array, zip(*rows, strict=True), types)), schema=SCHEMA)
            rows = []
    if rows:
        yield pa.record_batch(list(map(pa.array, zip(*rows, strict=True), types)), schema=SCHEMA)


def in_folder(folder: Path, with_meta: bool) -> tuple[Path, Path | None]:
    """The only file of reviews in a folder, and the only meta file where there is one.

    Raises:
      DataError: No file of reviews or several; several meta files, if one is wanted.
    """
    reviews, meta = [], []
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(ENDINGS) or path.name.startswith(".") or not path.is_file():
            continue
        if path.name.startswith(META):
            meta.append(path)
            continue
        row = first_record(path)
        if any(name in row for name in USERS):
            reviews.append(path)
        elif any(name in row for name in PRODUCTS):
            meta.append(path)
    if len(reviews) != 1:
        raise DataError(
            f"{folder}: expected one file of reviews, found {names_of(reviews)}; name the file itself"
        )
    if with_meta and len(meta) > 1:
        raise DataError(f"{folder}: expected one meta file, found {names_of(meta)}; name it with --items")
    return reviews[0], meta[0] if with_meta and meta else None


def names_of(paths: list[Path]) -> str:
    """File names in a message."""
    return ", ".join(path.name for path in paths) or "none"


def beside(reviews: Path) -> Path | None:
    """The meta file whose name fits: `meta_X.json.gz` for `reviews_X_5.json.gz`, `X_5.json.gz` or `X.jsonl.gz`."""
    stem = stem_of(reviews)
    bare = re.sub(r"_\d+(core)?$", "", stem.removeprefix("reviews_"))
    wanted = {META + name for name in (stem, stem.removeprefix("reviews_"), bare)}
    fits = [
        path
        for path in sorted(reviews.parent.glob(f"{META}*"))
        if path.name.endswith(ENDINGS) and stem_of(path) in wanted
    ]
    if len(fits) > 1:
        raise DataError(
            f"{reviews}: {names_of(fits)} fit its name; expected one meta file, name it with --items"
        )
    return fits[0] if fits else None


def stem_of(path: Path) -> str:
    """A file's name without its endings."""
    return re.sub(r"\.jsonl?(\.gz)?$", "", path.name)
