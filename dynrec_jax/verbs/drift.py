"""What `dynrec evaluate --drift` does: metrics in each part of the queries, as a table, JSON and a plot."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dynrec_jax.errors import MachineError

if TYPE_CHECKING:
    from dynrec_jax.evaluate.evaluator import Evaluator
    from dynrec_jax.evaluate.recommender import Lists
    from dynrec_jax.workdir import Run


def measure(run: "Run", evaluator: "Evaluator", lists: "Callable[..., Lists]") -> dict[str, Any]:
    """The slices of one run's evaluation, for JSON.

    Args:
      run: what was evaluated.
      evaluator: of all its users, in one process.
      lists: of the model, as `Recommender.prepare` gives them.
    """
    from dynrec_jax.evaluate.baselines.known import BASELINES
    from dynrec_jax.evaluate.baselines.learned import Learning
    from dynrec_jax.evaluate.comparison import chosen_setting, main_metric, metric_names, scored_lists
    from dynrec_jax.evaluate.drift import measure_slices, recovery
    from dynrec_jax.evaluate.evaluator import Evaluator, asked
    from dynrec_jax.evaluate.oracle import oracle_lists, synthetic_spec
    from dynrec_jax.evaluate.slices import Queries, all_slices

    learning = Learning(evaluator.histories, evaluator.splits, run.config)
    k = evaluator.recommender.k
    ranks = {"model": evaluator.ranks_of(lists)}
    validation = None
    if len(asked(evaluator.splits, "validation").users):
        validation = Evaluator(
            evaluator.histories,
            evaluator.splits,
            "validation",
            run.model,
            run.config,
            run.mesh,
            items=run.items,
        )
    for name in ("popularity", "item_knn"):
        scorers = BASELINES[name](learning)
        scorer = scorers[chosen_setting(scorers, learning, validation)]
        ranks[name] = evaluator.ranks_of(scored_lists(scorer, learning, evaluator))
    spec = synthetic_spec(run.dataset)
    if spec is not None:
        ranks["oracle"] = evaluator.ranks_of(oracle_lists(spec, run.dataset, k))
    queries = Queries(evaluator.users_U, evaluator.ends_U, evaluator.targets_U)
    slices = all_slices(learning, queries, lambda: _vectors(run, evaluator))
    result: dict[str, Any] = {
        "split": evaluator.which,
        "step": run.step,
        "metric": main_metric(metric_names(evaluator.ks)),
        "protocol": evaluator.protocol(),
        "slices": measure_slices(slices, queries, ranks, evaluator.ks),
    }
    shift = next((way for way in result["slices"] if way["name"] == "shift"), None)
    if shift is not None:
        result["recovery"] = {name: recovery(shift, name, result["metric"]) for name in ranks}
    return result


def _vectors(run: "Run", evaluator: "Evaluator") -> np.ndarray:
    """float32[N, D], items as the user encoder reads them."""
    from dynrec_jax.parallel.table import rows_of

    vectors_RxD, _ = evaluator.recommender.vectors(run.params, run.tables)
    return np.asarray(vectors_RxD)[rows_of(np.arange(1, run.dataset.items + 1), vectors_RxD.shape[0])]


def write(workdir: Path, result: Mapping[str, Any]) -> list[Path]:
    """Writes `evaluation/drift_<split>.json` and a plot beside it; raises MachineError where it cannot."""
    from dynrec_jax.files import write_whole
    from dynrec_jax.report.drift import draw_drift

    path = workdir / "evaluation" / f"drift_{result['split']}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(result, indent=2) + "\n")
        draw_drift(path.with_suffix(".png"), result["slices"], result["metric"])
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error})") from None
    return [path, path.with_suffix(".png")]


def show(result: Mapping[str, Any]) -> None:
    """A row a bin: how many queries, and the main metric of each model."""
    console = Console()
    names = list(next(b["metrics"] for way in result["slices"] for b in way["bins"] if b["metrics"]))
    table = Table(title=f"{result['split']}: {result['metric']} in parts of the queries")
    for column in ("", "queries", *names):
        table.add_column(column, justify="right" if column else "left")
    for way in result["slices"]:
        table.add_section()
        table.add_row(f"[bold]{way['title']}[/bold]")
        for each in way["bins"]:
            values = [
                f"{each['metrics'][name][result['metric']]['mean']:.4f}" if each["metrics"] else ""
                for name in names
            ]
            table.add_row(f"  {each['label']}", f"{each['queries']:,}", *values)
    console.print(table)
    for name, events in result.get("recovery", {}).items():
        told = "does not come back" if events is None else f"is back after {events} events"
        console.print(
            f"after a change of interest {name} {told} at 90 % of {result['metric']} before", highlight=False
        )
