"""Scoring: recommendations for all users, or those of a file, from a run folder alone."""

import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynrec_jax import config as configs
from dynrec_jax.data.cache import Histories, Windows, from_start
from dynrec_jax.data.content import TableHash
from dynrec_jax.data.examples import NONE
from dynrec_jax.data.pipeline import make_splits
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.evaluate.compressed import Compression
from dynrec_jax.evaluate.evaluator import asked
from dynrec_jax.evaluate.recommender import GROUP_USERS, HistorySource, Lists, groups
from dynrec_jax.parallel.digest import tree_digest
from dynrec_jax.parallel.mesh import feed
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.score.parts import Parts
from dynrec_jax.score.several import lists_of
from dynrec_jax.score.users import has_histories, new_histories, read_table
from dynrec_jax.train.progress import Progress
from dynrec_jax.workdir import Run

_NOBODY = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What to score.

    Attributes:
      k: length of the lists.
      filter_seen: whether items of the history are left out.
      split: "all" recommends from the whole history, "test" and "validation" from what evaluation sees.
      users: a CSV or Parquet file of user ids or of new histories; None for all users.
      cache_dir: memory-mapped copies of the shards; empty for the run's own setting.
      at: when the recommendations are asked for, in seconds since 1970, of a model that looks at it; None for the time
        of the log's last event, or the file's, or of evaluation's targets.
      compression: how the runs are compressed; None for the runs as they are. Where their tables are compressed, those
        of the runs are deleted.
    """

    k: int = 100
    filter_seen: bool = False
    split: str = "all"
    users: Path | None = None
    cache_dir: str = ""
    at: int | None = None
    compression: Compression | None = None


@dataclasses.dataclass(frozen=True)
class _AskedAt:
    """Histories that are all asked for at one moment, in seconds since the dataset's first event."""

    source: HistorySource
    moment: int

    def last_items(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
        return self.source.last_items(users_B, ends_B, size)

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> Windows:
        return self.source.windows(users_B, ends_B, size)

    def asked(self, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        return np.full(len(users_B), self.moment, np.int32)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Whom to score from which history, cut into parts.

    Attributes:
      source: cuts windows of histories.
      ids: ids of some users, by number.
      parts: (users, ends) of each part.
      notes: what the user should know before.
    """

    source: HistorySource
    ids: Callable[[np.ndarray], pa.Array]
    parts: list[tuple[np.ndarray, np.ndarray]]
    notes: list[str]


def score(
    run: Run,
    out: Path,
    options: ScoreOptions,
    processes: Processes = ALONE,
    others: Sequence[Run] = (),
) -> dict[str, int]:
    """Writes a Parquet part for each group of users; parts that are there already are not computed again.

    Several processes share the parts; `out` is a folder that all of them see. With `others`, lists are those of all
    these runs together (`score.several`).

    Returns:
      `users` that have a list, `parts`, and `skipped` parts.

    Raises:
      ConfigError: k exceeds the catalogue, or `out` belongs to another job.
      DataError: the users file is not what it must be.
      MachineError: the disk is full.
    """
    number = run.items.number
    if options.k > number:
        raise ConfigError(f"--k={options.k}: the catalogue has {number:,} items; give {number} or less")
    runs = [run, *others]
    work = processes.agree(lambda: _asked_at(runs, options, _work(runs, options)))
    weights = [tree_digest((each.params, each.tables)) for each in runs]
    manifest = processes.agree(lambda: _manifest(runs, options, weights))
    processes.check_same(manifest, "start all with the same flags and the same users")
    # Process 0 makes the folder; the others find it.
    made_parts = processes.agree(lambda: Parts(out, manifest, len(work.parts)) if processes.first else None)
    processes.check_shared(out)
    parts = processes.agree(lambda: made_parts or Parts(out, manifest, len(work.parts)))
    total = sum(len(users) for users, _ in work.parts)
    counts = enumerate(len(users) for users, _ in work.parts)
    missing = processes.exchange(
        [i for i, rows in counts if not parts.done(i, rows)] if processes.first else None
    )[0]
    own, items = feed(run.mesh, processes.index), run.item_ids
    quiet = not processes.first
    with Progress("scoring", total, unit="users/s", quiet=quiet) as progress, ThreadPoolExecutor(1) as pool:
        for note in _of_new(run) + work.notes:
            progress.say(note)
        if len(missing) < len(work.parts):
            progress.say(f"{len(work.parts) - len(missing)} of {len(work.parts)} parts are there already")
        done = total - sum(len(work.parts[i][0]) for i in missing)
        lists = None
        if missing:
            settings = options.k, options.filter_seen, processes, options.compression, options.cache_dir
            lists = lists_of(runs, *settings)
        # A part is written while the next is computed; one at a time, so that no more than two are held.
        writing: Future[None] | None = None
        for start in range(0, len(missing), own.parts):
            # All compute together, each the lists of one part; the last round may not have one for everybody.
            round_ = missing[start : start + own.parts]
            part = round_[own.part] if own.part < len(round_) else None
            users, ends = (_NOBODY, _NOBODY) if part is None else work.parts[part]
            assert lists is not None
            made = lists(work.source, users, ends)
            if writing is not None:
                processes.agree(writing.result)
                progress.update(done)
            writing = pool.submit(_write, parts, part if own.lead else None, work, users, made, items)
            done += sum(len(work.parts[i][0]) for i in round_)
        if writing is not None:
            processes.agree(writing.result)
            progress.update(done)
    return {"users": total, "parts": len(work.parts), "skipped": len(work.parts) - len(missing)}


def _write(
    parts: Parts, part: int | None, work: _Work, users: np.ndarray, made: Lists, items: pa.Array
) -> None:
    if part is not None:
        parts.write(part, work.ids(users), made, items)


def _work(runs: Sequence[Run], options: ScoreOptions) -> _Work:
    run = runs[0]
    table = None if options.users is None else read_table(options.users)
    if table is not None and has_histories(table):
        return _work_of_file(runs, options, table)
    stored = Histories(run.dataset, options.cache_dir or run.config.data.cache_dir)
    ends_U = stored.lengths if options.split == "all" else _ends(stored, run, options.split)
    without = f"users without a {options.split} target left out"
    if table is not None:
        chosen, notes = _known(stored, table.column("user_id").to_pylist(), options.users)
        kept = chosen[ends_U[chosen] != NONE]
        notes += _told(len(chosen) - len(kept), without)
        return _Work(stored, stored.id_column, _chunks(kept, ends_U[kept]), notes)
    ranges = [np.arange(group.start, group.stop) for group in groups(stored)]
    users = [each[ends_U[each] != NONE] for each in ranges]
    notes = _told(stored.users - sum(map(len, users)), without)
    return _Work(stored, stored.id_column, [(each, ends_U[each]) for each in users], notes)


def _work_of_file(runs: Sequence[Run], options: ScoreOptions, table: pa.Table) -> _Work:
    run = runs[0]
    if options.split != "all":
        raise ConfigError(
            f"--split={options.split}: {options.users} brings its own histories; leave the flag out"
        )
    data = run.dataset
    histories = new_histories(table, run.item_ids, options.users, data.first_time, data.event_types)
    if any(each.model.sight.needs_times for each in runs) and histories.times is None:
        raise DataError(
            f"{options.users}: has no times, and the model looks at them; expected a column time, or lists times"
        )
    notes = _told(histories.unknown_items, "events of unknown items left out")
    notes += _told(histories.empty_users, "users without a known item left out")
    ids = histories.users
    return _Work(
        histories,
        lambda users: pa.array([ids[i] for i in users], pa.string()),
        _chunks(np.arange(len(ids)), histories.lengths),
        notes,
    )


def _ends(stored: Histories, run: Run, split: str) -> np.ndarray:
    """int64[U], the event that evaluation asks each user for; NONE for nobody."""
    users, ends = asked(make_splits(stored, run.config), split)
    if len(np.unique(users)) < len(users):
        raise ConfigError(
            f"--split={split}: the run's evaluation.targets is {run.config.evaluation.targets!r}, which asks a "
            "user for several events, and a user gets one list; leave the flag out"
        )
    ends_U = np.full(stored.users, NONE, np.int64)
    ends_U[users] = ends
    return ends_U


def _asked_at(runs: Sequence[Run], options: ScoreOptions, work: _Work) -> _Work:
    """The work, asked for at `options.at`; ConfigError where nothing would look at that."""
    run = runs[0]
    if options.at is None:
        return work
    if not any(each.model.sight.query_time for each in runs):
        raise ConfigError(
            f"--at: the model of {', '.join(str(each.path) for each in runs)} does not look at the time of a request "
            "(model.query_time is False); leave it out"
        )
    if options.split != "all":
        raise ConfigError(
            f"--at: --split={options.split} asks at the time of its targets; leave one of them out"
        )
    if options.at < (run.dataset.first_time or 0):
        first = datetime.datetime.fromtimestamp(run.dataset.first_time or 0, datetime.UTC)
        raise ConfigError(
            f"--at: is before the dataset's first event ({first:%Y-%m-%d %H:%M} UTC); give a later moment"
        )
    moment = int(from_start(np.array([options.at]), run.dataset.first_time or 0)[0])
    return dataclasses.replace(work, source=_AskedAt(work.source, moment))


def _known(stored: Histories, wanted: list[str], path: Path | None) -> tuple[np.ndarray, list[str]]:
    number = {user: i for i, user in enumerate(stored.ids_of(np.arange(stored.users)))}
    unique = list(dict.fromkeys(wanted))
    found = [number[user] for user in unique if user in number]
    if not found:
        raise DataError(
            f"{path}: none of its {len(unique):,} users is in the dataset (the first is {unique[0]!r})"
        )
    return np.array(found, np.int64), _told(len(unique) - len(found), "unknown users left out")


def _chunks(users: np.ndarray, ends: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    cuts = range(GROUP_USERS, len(users), GROUP_USERS)
    return list(zip(np.split(users, cuts), np.split(ends, cuts), strict=True))


def _of_new(run: Run) -> list[str]:
    if run.new is None:
        return []
    told = [
        *_told(run.new.known, "items of --items are the dataset's and were left out"),
        *_told(
            run.new.repeated,
            "rows of --items repeat an item: the first counts, later ones give what it lacks",
        ),
        *_told(run.new.bare, "new items have nothing that describes them, and the vector of what is unknown"),
    ]
    return [f"{run.new.table.num_rows:,} new items are recommended too", *told]


def _told(count: int, what: str) -> list[str]:
    return [f"{count:,} {what}"] if count else []


def _manifest(runs: Sequence[Run], options: ScoreOptions, weights: Sequence[str]) -> dict[str, Any]:
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
    users = None if options.users is None else hashlib.sha256(options.users.read_bytes()).hexdigest()
    return {
        "format": 1,
        "dataset": runs[0].dataset.content,
        **first,
        "k": options.k,
        "filter_seen": options.filter_seen,
        "split": options.split,
        "users": users,
        **({} if options.at is None else {"at": options.at}),
        **({"with": others} if others else {}),
        **({} if options.compression is None else {"compressed": dataclasses.asdict(options.compression)}),
    }


def _of_table(table: pa.Table) -> str:
    digest = TableHash(table.column_names)
    digest.update(table)
    return digest.hexdigest()
