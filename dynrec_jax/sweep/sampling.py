"""Which point a search tries next, and which trials are given up: by Optuna, on a copy of what is known.

On a copy in memory nothing is half done: a point is drawn, compared with those there are, and only then recorded, in
one transaction. What is drawn depends on the sampler's seed and the trials before, not on the worker that draws.
"""

import functools
import json
import random
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from dynrec_jax.errors import ConfigError
from dynrec_jax.sweep.definition import Sweep, from_plain
from dynrec_jax.sweep.space import Choice, Grid, Integer, Point, Real, Search, When

NAME = "sweep"  # Hyperband deals trials to its brackets by the study's name
ETA = 3  # successive halving keeps one in so many
TRIES = 20  # draws of the sampler that may all be known, before points are drawn at random
RANDOM_TRIES = 100  # before an infinite space counts as exhausted
MOST_LISTED = 2_000  # points of a finite space that are listed, to know which are left


def copy_of(
    trials: Iterable[FrozenTrial], sampler: BaseSampler | None = None, attributes: Any = None
) -> optuna.Study:
    """A study in memory of the same trials, with their numbers, to be maximised."""
    storage = optuna.storages.InMemoryStorage()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(
            storage=storage,
            sampler=sampler or optuna.samplers.RandomSampler(0),
            study_name=NAME,
            direction="maximize",
        )
    identity = storage.get_study_id_from_name(NAME)
    for key, value in (attributes or {}).items():
        storage.set_study_system_attr(identity, key, value)
    for trial in trials:
        storage.create_new_trial(identity, template_trial=trial)
    return study


class Drawn(Exception):
    """The space has no point left that was not tried."""


def draw(
    sweep: Sweep, trials: Sequence[FrozenTrial], identities: set[str], attributes: dict[str, Any]
) -> tuple[Point, FrozenTrial, dict[str, Any]]:
    """A point whose config is valid and that of none of the trials.

    Args:
      sweep: a search.
      trials: all there are, in their order.
      identities: of their configs, as `Sweep.identity` tells them.
      attributes: what the sampler has kept.

    Returns:
      The point; Optuna's trial with its parameters; and what the sampler keeps from now on.

    Raises:
      Drawn: everything has been tried; where the space is not finite, as far as draws at random can find.
    """
    assert isinstance(sweep.what, Search)
    left = _left(sweep, identities)
    if left is not None and not left:
        raise Drawn
    tries = TRIES if left is not None else TRIES + RANDOM_TRIES
    for attempt in range(tries):
        own = attempt < TRIES
        number = len(trials) * 1_000 + attempt
        study = copy_of(
            trials, _sampler(sweep.what.sampler if own else "random", sweep.what, number), attributes
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            point = _ask(study.ask(), sweep.what)
        storage = study._storage
        if own:  # a sequence goes on behind a point that is known already
            attributes = storage.get_study_system_attrs(storage.get_study_id_from_name(NAME))
        if _identity(sweep, point) not in (None, *identities):
            return point, study.get_trials()[-1], attributes
    if not left:
        raise Drawn
    point = random.Random(f"{sweep.what.seed} {len(trials)}").choice(left)
    return point, trial_of(sweep, point), attributes


def trial_of(sweep: Sweep, point: Point) -> FrozenTrial:
    """Optuna's trial of a point that no sampler has drawn."""
    known = distributions(sweep.what)
    return optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params={key: label(value) for key, value in point.items()},
        distributions={key: known[key] for key in point},
    )


def _identity(sweep: Sweep, point: Point) -> str | None:
    """As `Sweep.identity`; None for a combination that is no valid config."""
    try:
        return sweep.identity(point)
    except ConfigError:
        return None


def _left(sweep: Sweep, identities: set[str]) -> list[Point] | None:
    """The points of a finite space that were not tried; None of a space that is infinite, or too large to list."""
    listed = _listed(json.dumps(sweep.plain(), sort_keys=True))
    if listed is None:
        return None
    return [point for identity, point in listed.items() if identity not in identities]


@functools.lru_cache(maxsize=4)
def _listed(plain: str) -> dict[str, Point] | None:
    """The valid points of a search in JSON, by their configs' identities."""
    sweep = from_plain(json.loads(plain), "")
    assert isinstance(sweep.what, Search)
    points: list[Point] = [{}]
    for key, each in sweep.what.space.items():
        found = each.then if isinstance(each, When) else each
        if isinstance(found, Real):
            return None
        values = found.values if isinstance(found, Choice) else range(found.low, found.high + 1, found.step)
        if len(points) * len(values) > MOST_LISTED:
            return None
        points = [
            grown
            for point in points
            for grown in (
                [{**point, key: value} for value in values]
                if not isinstance(each, When) or point.get(each.key) in each.values
                else [point]
            )
        ]
    return {identity: point for point in points if (identity := _identity(sweep, point)) is not None}


def _sampler(name: str, search: Search, number: int) -> BaseSampler:
    seed = (search.seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental"
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup, constant_liar=True)
        if name == "qmc":  # one sequence, whoever draws from it
            return optuna.samplers.QMCSampler(
                seed=search.seed,
                scramble=True,
                independent_sampler=optuna.samplers.RandomSampler(seed),
                warn_independent_sampling=False,
            )
        if name == "nsgaii":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, search.startup))
    return optuna.samplers.RandomSampler(seed)


def _ask(trial: optuna.Trial, search: Search) -> Point:
    point: Point = {}
    for key, each in search.space.items():
        if isinstance(each, When):
            if point.get(each.key) not in each.values:
                continue
            each = each.then
        if isinstance(each, Real):
            point[key] = trial.suggest_float(key, each.low, each.high, log=each.log)
        elif isinstance(each, Integer):
            point[key] = trial.suggest_int(key, each.low, each.high, step=each.step, log=each.log)
        else:
            by_label = {label(value): value for value in each.values}
            point[key] = by_label[trial.suggest_categorical(key, list(by_label))]
    return point


def distributions(what: Grid | Search) -> dict[str, BaseDistribution]:
    """What Optuna is told of the keys, so that its charts know numbers from names."""
    if isinstance(what, Search):
        return {
            key: _of_range(each.then if isinstance(each, When) else each) for key, each in what.space.items()
        }
    found: dict[str, list[Any]] = {}
    for point in what.points:
        for key, value in point.items():
            found.setdefault(key, [])
            if value not in found[key]:
                found[key].append(value)
    return {key: _distribution(values) for key, values in found.items()}


def _of_range(each: Real | Integer | Choice) -> BaseDistribution:
    if isinstance(each, Real):
        return FloatDistribution(each.low, each.high, log=each.log)
    if isinstance(each, Integer):
        return IntDistribution(each.low, each.high, log=each.log, step=each.step)
    return CategoricalDistribution([label(value) for value in each.values])


def _distribution(values: list[Any]) -> BaseDistribution:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return CategoricalDistribution(list(dict.fromkeys(map(label, values))))
    log = min(numbers) > 0 and max(numbers) >= 8 * min(numbers)
    whole = [number for number in numbers if isinstance(number, int)]
    if len(whole) == len(numbers):
        return IntDistribution(min(whole), max(whole), log=log)
    return FloatDistribution(min(numbers), max(numbers), log=log)


def label(value: Any) -> Any:
    """A value as Optuna takes it: names and numbers as they are, others in words."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def hopeless(sweep: Sweep, trials: Sequence[FrozenTrial], place: int) -> tuple[bool, dict[str, Any]]:
    """Whether the trial in a place is to be given up after its last report; and what the pruner keeps with it."""
    pruner = _pruner(sweep)
    if pruner is None:
        return False, {}
    study = copy_of(trials)
    given_up = pruner.prune(study, study.get_trials()[place])
    return given_up, study.get_trials()[place].system_attrs


def _pruner(sweep: Sweep) -> BasePruner | None:
    """Median (Golovin et al. 2017), successive halving (Li et al. 2018), Hyperband (Li et al. 2017)."""
    name = sweep.what.pruner
    least = max(1, int(sweep.base.train.evaluate_every))
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=ETA)
    if name == "hyperband":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.pruners.HyperbandPruner(least, max(least, sweep.most_steps), ETA)
    return None
