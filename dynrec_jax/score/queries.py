"""Whom a job scores, from which history, cut into parts."""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.data.cache import Histories, Windows, from_start
from dynrec_jax.data.examples import NONE
from dynrec_jax.data.pipeline import make_splits
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.evaluate.evaluator import asked
from dynrec_jax.evaluate.recommender import GROUP_USERS, HistorySource, groups
from dynrec_jax.score.options import ScoreOptions
from dynrec_jax.score.users import has_histories, new_histories, read_table
from dynrec_jax.workdir import Run

LOOKED_UP = (
    2**20
)  # ids of a file that are looked up at a time: each time all of the dataset's are gone through


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
class Queries:
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


def queries_of(runs: Sequence[Run], options: ScoreOptions) -> Queries:
    """What a job asks of some runs.

    Raises:
      ConfigError: the options contradict each other, or the runs.
      DataError: the users file is not what it must be, or nobody is left.
    """
    _check_moments(runs, options)
    table = None if options.users is None else read_table(options.users)
    brings = table is not None and has_histories(table)
    made = _of_file(runs, options, table) if brings else _of_dataset(runs[0], options, table)
    if not any(len(users) for users, _ in made.parts):
        raise DataError(f"nobody is left whom lists could be made for ({', '.join(made.notes)})")
    return _asked_at(runs, options, made)


def _of_dataset(run: Run, options: ScoreOptions, table: pa.Table | None) -> Queries:
    """Of the dataset's users, or those whom a file names."""
    if options.until is not None and not run.dataset.has_times:
        raise ConfigError(f"--until: {run.dataset.path} has no times; leave it out")
    stored = Histories(run.dataset, options.cache_dir or run.config.data.cache_dir)
    ends_U, notes = _ends(stored, run, options)
    if table is None:
        ranges = [np.arange(group.start, group.stop) for group in groups(stored)]
        users = [each[ends_U[each] != NONE] for each in ranges]
        parts = [(each, ends_U[each]) for each in users if len(each)]
    else:
        chosen, told = _known(stored, table.column("user_id"), options.users)
        kept = chosen[ends_U[chosen] != NONE]
        notes = told + _told(len(chosen) - len(kept), _without(options))
        parts = _chunks(kept, ends_U[kept])
    return Queries(stored, stored.id_column, parts, notes)


def _check_moments(runs: Sequence[Run], options: ScoreOptions) -> None:
    """Whether the moments of `at` and `until` mean something for these runs."""
    run = runs[0]
    for name, moment in (("at", options.at), ("until", options.until)):
        if moment is None:
            continue
        if options.split != "all":
            raise ConfigError(
                f"--{name}: --split={options.split} asks at the time of its targets; leave one of them out"
            )
        first = datetime.datetime.fromtimestamp(run.dataset.first_time or 0, datetime.UTC)
        if run.dataset.first_time is not None and moment < run.dataset.first_time:
            raise ConfigError(
                f"--{name}: is before the dataset's first event ({first:%Y-%m-%d %H:%M} UTC); give a later moment"
            )
    if options.at is not None and not any(each.model.sight.query_time for each in runs):
        raise ConfigError(
            f"--at: the model of {', '.join(str(each.path) for each in runs)} does not look at the time of a request "
            "(model.query_time is False); leave it out"
        )


def _of_file(runs: Sequence[Run], options: ScoreOptions, table: pa.Table) -> Queries:
    run = runs[0]
    if options.split != "all":
        raise ConfigError(
            f"--split={options.split}: {options.users} brings its own histories; leave the flag out"
        )
    data = run.dataset
    histories = new_histories(
        table, run.item_ids, options.users, data.first_time, data.event_types, options.until
    )
    if any(each.model.sight.needs_times for each in runs) and histories.times is None:
        raise DataError(
            f"{options.users}: has no times, and the model looks at them; expected a column time, or lists times"
        )
    notes = _told(histories.unknown_items, "events of unknown items left out")
    notes += _told(histories.empty_users, "users without a known item left out")
    ids = histories.users
    return Queries(
        histories,
        lambda users: pa.array([ids[i] for i in users], pa.string()),
        _chunks(np.arange(len(ids)), histories.lengths),
        notes,
    )


def _ends(stored: Histories, run: Run, options: ScoreOptions) -> tuple[np.ndarray, list[str]]:
    """int64[U], the event that each user is asked for, or NONE; and how many that leaves out."""
    if options.until is not None:
        ends_U = stored.count_before(options.until)
        ends_U = np.where(ends_U == 0, NONE, ends_U)
    elif options.split == "all":
        return stored.lengths, []
    else:
        users, ends = asked(make_splits(stored, run.config), options.split)
        if len(np.unique(users)) < len(users):
            raise ConfigError(
                f"--split={options.split}: the run's evaluation.targets is {run.config.evaluation.targets!r}, which "
                "asks a user for several events, and a user gets one list; leave the flag out"
            )
        ends_U = np.full(stored.users, NONE, np.int64)
        ends_U[users] = ends
    return ends_U, _told(int((ends_U == NONE).sum()), _without(options))


def _without(options: ScoreOptions) -> str:
    what = f"a {options.split} target" if options.until is None else "an event before --until"
    return f"users without {what} left out"


def _asked_at(runs: Sequence[Run], options: ScoreOptions, queries: Queries) -> Queries:
    """The queries, asked for at `options.at`, or where histories end at a moment, at that."""
    moment = options.until if options.at is None else options.at
    if moment is None or not any(each.model.sight.query_time for each in runs):
        return queries
    first = runs[0].dataset.first_time or 0
    at = int(from_start(np.array([moment]), first)[0])
    return dataclasses.replace(queries, source=_AskedAt(queries.source, at))


def _known(stored: Histories, wanted: pa.ChunkedArray, path: Path | None) -> tuple[np.ndarray, list[str]]:
    """Numbers of the dataset's users of some ids, each once, in their order; and how many ids are of none."""
    unique = pc.unique(wanted)
    pieces = [unique[at : at + LOOKED_UP] for at in range(0, len(unique), LOOKED_UP)]
    number_U = np.concatenate([stored.numbers_of(piece) for piece in pieces])
    found = number_U[number_U >= 0]
    if not len(found):
        raise DataError(
            f"{path}: none of its {len(unique):,} users is in the dataset (the first is {unique[0].as_py()!r})"
        )
    return found, _told(len(unique) - len(found), "unknown users left out")


def _chunks(users: np.ndarray, ends: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    cuts = range(GROUP_USERS, len(users), GROUP_USERS)
    return list(zip(np.split(users, cuts), np.split(ends, cuts), strict=True))


def _told(count: int, what: str) -> list[str]:
    return [f"{count:,} {what}"] if count else []
