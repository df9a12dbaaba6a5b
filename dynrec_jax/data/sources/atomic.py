"""`atomic:PATH`: RecBole's tab-separated files with a typed header; PATH is the .inter file or its folder."""

from collections.abc import Iterator
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa

from dynrec_jax.data.kinds import TEXT
from dynrec_jax.data.sources.columns import pick
from dynrec_jax.data.sources.described import load_described
from dynrec_jax.data.sources.lines import field_blocks, first_text_line, require_file
from dynrec_jax.data.sources.source import Columns, Job, Source, finish, raw_schema
from dynrec_jax.errors import DataError

DEFAULTS = Columns("user_id", "item_id", "timestamp", "event", "rating")


def read(job: Job) -> Source:
    """Reads a .inter file, and the .item file beside it where there is one.

    Raises:
      DataError: No such file, or several in the folder; a column that is not there; not UTF-8.
    """
    path = inter_file(Path(job.path))
    found = header(path)
    columns = pick(path, found, job.columns, DEFAULTS)
    schema = raw_schema("time" in columns, "event" in columns, "rating" in columns)
    chosen = [found.index(name) for name in columns.values()]

    def batches() -> Iterator[pa.RecordBatch]:
        for lines, fields in field_blocks(path, "\t", len(found), skip=1):
            yield pa.record_batch([*(fields[i] for i in chosen), lines], schema=schema)

    items = path.with_suffix(".item")
    described = item_table(job, items, columns["item"]) if job.own_items and items.is_file() else None
    return finish(
        job, f"atomic:{path.name}", schema, batches(), lambda line: f"{path}:{line}", items=described
    )


def inter_file(path: Path) -> Path:
    """The .inter file itself, or the only one in a folder."""
    if path.is_dir():
        found = sorted(path.glob("*.inter"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise DataError(f"{path}: expected one .inter file, found {names}; name the file itself")
        path = found[0]
    return require_file(path, "a RecBole .inter file")


def header(path: Path) -> list[str]:
    """Names of an atomic file's columns, without their types."""
    return [name.partition(":")[0] for name in first_text_line(path).split("\t")]


def item_table(job: Job, path: Path, item: str) -> ir.Table:
    """item_id, place and the further columns of an .item file."""
    found = header(require_file(path, "a RecBole .item file"))
    if item not in found:
        raise DataError(f"{path}: no column {item!r}; found {', '.join(found)}")
    if twice := [name for name in found if found.count(name) > 1]:
        raise DataError(f"{path}: {found.count(twice[0])} columns are named {twice[0]!r}; expected one")
    at = found.index(item)
    names = [name for name in found if name != item]

    def batches() -> Iterator[tuple[list[pa.Array], pa.Array]]:
        for lines, fields in field_blocks(path, "\t", len(found), skip=1):
            yield [fields[at], *fields[:at], *fields[at + 1 :]], lines

    return load_described(job.con, "raw_items", dict.fromkeys(names, TEXT), batches(), str(path))
