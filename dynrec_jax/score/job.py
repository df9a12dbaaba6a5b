"""Scoring: recommendations for all users, or those of a file, from a run folder alone."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynrec_jax import config as configs
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.examples import NONE
from dynrec_jax.data.pipeline import make_splits
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.evaluate.evaluator import asked
from dynrec_jax.evaluate.recommender import GROUP_USERS, HistorySource, Recommender, groups
from dynrec_jax.parallel.digest import tree_digest
from dynrec_jax.score.parts import Parts
from dynrec_jax.score.users import has_histories, new_histories, read_table
from dynrec_jax.train.progress import Progress
from dynrec_jax.workdir import Run


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What to score.

    Attributes:
      k: length of the lists.
      filter_seen: whether items of the history are left out.
      split: "all" recommends from the whole history, "test" and "validation" from what evaluation sees.
      users: a CSV or Parquet file of user ids or of new histories; None for all users.
      cache_dir: memory-mapped copies of the shards; empty for the run's own setting.
    """

    k: int = 100
    filter_seen: bool = False
    split: str = "all"
    users: Path | None = None
    cache_dir: str = ""


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
    ids: Any
    parts: list[tuple[np.ndarray, np.ndarray]]
    notes: list[str]


def score(run: Run, out: Path, options: ScoreOptions) -> dict[str, int]:
    """Writes a Parquet part for each group of users; parts that are there already are not computed again.

    Returns:
      `users` that have a list, `parts`, and `skipped` parts.

    Raises:
      ConfigError: k exceeds the catalogue, or `out` belongs to another job.
      DataError: the users file is not what it must be.
      MachineError: the disk is full.
    """
    if options.k > run.dataset.items:
        raise ConfigError(
            f"--k={options.k}: the catalogue has {run.dataset.items:,} items; give {run.dataset.items} or less"
        )
    work = _work(run, options)
    parts = Parts(out, _manifest(run, options), len(work.parts))
    total = sum(len(users) for users, _ in work.parts)
    missing = [i for i, (users, _) in enumerate(work.parts) if not parts.done(i, len(users))]
    recommender = Recommender(
        run.model, run.mesh, run.config.evaluation.batch_size, options.k, options.filter_seen
    )
    items = run.dataset.item_ids()
    with Progress("scoring", total, unit="users/s") as progress:
        for note in work.notes:
            progress.say(note)
        if len(missing) < len(work.parts):
            progress.say(f"{len(work.parts) - len(missing)} of {len(work.parts)} parts are there already")
        done = total - sum(len(work.parts[i][0]) for i in missing)
        lists = recommender.prepare(run.params, run.tables) if missing else None
        for part in missing:
            users, ends = work.parts[part]
            assert lists is not None
            parts.write(part, work.ids(users), lists(work.source, users, ends), items)
            done += len(users)
            progress.update(done)
    return {"users": total, "parts": len(work.parts), "skipped": len(work.parts) - len(missing)}


def _work(run: Run, options: ScoreOptions) -> _Work:
    table = None if options.users is None else read_table(options.users)
    if table is not None and has_histories(table):
        return _work_of_file(run, options, table)
    stored = Histories(run.dataset, options.cache_dir or run.config.data.cache_dir)
    ends_U = (
        stored.lengths if options.split == "all" else asked(make_splits(stored, run.config), options.split)
    )
    without = f"users without a {options.split} target left out"
    if table is not None:
        chosen, notes = _known(stored, table.column("user_id").to_pylist(), options.users)
        kept = chosen[ends_U[chosen] != NONE]
        notes += _told(len(chosen) - len(kept), without)
        return _Work(stored, stored.ids_of, _chunks(kept, ends_U[kept]), notes)
    ranges = [np.arange(group.start, group.stop) for group in groups(stored)]
    users = [each[ends_U[each] != NONE] for each in ranges]
    notes = _told(stored.users - sum(map(len, users)), without)
    return _Work(stored, stored.ids_of, [(each, ends_U[each]) for each in users], notes)


def _work_of_file(run: Run, options: ScoreOptions, table: pa.Table) -> _Work:
    if options.split != "all":
        raise ConfigError(
            f"--split={options.split}: {options.users} brings its own histories; leave the flag out"
        )
    histories = new_histories(table, run.dataset, options.users)
    notes = _told(histories.unknown_items, "events of unknown items left out")
    notes += _told(histories.empty_users, "users without a known item left out")
    ids = histories.users
    return _Work(
        histories, lambda u: [ids[i] for i in u], _chunks(np.arange(len(ids)), histories.lengths), notes
    )


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


def _told(count: int, what: str) -> list[str]:
    return [f"{count:,} {what}"] if count else []


def _manifest(run: Run, options: ScoreOptions) -> dict[str, Any]:
    users = None if options.users is None else hashlib.sha256(options.users.read_bytes()).hexdigest()
    return {
        "format": 1,
        "dataset": run.dataset.content,
        "config": hashlib.sha256(configs.to_json(run.config).encode()).hexdigest(),
        "workdir": run.path.absolute().name,
        "step": run.step,
        "weights": tree_digest((run.params, run.tables)),
        "k": options.k,
        "filter_seen": options.filter_seen,
        "split": options.split,
        "users": users,
    }
