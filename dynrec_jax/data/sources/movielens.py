"""`movielens:FOLDER`: a GroupLens folder as unpacked: ml-100k, ml-1m and ml-10m, or the .csv folders."""

from collections.abc import Iterator
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc
from ibis.backends.duckdb import Backend

from dynrec_jax.data.kinds import TEXT
from dynrec_jax.data.sources.columns import refuse_columns
from dynrec_jax.data.sources.described import load_described, numbered
from dynrec_jax.data.sources.lines import field_blocks, is_utf8, require_file
from dynrec_jax.data.sources.source import Columns, Job, Source, finish, raw_schema
from dynrec_jax.data.sources.table import read_files
from dynrec_jax.data.sources.tabular import csv_batches
from dynrec_jax.errors import DataError

SCHEMA = raw_schema(times=True, events=False, ratings=True)
ITEMS = {"title": TEXT, "genres": TEXT}
CSV_COLUMNS = Columns("userId", "movieId", "timestamp", "", "rating")
NO_GENRES = "(no genres listed)"
# The flags at the end of a line of ml-100k's u.item, in their order.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def read(job: Job) -> Source:
    """Reads a folder's ratings, and its movies' titles and genres where they are there.

    Raises:
      DataError: Not a folder, or none of the files by which a GroupLens folder is known.
      ConfigError: A column was named: they are known.
    """
    refuse_columns(job.columns, "movielens")
    folder = Path(job.path)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {found}; expected a folder as GroupLens packs it")
    name = f"movielens:{folder.resolve().name}"
    if (folder / "u.data").is_file():
        return read_plain(job, name, folder / "u.data", "\t", movies_100k(job, folder / "u.item"))
    if (folder / "ratings.dat").is_file():
        return read_plain(job, name, folder / "ratings.dat", "::", dat_items(job, folder / "movies.dat"))
    if (folder / "ratings.csv").is_file():
        path = require_file(folder / "ratings.csv", "GroupLens ratings")
        return read_files(job, [path], name, CSV_COLUMNS, movies_csv(job, folder / "movies.csv"))
    raise DataError(
        f"{folder}: none of u.data, ratings.dat, ratings.csv; expected a folder as GroupLens packs it"
    )


def read_plain(job: Job, name: str, path: Path, separator: str, items: ir.Table | None) -> Source:
    """Reads ratings of four fields a line, without a header: user, item, rating, seconds."""
    require_file(path, "GroupLens ratings")

    def batches() -> Iterator[pa.RecordBatch]:
        for lines, (user, item, rating, time) in field_blocks(path, separator, 4):
            yield pa.record_batch([user, item, time, rating, lines], schema=SCHEMA)

    return finish(job, name, SCHEMA, batches(), lambda line: f"{path}:{line}", items=items)


def item_encoding(path: Path) -> str:
    """UTF-8 where the whole file is; the older sets' titles are Latin-1."""
    return "utf-8" if is_utf8(path) else "latin-1"


def joined(genres: pa.Array) -> pa.Array:
    """`A|B` as `A, B`; the words for none as null."""
    return pc.replace_substring(pc.if_else(pc.equal(genres, NO_GENRES), None, genres), "|", ", ")


def movies_100k(job: Job, path: Path) -> ir.Table | None:
    """ml-100k's u.item: id, title, two dates, an address, and a flag a genre."""
    if not (job.own_items and path.is_file()):
        return None

    def batches() -> Iterator[tuple[list[pa.Array], pa.Array]]:
        for lines, fields in field_blocks(path, "|", 5 + len(GENRES), item_encoding(path)):
            flags = zip(*(field.to_pylist() for field in fields[5:]), strict=True)
            genres = [", ".join(g for g, f in zip(GENRES, row, strict=True) if f == "1") for row in flags]
            yield [fields[0], fields[1], pa.array(genres, pa.string())], lines

    return load_described(job.con, "raw_items", ITEMS, batches(), str(path))


def dat_items(job: Job, path: Path) -> ir.Table | None:
    """What movies.dat says, where it is there."""
    return movies_dat(job.con, path, "raw_items") if job.own_items and path.is_file() else None


def is_movies_dat(path: Path) -> bool:
    """Whether the first line of a file is `id::title::genres`."""
    with path.open("rb") as file:
        return file.readline(4096).count(b"::") >= 2


def movies_dat(con: Backend, path: Path, table: str) -> ir.Table:
    """movies.dat: `id::title::genres`."""

    def batches() -> Iterator[tuple[list[pa.Array], pa.Array]]:
        for lines, (item, title, genres) in field_blocks(path, "::", 3, item_encoding(path)):
            yield [item, title, joined(genres)], lines

    return load_described(con, table, ITEMS, batches(), str(path))


def movies_csv(job: Job, path: Path) -> ir.Table | None:
    """movies.csv: movieId, title, genres."""
    if not (job.own_items and path.is_file()):
        return None

    def batches() -> Iterator[list[pa.Array]]:
        for batch in csv_batches(path, ["movieId", "title", "genres"]):
            yield [batch.column(0), batch.column(1), joined(batch.column(2))]

    return load_described(job.con, "raw_items", ITEMS, numbered(batches()), str(path))
