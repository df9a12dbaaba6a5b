"""A sweep's trials as tables: in the terminal, as CSV and Parquet, and with seeds taken together."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from rich.markup import escape
from rich.table import Table

from dynrec_jax.files import temporary_name, write_whole
from dynrec_jax.sweep.definition import Sweep
from dynrec_jax.sweep.ledger import COMPLETE, FAILED, PRUNED, RUNNING, WAITING, Row
from dynrec_jax.sweep.space import Point

SEED = "seed"
MOST_SHOWN = 30  # rows in the terminal
STYLES = {COMPLETE: "green", PRUNED: "yellow", FAILED: "red", RUNNING: "cyan", WAITING: "dim"}


class Group(NamedTuple):
    """Trials that differ in their seed alone.

    Attributes:
      point: what they change, their seed left out.
      rows: those that are complete.
      mean: of the metric.
      deviation: of it, from seed to seed (n - 1); 0 for one.
    """

    point: Point
    rows: list[Row]
    mean: float
    deviation: float


def groups(rows: Sequence[Row]) -> list[Group]:
    """Complete trials, seeds taken together; best first, those with fewer seeds than others behind."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.state == COMPLETE and row.value is not None:
            found.setdefault(repr(_without_seed(row.point)), []).append(row)
    made = []
    for several in found.values():
        values = [row.value for row in several if row.value is not None]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        made.append(Group(_without_seed(several[0].point), several, statistics.fmean(values), deviation))
    return sorted(made, key=lambda group: (-len(group.rows), -group.mean))


def best(rows: Sequence[Row]) -> Row | None:
    """The trial to go on with: of the seeds with the best mean, the best one."""
    found = groups(rows)
    return max(found[0].rows, key=lambda row: (row.value or 0.0, -row.number)) if found else None


def records(sweep: Sweep, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A record a trial: `trial`, `state`, the keys that trials change, the metrics, and how it went."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics)) or [sweep.metric]
    return [
        {
            "trial": row.number,
            "state": row.state,
            **{key: row.point.get(key) for key in sweep.keys},
            **{name: row.metrics.get(name) for name in metrics},
            "best_step": row.step if row.state in (COMPLETE, PRUNED) else None,
            "seconds": row.seconds,
            "attempts": row.attempts,
            "reason": row.reason,
            "folder": row.folder,
        }
        for row in rows
    ]


def write(sweep: Sweep, rows: Sequence[Row], workdir: Path) -> None:
    """Writes `sweep.csv` and `sweep.parquet`, and, where seeds differ, `seeds.csv`."""
    found = records(sweep, rows)
    _write_csv(workdir / "sweep.csv", found)
    # Values of a key may be of several types, as 1 and "auto"; a column is of one.
    columns = {name: _column([record[name] for record in found]) for name in (found[0] if found else {})}
    path = workdir / "sweep.parquet"
    temporary = temporary_name(path)
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)
    if SEED in sweep.keys:
        _write_csv(workdir / "seeds.csv", seed_records(sweep, rows))


def seed_records(sweep: Sweep, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A record for each config whatever its seed, best first: keys, mean, deviation and number of seeds."""
    return [
        {
            **{key: group.point.get(key) for key in sweep.keys if key != SEED},
            "mean": group.mean,
            "deviation": group.deviation,
            "seeds": len(group.rows),
            "trials": " ".join(str(row.number) for row in group.rows),
        }
        for group in groups(rows)
    ]


def rich_table(sweep: Sweep, rows: Sequence[Row]) -> Table:
    """For the terminal: what runs, then the best, then the rest, as far as there is room."""
    chosen = best(rows)
    table = Table(title=summary(sweep, rows))
    for name in ("trial", "state", *sweep.keys, sweep.metric, "step", "seconds", "attempts"):
        table.add_column(name, justify="left" if name == "state" else "right", overflow="fold")
    order = {RUNNING: 0, COMPLETE: 1, PRUNED: 2, FAILED: 3, WAITING: 4}
    ordered = sorted(rows, key=lambda row: (order[row.state], -(row.value or 0.0), row.number))
    for row in ordered[:MOST_SHOWN]:
        mark = " *" if chosen is not None and row.number == chosen.number else ""
        table.add_row(
            f"{row.number}{mark}",
            f"[{STYLES[row.state]}]{row.state}[/]",
            *(_told(row.point.get(key)) for key in sweep.keys),
            "" if row.value is None else f"{row.value:.4f}",
            "" if row.step is None else str(row.step),
            f"{row.seconds:.0f}" if row.attempts else "",
            str(row.attempts or ""),
        )
    if len(ordered) > MOST_SHOWN:
        table.caption = f"and {len(ordered) - MOST_SHOWN} more, in sweep.csv"
    return table


def summary(sweep: Sweep, rows: Sequence[Row]) -> str:
    """How far the sweep is, in a line."""
    counts = {state: sum(row.state == state for row in rows) for state in STYLES}
    parts = [f"{counts[state]} {state}" for state in (COMPLETE, PRUNED, FAILED, RUNNING) if counts[state]]
    found = groups(rows)
    several = SEED in sweep.keys
    leading = "" if not found else f"; best {sweep.metric} {found[0].mean:.4f}"
    if found and several:
        leading += f" ± {found[0].deviation:.4f} over {len(found[0].rows)} seeds"
    return f"{sweep.total} trials: {', '.join(parts) or 'none begun'}{leading}"


def _told(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _without_seed(point: Point) -> Point:
    return {key: value for key, value in sorted(point.items()) if key != SEED}


def _write_csv(path: Path, found: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    if found:
        writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    write_whole(path, text.getvalue())


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array([list(value) if isinstance(value, tuple) else value for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
