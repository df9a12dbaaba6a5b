"""Replays a log as a stream and recommends after every event: what real-time feedback is worth.

    python experiments/replay.py --workdir=runs/shop [--users=200] [--k=10]

Events after the end of training come one by one, in the order of their times. Before each, its user gets a list twice:
from the state as the events so far have made it, and from the state as training left it. Then the event is appended.
Prints how often the event was on either list, and how many events a second were answered.
"""

import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.pipeline import make_splits
from dynrec_jax.errors import ConfigError, DataError, report_errors
from dynrec_jax.score.live import Live
from dynrec_jax.train.progress import Progress
from dynrec_jax.verbs.evaluate import parse_step

TOGETHER = 256  # events of different users that are answered at once


def main(arguments: list[str]) -> int:
    """Parses flags and replays; returns the exit status."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_integer("users", 500, "users whose events are replayed", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("k", 10, "length of the lists", lower_bound=1, flag_values=values)
    return report_errors(lambda: _run(values, arguments))


def _run(values: flags.FlagValues, arguments: list[str]) -> None:
    try:
        values(["replay", *arguments])
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected a run folder made by `dynrec train`")
    run = workdirs.open(Path(values.workdir), parse_step(values.step))
    histories = Histories(run.dataset, run.config.data.cache_dir)
    ends_U = make_splits(histories, run.config).train_end
    later_U = np.flatnonzero((histories.lengths > ends_U) & (ends_U > 0))[: values.users]
    if len(later_U) == 0:
        raise DataError(f"{run.dataset.path}: no user has an event after the end of training")
    names = histories.ids_of(later_U)
    live, frozen = Live(run, names), Live(run, names)
    if not live.stream.continues:
        print(
            f"the model reads a history again at each event once it has more than {run.config.data.max_length}: "
            "model.attention_window and model.positions=relative would go on without"
        )
    for each in (live, frozen):
        each.read(histories, ends_U)
    events = _events(histories, later_U, ends_U)
    found, seconds = np.zeros((2, 2)), 0.0
    filter_seen = bool(run.config.evaluation.filter_seen)
    with Progress("replaying", len(events[0]), unit="events/s") as progress:
        done = 0
        for start, stop in _batches(events[0]):
            number, item, moment, kind = (column[start:stop] for column in events)
            began = time.perf_counter()
            fresh = live.lists(number, values.k, moment, filter_seen)
            seconds += time.perf_counter() - began
            stale = frozen.lists(number, values.k, moment, filter_seen)
            for row, lists in enumerate((fresh, stale)):
                hit_BxK = lists.ids == item[:, None]
                found[row] += hit_BxK.any(axis=1).sum(), (hit_BxK / np.log2(np.arange(values.k) + 2)).sum()
            began = time.perf_counter()
            live.put(number, item, moment, kind)
            seconds += time.perf_counter() - began
            done += stop - start
            progress.update(done)
    count = len(events[0])
    table = Table(title=f"{count:,} events of {len(names):,} users after the end of training")
    for column in ("state", f"recall@{values.k}", f"ndcg@{values.k}"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for name, (hits, gain) in zip(("with each event", "as training left it"), found / count, strict=True):
        table.add_row(name, f"{hits:.4f}", f"{gain:.4f}")
    Console().print(table)
    print(f"{count / seconds:,.0f} events a second were answered and appended")


def _events(histories: Histories, users: np.ndarray, ends_U: np.ndarray) -> tuple[np.ndarray, ...]:
    """Users by their place, items, times and types of all later events, in the order of their times."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for place, user in enumerate(users.tolist()):
        length = int(histories.lengths[user])
        windows = histories.windows(np.array([user]), np.array([length]), length)
        late = slice(int(ends_U[user]), length)
        columns[0].append(np.full(length - int(ends_U[user]), place))
        for column, values in zip(columns[1:], windows, strict=True):
            column.append(values[0, late])
    numbers, items, times, types = (np.concatenate(parts) for parts in columns)
    order = np.argsort(times, kind="stable")
    return numbers[order], items[order], times[order], types[order]


def _batches(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Runs of events in which no user comes twice."""
    found, start = [], 0
    seen: set[int] = set()
    for at, number in enumerate(numbers.tolist()):
        if number in seen or at - start == TOGETHER:
            found.append((start, at))
            start, seen = at, set()
        seen.add(number)
    return [*found, (start, len(numbers))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
