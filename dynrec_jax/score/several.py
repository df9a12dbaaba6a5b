"""Several runs of one dataset, such as the seeds of an experiment, that recommend together."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from dynrec_jax import workdir as workdirs
from dynrec_jax.config import flat
from dynrec_jax.errors import ConfigError
from dynrec_jax.evaluate.joined import ListMaker, joined, offered
from dynrec_jax.evaluate.recommender import Recommender
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.workdir import Run

# What runs must have in common for their numbers to be of the same queries.
PROTOCOL = (
    *(
        f"evaluation.{name}"
        for name in ("split", "holdout", "validation_from", "test_from", "targets", "filter_seen")
    ),
    "data.target_events",
    "data.cold_items",
)


def check_same(configs: Mapping[Path, ml_collections.ConfigDict]) -> None:
    """Refuses runs that were trained for other queries than the first one.

    Raises:
      ConfigError: a run has another protocol; what differs is named.
    """
    first, *others = configs
    expected = flat(configs[first])
    for path in others:
        found = flat(configs[path])
        for key in PROTOCOL:
            if found[key] != expected[key]:
                raise ConfigError(
                    f"{path}: {key} is {found[key]!r}, of {first} it is {expected[key]!r}; "
                    "numbers of different protocols cannot be compared"
                )


def open_with(
    first: Run,
    paths: Sequence[Path],
    step: str | int,
    dataset: str | Path | None,
    processes: Processes = ALONE,
    items: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Run]:
    """`first` and the runs that recommend with it; flags are those of `workdir.open`.

    Raises:
      ConfigError: a run is there twice, is of another dataset or protocol, or `workdir.open` refuses it.
    """
    runs = [first]
    for path in paths:
        if path.absolute() in [run.path.absolute() for run in runs]:
            raise ConfigError(f"--with: {path} is named twice; its lists would count twice")
        config = processes.agree(functools.partial(workdirs.open_config, path))
        processes.agree(functools.partial(check_same, {first.path: first.config, path: config}))
        # Where the first one's dataset lies is where theirs does: a run that was of another one is refused.
        place = dataset or first.dataset.path
        runs.append(workdirs.open(path, step, place, processes, items, say))
    return runs


def lists_of(runs: Sequence[Run], k: int, filter_seen: bool, processes: Processes = ALONE) -> ListMaker:
    """Lists of `k` items by all of `runs` together; of one run, its own, as `Recommender.prepare` gives them.

    Raises:
      NonFiniteScores: item vectors of one are not finite.
    """
    length = k if len(runs) == 1 else offered(k, runs[0].items.number)
    makers = [
        Recommender(
            run.model,
            run.mesh,
            runs[0].config.evaluation.batch_size,
            length,
            filter_seen,
            processes,
            run.items,
        ).prepare(run.params, run.tables)
        for run in runs
    ]
    return makers[0] if len(runs) == 1 else joined(makers, k)


def described(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Which runs recommend together, for the output: folder and step of each."""
    return [{"workdir": run.path.absolute().name, "step": run.step} for run in runs]
