"""What `dynrec evaluate --prequential=N` does: walks through time, and scores each period before learning from it.

The events from the test's moment on fall into N periods with as many events each. Every event of a period is asked for
three ways: by the model and the histories as they were when the test began (`frozen`); by the same weights, with each
history up to the event (`appended`); and by a model trained anew before the period, with each history up to the event
(`retrained`), in WORKDIR/prequential: on all up to as long before the period as the run's training ended before its
test, and what lies between chooses the checkpoint.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np
from rich.console import Console
from rich.table import Table

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.verbs.train import train

if TYPE_CHECKING:
    from dynrec_jax.evaluate.evaluator import Evaluator
    from dynrec_jax.workdir import Run

METRICS = ("ndcg@10", "recall@10", "mrr")
WAYS = ("frozen", "appended", "retrained")


def measure(workdir: Path, run: "Run", periods: int, cache_dir: str | None = None) -> dict[str, Any]:
    """The three ways in each period, for JSON.

    Raises:
      ConfigError: the run's split has no moments, or a period has no events.
    """
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.pipeline import time_cuts
    from dynrec_jax.evaluate.comparison import main_metric
    from dynrec_jax.evaluate.evaluator import Evaluator

    config = run.config
    if config.evaluation.split != "global_time":
        raise ConfigError(
            f"--prequential: walks through time, and {run.path} has evaluation.split={config.evaluation.split}; "
            "train with global_time"
        )
    histories = Histories(run.dataset, cache_dir or config.data.cache_dir)
    validation, test = time_cuts(histories, config.evaluation)
    edges = _edges(histories, test, periods)
    rows: list[dict[str, Any]] = []
    protocol: dict[str, Any] = {}
    for number, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
        splits = _splits(histories, config, start, stop)

        def evaluator(of: "Run", splits: Any = splits) -> Evaluator:
            return Evaluator(histories, splits, "test", of.model, of.config, of.mesh, items=of.items)

        asked = evaluator(run)
        row: dict[str, Any] = {"from": int(start), "until": int(stop), "queries": asked.users}
        row["frozen"] = _intervals(asked, _frozen_ranks(run, asked, histories.count_before(test)))
        lists = asked.recommender.prepare(run.params, run.tables)
        row["appended"] = _intervals(asked, asked.ranks_of(lists))
        if number == 0:
            row["retrained"] = row["appended"]  # nothing came between
        else:
            folder = workdir / "prequential" / f"{periods}-{number}"
            train(_until(run, start, start - (test - validation)), folder, cache_dir)
            again = workdirs.open(folder, "best", run.dataset.path)
            new = evaluator(again)
            row["retrained"] = _intervals(
                new, new.ranks_of(new.recommender.prepare(again.params, again.tables))
            )
        rows.append(row)
        protocol = {**asked.protocol(), "targets": "all", "test_from": test}
        row["targets_in_history"] = protocol.pop("targets_in_history")
    metric = main_metric(rows[0]["appended"])
    return {"step": run.step, "metric": metric, "protocol": protocol, "periods": rows}


def _edges(histories: Any, test: int, periods: int) -> np.ndarray:
    """int64[periods + 1], moments between which as many events lie."""
    every = np.sort(histories.times_from(test))
    if len(every) < periods:
        raise ConfigError(
            f"--prequential={periods}: {len(every)} events come after the test's moment; give fewer periods"
        )
    edges = every[np.linspace(0, len(every) - 1, periods + 1).round().astype(np.int64)]
    edges[0], edges[-1] = test, every[-1] + 1
    if (np.diff(edges) <= 0).any():
        raise ConfigError(f"--prequential={periods}: some periods would have no time; give fewer")
    return edges


def _splits(histories: Any, config: ml_collections.ConfigDict, start: int, stop: int) -> Any:
    """Asks for every event of a period; nothing else of the split is looked at."""
    from dynrec_jax.data.event_types import target_types
    from dynrec_jax.data.examples import Splits
    from dynrec_jax.data.pipeline import asked_between, make_splits

    whole = config.copy_and_resolve_references()
    with whole.unlocked():
        whole.evaluation.targets = "all"
    types = target_types(config, histories.dataset.event_types)
    asked = asked_between(
        histories, whole, types, histories.count_before(int(start)), histories.count_before(int(stop))
    )
    return Splits(make_splits(histories, config).train_end, asked, asked)


def _frozen_ranks(run: "Run", asked: "Evaluator", ends_U: np.ndarray) -> np.ndarray:
    """Places of the targets in lists that were made when the test began."""
    from dynrec_jax.evaluate.metrics import ranks

    users, row_Q = np.unique(asked.users_U, return_inverse=True)
    lists = asked.recommender.prepare(run.params, run.tables)(asked.histories, users, ends_U[users])
    return ranks(lists.ids[row_Q], asked.targets_U)


def _intervals(asked: "Evaluator", ranks_Q: np.ndarray) -> dict[str, Any]:
    from dynrec_jax.evaluate.bootstrap import interval, resampled_means
    from dynrec_jax.evaluate.comparison import gains_of, main_metric, metric_names

    names = metric_names(asked.ks)
    gains_QxC = gains_of(ranks_Q, asked.ks)
    drawn = resampled_means(gains_QxC, asked.users_U)
    return {
        name: interval(gains_QxC[:, i].mean(), drawn[:, i]).as_dict()
        for i, name in enumerate(names)
        if name in (main_metric(names), *METRICS)
    }


def _until(run: "Run", test: int, validation: int) -> ml_collections.ConfigDict:
    """The config of a model that is trained on what came before a moment."""
    c = run.config.copy_and_resolve_references()
    with c.unlocked():
        c.dataset = str(run.dataset.path)  # it may have moved
        c.evaluation.test_from, c.evaluation.validation_from = int(test), int(validation)
    return c.lock()


def write(workdir: Path, result: Mapping[str, Any]) -> list[Path]:
    """Writes `evaluation/prequential.json` and a plot beside it; raises MachineError where it cannot."""
    from dynrec_jax.files import write_whole
    from dynrec_jax.report.drift import draw_drift

    path = workdir / "evaluation" / "prequential.json"
    bins = [
        {
            "label": _date(row["from"]),
            "queries": row["queries"],
            "metrics": {name: row[name] for name in WAYS},
        }
        for row in result["periods"]
    ]
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(result, indent=2) + "\n")
        slices = [{"title": "Periods after training, from", "bins": bins}]
        draw_drift(path.with_suffix(".png"), slices, result["metric"])
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error})") from None
    return [path, path.with_suffix(".png")]


def show(result: Mapping[str, Any]) -> None:
    """A row a period, with the three ways side by side."""
    table = Table(title=f"{result['metric']} in each period, before anything of it is learnt from")
    for column in ("from", "queries", *WAYS):
        table.add_column(column, justify="left" if column == "from" else "right")
    for row in result["periods"]:
        values = [row[name][result["metric"]] for name in WAYS]
        told = [f"{value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})" for value in values]
        table.add_row(_date(row["from"]), f"{row['queries']:,}", *told)
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)


def _date(seconds: int) -> str:
    return str(np.datetime64(int(seconds), "s").astype("datetime64[m]")).replace("T", " ")
