"""Scoring: recommendations for all users, or those of a file, from a run folder alone."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynrec_jax import config as configs
from dynrec_jax.data.content import TableHash
from dynrec_jax.errors import ConfigError
from dynrec_jax.evaluate.only import Only
from dynrec_jax.parallel.digest import tree_digest
from dynrec_jax.parallel.mesh import feed
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.score.allowed import allowed_items, offered_to
from dynrec_jax.score.checks import check
from dynrec_jax.score.options import BOTH, ITEMS, LISTS, NEIGHBOURS, ScoreOptions
from dynrec_jax.score.parts import Parts, check_folder
from dynrec_jax.score.queries import Queries, queries_of
from dynrec_jax.score.sections import (
    Section,
    items_section,
    lists_section,
    neighbours_section,
    users_section,
)
from dynrec_jax.train.progress import Progress
from dynrec_jax.workdir import Run


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a job is about.

    Attributes:
      queries: whom it scores; None where it is about items alone.
      only: which items may be in a list.
      allowed: digest of the items that may be in any list; None where all may.
      notes: what the user should know before.
    """

    queries: Queries | None
    only: Only
    allowed: str | None
    notes: list[str]


def score(
    run: Run,
    out: Path,
    options: ScoreOptions,
    processes: Processes = ALONE,
    others: Sequence[Run] = (),
) -> dict[str, int]:
    """Writes a part for each group of users or items; parts that are there already are not computed again.

    Several processes share the parts; `out` is a folder that all of them see. With `others`, lists are those of all
    these runs together (`score.several`).

    Returns:
      `users` and `items` that have a row, `parts`, and `skipped` parts.

    Raises:
      ConfigError: k exceeds the catalogue, options contradict each other, or `out` belongs to another job.
      DataError: a file is not what it must be, or nobody is left to make lists for.
      MachineError: the disk is full.
    """
    processes.agree(lambda: check(options, 1 + len(others), out))
    runs = [_with_hops(each, options.hops) for each in (run, *others)]
    asked = processes.agree(lambda: _asked(runs, options))
    weights = [tree_digest((each.params, each.tables)) for each in runs]
    manifest = processes.agree(lambda: _manifest(runs, options, weights, asked.allowed))
    processes.check_same(manifest, "start all with the same flags and the same files")
    sections = _sections(runs, options, asked, processes)
    folders = [out / section.name if options.what == BOTH else out for section in sections]
    manifests = [{**manifest, "parts": len(section.rows)} for section in sections]
    # All of them before any is made.
    processes.first_does(lambda: [check_folder(*each) for each in zip(folders, manifests, strict=True)])
    total = {"users": 0, "items": 0, "parts": 0, "skipped": 0}
    notes = _of_new(run) + asked.notes
    for section, folder in zip(sections, folders, strict=True):
        skipped = _fill(section, folder, manifest, options.file_format, runs[0], processes, notes)
        total[section.unit] += sum(section.rows)
        total["parts"] += len(section.rows)
        total["skipped"] += skipped
        notes = []
    return total


def _asked(runs: Sequence[Run], options: ScoreOptions) -> _Asked:
    run = runs[0]
    allowed, notes = allowed_items(run, options.allow, options.deny, options.where)
    left = run.items.number if allowed is None else int(allowed.sum())
    most = left - 1 if options.what == NEIGHBOURS else left
    if options.what in (LISTS, NEIGHBOURS) and options.k > most:
        what = "other items" if options.what == NEIGHBOURS else "items"
        may = (
            f"{most:,} {what} may be in a list"
            if allowed is not None
            else f"the catalogue has {most:,} {what}"
        )
        raise ConfigError(f"--k={options.k}: {may}; give {most} or less")
    digest = None if allowed is None else hashlib.sha256(np.packbits(allowed).tobytes()).hexdigest()
    if options.what in (ITEMS, NEIGHBOURS):
        return _Asked(None, Only(allowed), digest, notes)
    queries = queries_of(runs, options)
    asked = _Asked(queries, Only(allowed), digest, [*notes, *queries.notes])
    return asked if options.candidates is None else _offered(asked, run, options.candidates, queries)


def _offered(asked: _Asked, run: Run, path: Path, queries: Queries) -> _Asked:
    """The job for those users alone whom a file offers something."""
    users_U = np.concatenate([users for users, _ in queries.parts])
    ids_U = queries.ids(users_U).cast(pa.string())
    offered, told = offered_to(run, path, users_U, ids_U, asked.only.allowed)
    some_U = np.diff(offered.starts) > 0
    kept = [(users, ends, some_U[users]) for users, ends in queries.parts]
    parts = [(users[some], ends[some]) for users, ends, some in kept if some.any()]
    queries = dataclasses.replace(queries, parts=parts)
    return dataclasses.replace(asked, queries=queries, only=Only(None, offered), notes=asked.notes + told)


def _sections(
    runs: Sequence[Run], options: ScoreOptions, asked: _Asked, processes: Processes
) -> list[Section]:
    run, allowed = runs[0], asked.only.allowed
    if options.what == NEIGHBOURS:
        return [neighbours_section(run, options.k, allowed, processes)]
    found = []
    if asked.queries is not None:
        if options.what == LISTS:
            return [lists_section(runs, options, asked.queries, asked.only, processes)]
        found = [users_section(run, asked.queries, processes)]
    return [*found, *([items_section(run, allowed, processes)] if options.what in (ITEMS, BOTH) else [])]


def _fill(
    section: Section,
    out: Path,
    manifest: dict[str, Any],
    file_format: str,
    run: Run,
    processes: Processes,
    notes: Sequence[str],
) -> int:
    """Makes the parts that are not there; returns how many were."""
    # Process 0 makes the folder; the others find it.
    number = len(section.rows)
    made = processes.agree(lambda: Parts(out, manifest, number, file_format) if processes.first else None)
    processes.check_shared(out)
    parts = processes.agree(lambda: made or Parts(out, manifest, number, file_format))
    there = set(processes.exchange(parts.done(section.rows) if processes.first else None)[0])
    missing = [part for part in range(number) if part not in there]
    own = feed(run.mesh, processes.index)
    quiet = not processes.first
    with (
        Progress("scoring", sum(section.rows), unit=f"{section.unit}/s", quiet=quiet) as progress,
        ThreadPoolExecutor(1) as pool,
    ):
        for note in notes:
            progress.say(note)
        if there:
            progress.say(f"{len(there)} of {number} parts are there already")
        done = sum(section.rows[part] for part in there)
        make = section.prepare() if missing else None
        # A part is written while the next is computed; one at a time, so that no more than two are held.
        writing: Future[None] | None = None
        for start in range(0, len(missing), own.parts):
            # All compute together, each one part; the last round may not have one for everybody.
            round_ = missing[start : start + own.parts]
            part = round_[own.part] if own.part < len(round_) else None
            assert make is not None
            table = make(part)
            if writing is not None:
                processes.agree(writing.result)
                progress.update(done)
            writing = pool.submit(_write, parts, part if own.lead else None, table)
            done += sum(section.rows[part] for part in round_)
        if writing is not None:
            processes.agree(writing.result)
            progress.update(done)
        processes.first_does(parts.finish)
    return len(there)


def _write(parts: Parts, part: int | None, table: Callable[[], pa.Table]) -> None:
    if part is not None:
        parts.write(part, table())


def _with_hops(run: Run, hops: int | None) -> Run:
    if hops is None:
        return run
    if run.config.model.interests > 1:
        raise ConfigError("--hops: a model of several interests has none; leave it out")
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.hops = hops
    return dataclasses.replace(run, model=run.items.model(config))


def _of_new(run: Run) -> list[str]:
    if run.new is None:
        return []
    told = [f"{run.new.table.num_rows:,} new items are recommended too"]
    for count, what in (
        (run.new.known, "items of --items are the dataset's and were left out"),
        (run.new.repeated, "rows of --items repeat an item: the first counts, later ones give what it lacks"),
        (run.new.bare, "new items have nothing that describes them, and the vector of what is unknown"),
    ):
        if count:
            told.append(f"{count:,} {what}")
    return told


def _manifest(
    runs: Sequence[Run], options: ScoreOptions, weights: Sequence[str], allowed: str | None = None
) -> dict[str, Any]:
    first, *others = (
        {
            "config": hashlib.sha256(configs.to_json(run.config).encode()).hexdigest(),
            "workdir": run.path.absolute().name,
            "step": run.step,
            "weights": digest,
            **({} if run.new is None else {"items": _of_table(run.new.table)}),
        }
        for run, digest in zip(runs, weights, strict=True)
    )
    return {
        "format": 2,
        "dataset": runs[0].dataset.content,
        **first,
        **options.told(),
        "users": _of_file(options.users),
        **{
            name: _of_file(path)
            for name, path in (
                ("allow", options.allow),
                ("deny", options.deny),
                ("candidates", options.candidates),
            )
            if path is not None
        },
        # Which items a rule keeps may change with the day, as that of `arrived > current_date - 30` does.
        **({} if allowed is None else {"allowed": allowed}),
        **({"with": others} if others else {}),
    }


def _of_file(path: Path | None) -> str | None:
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_table(table: pa.Table) -> str:
    digest = TableHash(table.column_names)
    digest.update(table)
    return digest.hexdigest()
