"""What a sweep has found, in pictures: how the best came about, which keys matter, and which values go together."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from dynrec_jax.files import temporary_name
from dynrec_jax.sweep.definition import Sweep
from dynrec_jax.sweep.ledger import COMPLETE, PRUNED, Row
from dynrec_jax.sweep.sampling import copy_of, distributions, label

FEWEST = 4  # complete trials that tell something of importance


def importance(sweep: Sweep, rows: Sequence[Row]) -> dict[str, float]:
    """The share of each key in how good a trial is, largest first: PED-ANOVA (Watanabe et al. 2023).

    Empty where too few trials are complete, or all are alike. Keys that only some trials have are left out.
    """
    found = [row for row in rows if row.state == COMPLETE and row.value is not None]
    if len(found) < FEWEST or len({row.value for row in found}) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental"
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        made = optuna.importance.get_param_importances(copy_of(_trials(sweep, rows)), evaluator=evaluator)
    return {key: float(value) for key, value in made.items()}


def draw(sweep: Sweep, rows: Sequence[Row], shares: dict[str, float], folder: Path) -> list[Path]:
    """Writes history.png, parallel_coordinates.png and, where there are `shares`, importance.png; returns them.

    `shares` is what `importance` tells.
    """
    if not any(row.state == COMPLETE for row in rows):
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    study = copy_of(_trials(sweep, rows))
    name = f"validation {sweep.metric}"
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.visualization.matplotlib.plot_optimization_history(study, target_name=name)
        made.append(_saved(folder / "history.png"))
        optuna.visualization.matplotlib.plot_parallel_coordinate(study, target_name=name)
        pyplot.gcf().set_size_inches(2.5 + 1.6 * len(sweep.keys), 5)
        made.append(_saved(folder / "parallel_coordinates.png"))
        if shares:
            figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.4 * len(shares)))
            axes.barh(list(shares), list(shares.values()))
            axes.invert_yaxis()
            axes.set_xlabel(f"share in {name} (PED-ANOVA)")
            figure.tight_layout()
            made.append(_saved(folder / "importance.png"))
    return made


def _saved(path: Path) -> Path:
    from matplotlib import pyplot

    temporary = temporary_name(path)
    pyplot.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    pyplot.close("all")
    temporary.replace(path)
    return path


def _trials(sweep: Sweep, rows: Sequence[Row]) -> list[FrozenTrial]:
    """Ended trials as Optuna's charts take them."""
    known = distributions(sweep.what)
    states = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED}
    return [
        optuna.trial.create_trial(
            state=states[row.state],
            value=row.value,
            params={key: label(value) for key, value in row.point.items()},
            distributions={key: known[key] for key in row.point},
        )
        for row in rows
        if row.state in states and row.value is not None
    ]
