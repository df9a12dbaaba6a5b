"""What a sweep tries: grids as plain lists of overrides, or ranges that are searched.

An override is a dict of flat config keys, such as `{"train.learning_rate": 1e-3, "seed": 0}`. Grids are lists of
them, made by hand or here:

    product(zip_("model.dim", [64, 128], "train.learning_rate", [2e-3, 1e-3]), over("seed", range(3)))   # 6 trials

A search draws them:

    search({"train.learning_rate": real(1e-4, 1e-2, log=True), "model.block": choice("prenorm", "hstu")}, trials=30)
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = dict[str, Any]  # an override: flat config keys and their values

SAMPLERS = ("tpe", "random", "qmc", "nsgaii")
PRUNERS = ("none", "median", "hyperband", "halving")


def over(key: str, values: Iterable[Any]) -> list[Point]:
    """A point for each value of one key."""
    return [{key: value} for value in _several(key, values)]


def zip_(*keys_and_values: Any) -> list[Point]:
    """Points in which several keys move together: `zip_("a", [1, 2], "b", [3, 4])`.

    Raises:
      ValueError: keys without values, or of different numbers of them.
    """
    keys, columns = keys_and_values[::2], [list(values) for values in keys_and_values[1::2]]
    if not keys or len(keys) != len(columns) or not all(isinstance(key, str) for key in keys):
        raise ValueError('zip_: expected keys and their values in turn, as in zip_("a", [1, 2], "b", [3, 4])')
    if len({len(column) for column in columns}) > 1:
        told = ", ".join(f"{key} {len(column)}" for key, column in zip(keys, columns, strict=True))
        raise ValueError(f"zip_: keys have different numbers of values ({told})")
    if len(set(keys)) < len(keys):
        raise ValueError(f"zip_: a key is given twice ({', '.join(keys)})")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def product(*grids: Sequence[Point]) -> list[Point]:
    """Every combination of a point of each grid; the last grid moves fastest.

    Raises:
      ValueError: two grids set the same key.
    """
    points = []
    for parts in itertools.product(*grids):
        point: Point = {}
        for part in parts:
            if twice := point.keys() & part.keys():
                raise ValueError(f"product: {', '.join(sorted(twice))} is set by two grids")
            point |= part
        points.append(point)
    return points


@dataclasses.dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`, evenly or, with `log`, in equal ratios."""

    low: float
    high: float
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Integer:
    """Whole numbers from `low` to `high`, both included, in steps of `step`, or in equal ratios."""

    low: int
    high: int
    step: int = 1
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class When:
    """A range that counts only where another key has one of some values; else the key keeps the config's value."""

    key: str
    values: tuple[Any, ...]
    then: "Real | Integer | Choice"


Range = Real | Integer | Choice | When


@dataclasses.dataclass(frozen=True)
class Grid:
    """Points that are all tried.

    Attributes:
      points: in their order.
      pruner: one of PRUNERS.
    """

    points: list[Point]
    pruner: str = "none"


@dataclasses.dataclass(frozen=True)
class Search:
    """Points that are drawn, each with what is known of those before.

    Attributes:
      space: ranges by flat config key, in the order in which they are drawn.
      trials: how many different points.
      sampler: one of SAMPLERS.
      pruner: one of PRUNERS.
      seed: of the sampler.
      startup: points drawn at random before the sampler learns from them.
    """

    space: dict[str, Range]
    trials: int
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0
    startup: int = 10


def real(low: float, high: float, log: bool = False) -> Real:
    """Numbers from `low` to `high`; with `log`, in equal ratios. Raises ValueError for an empty range."""
    _check_range("real", low, high, log)
    return Real(float(low), float(high), log)


def integer(low: int, high: int, step: int = 1, log: bool = False) -> Integer:
    """Whole numbers from `low` to `high`, both included. Raises ValueError for an empty range."""
    _check_range("integer", low, high, log)
    if int(low) != low or int(high) != high:
        raise ValueError(f"integer: from {low} to {high}; expected whole numbers")
    if step < 1 or (log and step > 1):
        raise ValueError(f"integer: step={step}; expected 1 or more, and 1 with log=True")
    return Integer(int(low), int(high), int(step), log)


def choice(*values: Any) -> Choice:
    """One of the values. Raises ValueError where there is none."""
    if not values:
        raise ValueError("choice: has no values")
    return Choice(values)


def when(key: str, values: Any, then: Range) -> When:
    """A range that counts only where `key` is `values`, or one of them where they are a list.

    Raises:
      ValueError: a condition within a condition, or no values.
    """
    if isinstance(then, When):
        raise ValueError("when: a condition within a condition; name both keys in a choice instead")
    found = tuple(values) if isinstance(values, list) else (values,)
    if not found:
        raise ValueError(f"when: {key} has no values")
    if not isinstance(then, Real | Integer | Choice):
        raise ValueError(f"when: {then!r}; expected real(…), integer(…) or choice(…)")
    return When(key, found, then)


def search(
    space: Mapping[str, Range],
    trials: int,
    sampler: str = "tpe",
    pruner: str = "none",
    seed: int = 0,
    startup: int = 10,
) -> Search:
    """A search of `trials` points; the fields are those of `Search`.

    Raises:
      ValueError: no keys, no trials, no such sampler or pruner, or a condition on a key that is not drawn before.
    """
    if not space:
        raise ValueError("search: the space has no keys")
    if trials < 1:
        raise ValueError(f"search: trials={trials}; expected 1 or more")
    if sampler not in SAMPLERS:
        raise ValueError(f"search: sampler={sampler!r}; expected one of {', '.join(SAMPLERS)}")
    check_pruner(pruner)
    before: set[str] = set()
    for key, each in space.items():
        if not isinstance(each, Real | Integer | Choice | When):
            raise ValueError(f"search: {key} is {each!r}; expected real(…), integer(…), choice(…) or when(…)")
        if isinstance(each, When) and each.key not in before:
            raise ValueError(f"search: {key} asks for {each.key}, which is not drawn before it")
        if isinstance(each, When) and not _may_be(space[each.key], each.values):
            raise ValueError(f"search: {key} asks for {each.key}={each.values!r}, which is never drawn")
        before.add(key)
    return Search(dict(space), int(trials), sampler, pruner, int(seed), int(startup))


def pruned(points: Sequence[Point], pruner: str = "median") -> Grid:
    """A grid whose hopeless trials end early; raises ValueError where there is no such pruner."""
    check_pruner(pruner)
    return Grid(list(points), pruner)


def check_pruner(name: str) -> None:
    """Raises ValueError where there is no pruner of that name."""
    if name not in PRUNERS:
        raise ValueError(f"pruner={name!r}; expected one of {', '.join(PRUNERS)}")


def _may_be(each: Range, values: tuple[Any, ...]) -> bool:
    """Whether one of the values may be drawn from a range; of those that are not choices, it is not looked at."""
    found = each.then if isinstance(each, When) else each
    return not isinstance(found, Choice) or any(value in found.values for value in values)


def _several(key: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str):  # over("model.block", "hstu") would try the letters
        raise ValueError(f"over: {key} has the values {values!r}; expected a list of them")
    return list(values)


def _check_range(name: str, low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"{name}: from {low} to {high}; expected a range that is not empty")
    if log and low <= 0:
        raise ValueError(f"{name}: from {low}, with log=True; expected more than 0")
