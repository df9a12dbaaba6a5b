"""Preparation: from a log to a dataset folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
from ibis.backends.duckdb import Backend
from rich.console import Console
from rich.table import Table

from dynrec_jax.data import catalogue
from dynrec_jax.data.clean import Cleaned, Filters, Step, Ties, clean, find_ties
from dynrec_jax.data.content import content_hash
from dynrec_jax.data.dataset import FORMAT, INFO, Dataset, file_sha256, open_dataset
from dynrec_jax.data.engine import engine
from dynrec_jax.data.faults import machine_faults
from dynrec_jax.data.folder import new_folder
from dynrec_jax.data.graph import write_triples
from dynrec_jax.data.kinds import PLACE
from dynrec_jax.data.sources import SOURCES, split_source
from dynrec_jax.data.sources.items import read_items
from dynrec_jax.data.sources.lines import require_file
from dynrec_jax.data.sources.source import Columns, Job, Source
from dynrec_jax.data.sources.triples import read_triples
from dynrec_jax.data.write import GROUP_EVENTS, logical, time_span, write_interactions, write_items
from dynrec_jax.errors import ConfigError, DataError

MAX_SHARDS = 4096
KEY_BYTES = 16


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare and how.

    Attributes:
      source: KIND:PATH.
      out: The folder to write; must not exist.
      items: What describes items: CSV, Parquet or JSON lines with a column item_id, or what else `read_items` knows;
        None leaves the source's own. Of several rows of an item the first counts, later ones give what it lacks.
      text_columns: Columns of the items to keep; empty keeps all.
      triples: A CSV, TSV or Parquet file of a knowledge graph: head, relation, tail; None is without one.
      columns: Names of the source's columns where they are not the usual ones.
      filters: What to take away.
      ties: `source` or `random:SEED`: how events of one user at the same time are ordered.
      pseudonymise: A file with a secret key of at least 16 bytes; user ids become HMACs under it.
      shards: Number of logical shards, 1 … 4096.
      memory: What the engine holds in memory before it spills, such as `2GiB`; None is half of the machine's.
      group_events: Events whose sequences are collected at a time.
    """

    source: str
    out: str | Path
    items: str | Path | None = None
    text_columns: tuple[str, ...] = ()
    triples: str | Path | None = None
    columns: Columns = field(default_factory=Columns)
    filters: Filters = field(default_factory=Filters)
    ties: str = "source"
    pseudonymise: str | Path | None = None
    shards: int = 64
    memory: str | None = None
    group_events: int = GROUP_EVENTS


def prepare(options: PrepareOptions, console: Console | None = None) -> Dataset:
    """Reads, cleans and writes a dataset; says on the console what was dropped and why.

    Nothing is written before the options are valid, and nothing is left of a run that fails.

    Raises:
      ConfigError: An option that is mistyped or contradicts another.
      DataError: Input that is missing or not what it must be; an output folder that exists.
      MachineError: The disk is full, or memory does not suffice.
    """
    console = console or Console()
    out = Path(options.out)
    kind, path = split_source(options.source)
    tie_seed = check(options)
    key = read_key(options.pseudonymise)
    with machine_faults(out):
        with new_folder(out) as folder:
            work = folder / "work"
            work.mkdir()
            with engine(work, options.memory) as con:
                job = Job(con, path, options.columns, key, work, own_items=options.items is None)
                source = SOURCES[kind](job)
                if source.ordered_ties and tie_seed is not None:
                    raise ConfigError(
                        f"--ties={options.ties}: a {kind} source has events at the same time in the order in which "
                        "they happened; leave the flag out"
                    )
                info, cleaned, ties = build(con, source, options, folder, tie_seed)
            shutil.rmtree(work)
            info["pseudonymised"] = key is not None
            info["files"] = file_facts(folder)
            text = json.dumps(info, indent=1, ensure_ascii=False, sort_keys=True)
            (folder / INFO).write_text(text + "\n", encoding="utf-8")
        dataset = open_dataset(out)
    report(console, dataset, cleaned.steps, ties)
    return dataset


def check(options: PrepareOptions) -> int | None:
    """Checks what needs no data; gives the seed of --ties=random:SEED, else None."""
    filters = options.filters
    for name, what in (("items", options.items), ("triples", options.triples)):
        if what is not None:
            if not str(what):
                raise ConfigError(f"--{name}=: is empty; expected a file, or leave the flag out")
            require_file(Path(what), f"a file (--{name})")
    if not 1 <= options.shards <= MAX_SHARDS:
        raise ConfigError(f"--shards={options.shards}: expected 1 to {MAX_SHARDS}")
    if filters.missing not in ("refuse", "drop"):
        raise ConfigError(f"--missing={filters.missing}: expected refuse or drop")
    for name in ("core", "min_user_events", "min_item_users"):
        if (value := getattr(filters, name)) < 0:
            raise ConfigError(f"--{name}={value}: expected 0 or more")
    if options.ties == "source":
        return None
    word, _, seed = options.ties.partition(":")
    if word != "random" or not (seed.isascii() and seed.isdigit()):
        raise ConfigError(f"--ties={options.ties}: expected source or random:SEED with a whole number")
    return int(seed)


def read_key(path: str | Path | None) -> bytes | None:
    """The bytes of a key file."""
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected a file with a secret key (--pseudonymise)")
    key = file.read_bytes()
    if len(key) < KEY_BYTES:
        raise DataError(
            f"{file}: a key of {len(key)} bytes; expected {KEY_BYTES} random bytes or more (--pseudonymise)"
        )
    return key


def build(
    con: Backend, source: Source, options: PrepareOptions, folder: Path, tie_seed: int | None
) -> tuple[dict[str, Any], Cleaned, Ties]:
    """Cleans and writes the Parquet files; gives what dataset.json says, but for the files' own facts."""
    described, columns = choose_items(con, source, options)
    raw_triples = None if options.triples is None else read_triples(con, Path(options.triples))
    cleaned = clean(con, source, options.filters)
    times, types = source.has_times, source.has_events
    ties = find_ties(cleaned.events) if times else Ties(0, 0)
    made = logical(con, cleaned.events, options.shards, types, tie_seed if times else None)
    items = made.items
    dropped = cleaned.dropped()
    if described is not None:
        items, counts = catalogue.with_columns(
            con, items, described, columns, str(options.items or source.name)
        )
        dropped |= counts
    shard_hashes = write_interactions(folder, made, options.shards, times, types, options.group_events)
    kinds = catalogue.kinds_of(items, columns)
    items_hash = write_items(con, folder, items, kinds)
    triples_hash, about_triples = None, None
    if raw_triples is not None:
        triples_hash, about_triples = write_triples(con, folder, raw_triples, items, str(options.triples))
    info = {
        "format": FORMAT,
        "counts": {"users": made.users, "items": made.item_count, "events": sum(made.shard_events.values())},
        "shards": options.shards,
        "source": source.name,
        "filters": asdict(options.filters),
        "dropped": dropped,
        "ties": ties_name(times, ties, options.ties),
        "tied_events": ties.count,
        "time_unit": "seconds" if times else None,
        "source_time_unit": source.time_unit,
        **time_span(cleaned.events),
        "event_types": made.event_types,
        "item_columns": columns,
        "item_column_kinds": kinds,
        "content": content_hash(shard_hashes, items_hash, made.event_types, triples_hash),
    }
    if about_triples is not None:
        info["triples"] = about_triples
    return info, cleaned, ties


def choose_items(con: Backend, source: Source, options: PrepareOptions) -> tuple[ir.Table | None, list[str]]:
    """The relation that describes items, the file's or the source's own, and the columns to keep of it."""
    if options.items is not None:
        return read_items(con, Path(options.items), options.text_columns or None)
    if source.items is not None:
        found = [name for name in source.items.columns if name != PLACE]
        return source.items, catalogue.chosen_columns(source.name, found, options.text_columns or None)
    if options.text_columns:
        raise DataError(
            f"{source.name}: describes no items, but --text_columns is set; name a file with --items"
        )
    return None, []


def ties_name(times: bool, ties: Ties, asked: str) -> str:
    """What the protocol says of ties."""
    if not times:
        return "none"
    if asked != "source":
        return asked
    return "item_sorted" if ties.item_sorted else "source"


def file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below, by its name relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }


def report(console: Console, dataset: Dataset, steps: list[Step], ties: Ties) -> None:
    """Prints what was dropped and why, and what is left."""
    table = Table(title=f"prepared {dataset.path} from {dataset.source}", title_justify="left")
    for name in ("dropped", "why", "events left"):
        table.add_column(name, justify="left" if name == "why" else "right")
    for step in steps:
        table.add_row(f"{step.dropped:,}", step.why, f"{step.left:,}")
    console.print(table)
    for line in report_lines(dataset, ties):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def report_lines(dataset: Dataset, ties: Ties) -> Iterator[str]:
    """What there is to say of a prepared dataset."""
    info = dataset.info
    yield f"{dataset.users:,} users, {dataset.items:,} items, {dataset.events:,} events"
    if dataset.has_times:
        span = f"{utc(info['first_time'])} to {utc(info['last_time'])}, in {info['source_time_unit']}"
        yield f"times: {span}; ties: {info['ties']}, {ties.count:,} events at the time of the one before them"
    else:
        yield "times: none; the order of events is the source's"
    if without := info["dropped"].get("items_without_row"):
        yield f"{without:,} items are not described: no row has their item_id"
    if repeated := info["dropped"].get("item_rows_repeated"):
        yield f"{repeated:,} rows that describe an item again gave only what the rows before them lack"
    if kinds := dataset.item_column_kinds:
        yield "items have " + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if without := info["dropped"].get("items_without_text"):
        yield f"{without:,} items have no text: all their columns of text are empty"
    if graph := info.get("triples"):
        yield (
            f"{graph['count']:,} triples of {len(graph['relations']):,} relations, {graph['duplicates']:,} repeats "
            f"left out; {graph['items']:,} items and {graph['entities']:,} other entities are in them"
        )
    if info["ties"] == "item_sorted":
        yield (
            f"note: {ties.ascending:,} of {ties.count:,} ties ascend by item: the source is sorted by item, "
            "not by what came first, which inflates metrics; --ties=random:SEED breaks ties at random"
        )


def utc(seconds: int) -> str:
    """A time as a date, or as the number that it is where it is outside of the calendar."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):
        return str(seconds)
