"""A sweep as its workers share it: the config that its trials start from, and what they change in it."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dynrec_jax import config as configs
from dynrec_jax.config_checks import flattened
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.sweep.space import (
    Choice,
    Grid,
    Integer,
    Point,
    Range,
    Real,
    Search,
    When,
    check_pruner,
    search,
)

FORMAT = 1
# What a trial may not change: its numbers could not be set beside those of the others.
SAME_FOR_ALL = ("dataset", "evaluation", "data.target_events", "data.cold_items", "data.items")
KINDS: dict[str, type] = {"real": Real, "integer": Integer, "choice": Choice, "when": When}
NAMES = {kind: name for name, kind in KINDS.items()}
CORNER_TRIES = 50  # combinations in which an end of a range is tried, to see whether it can be used at all
SHOWN = 4  # differences that a message names


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is tried.

    Attributes:
      base: the config that trials change, locked and valid.
      what: points that are all tried, each a config of its own, or a search.
    """

    base: ml_collections.ConfigDict
    what: Grid | Search

    @property
    def total(self) -> int:
        """How many trials."""
        return len(self.what.points) if isinstance(self.what, Grid) else self.what.trials

    @property
    def metric(self) -> str:
        """What chooses the best trial, on validation; larger is better."""
        return str(self.base.evaluation.metric)

    @property
    def keys(self) -> list[str]:
        """Config keys that trials change, in the order in which they are named."""
        if isinstance(self.what, Search):
            return list(self.what.space)
        return list(dict.fromkeys(key for point in self.what.points for key in point))

    @property
    def most_steps(self) -> int:
        """Steps of the longest trial."""
        if isinstance(self.what, Grid):
            return max(int(point.get("train.steps", self.base.train.steps)) for point in self.what.points)
        found = self.what.space.get("train.steps")
        found = found.then if isinstance(found, When) else found
        if found is None:
            return int(self.base.train.steps)
        return int(max(found.values) if isinstance(found, Choice) else found.high)

    def config_of(self, point: Point) -> ml_collections.ConfigDict:
        """The config of a trial, locked and valid.

        Raises:
          ConfigError: a key that there is not, that all trials share, or a value of another type or out of range.
        """
        config = self.base.copy_and_resolve_references()
        known = configs.flat(config)
        for key, value in point.items():
            if isinstance(value, bool) and key in known and not isinstance(known[key], bool):
                raise ConfigError(
                    f"get_sweep(): {key} is {value!r}; expected a value of type {type(known[key]).__name__}"
                )
            if key not in known:
                raise ConfigError(
                    f"get_sweep(): unknown key {key}; keys are flat, such as train.learning_rate, and "
                    "dynrec_jax/config.py lists them"
                )
            if any(key == same or key.startswith(same + ".") for same in SAME_FOR_ALL):
                raise ConfigError(
                    f"get_sweep(): {key} would change what is measured, and trials could not be compared; "
                    "make a sweep of its own for each value"
                )
            try:
                config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
            except TypeError:
                kind = type(known[key]).__name__
                raise ConfigError(
                    f"get_sweep(): {key} is {value!r}; expected a value of type {kind}"
                ) from None
        try:
            configs.validate(config)
        except ConfigError as error:
            raise ConfigError(f"get_sweep(): {told(point)}: {error}") from None
        return config.lock()

    def identity(self, point: Point) -> str:
        """Equal for points that make the same config."""
        return hashlib.sha256(configs.to_json(self.config_of(point)).encode()).hexdigest()[:16]

    def plain(self) -> dict[str, Any]:
        """As data that JSON holds."""
        if isinstance(self.what, Grid):
            what: dict[str, Any] = {
                "grid": [plain_point(p) for p in self.what.points],
                "pruner": self.what.pruner,
            }
        else:
            w = self.what
            what = {
                "space": [[key, _plain_range(each)] for key, each in w.space.items()],
                **{name: getattr(w, name) for name in ("trials", "sampler", "pruner", "seed", "startup")},
            }
        return {"format": FORMAT, "config": json.loads(configs.to_json(self.base)), **what}


def told(point: Point) -> str:
    """A point in words."""
    return ", ".join(f"{key}={value}" for key, value in point.items()) or "the config as it is"


def make(base: ml_collections.ConfigDict, found: Any) -> Sweep:
    """The sweep of what `get_sweep()` returned; of points that make the same config, the first is kept.

    Raises:
      ConfigError: nothing to try, or what is no point, key or value.
    """
    if isinstance(found, Search):
        what = dataclasses.replace(
            found, space={key: _clean_range(each) for key, each in found.space.items()}
        )
        sweep = Sweep(base, what)
        for points in _corners(what):
            _one_is_valid(sweep, points)
        return sweep
    grid = found if isinstance(found, Grid) else Grid(_points(found))
    sweep = Sweep(base, Grid([_clean_point(point) for point in _points(grid.points)], grid.pruner))
    assert isinstance(sweep.what, Grid)
    first: dict[str, Point] = {}
    for point in sweep.what.points:
        first.setdefault(sweep.identity(point), point)
    return Sweep(base, Grid(list(first.values()), grid.pruner))


def from_plain(stored: Any, where: str) -> Sweep:
    """What `plain` gave.

    Raises:
      ConfigError: it is no sweep of this version.
    """
    try:
        if stored["format"] != FORMAT:
            raise ValueError
        base = configs.default_config()
        given = flattened(stored["config"])
        if given.keys() != configs.flat(base).keys():
            raise ValueError
        base.update_from_flattened_dict({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        check_pruner(stored["pruner"])
        if "grid" in stored:
            if not stored["grid"]:
                raise ValueError
            return Sweep(base, Grid([_clean_point(point) for point in stored["grid"]], stored["pruner"]))
        names = ("trials", "sampler", "pruner", "seed", "startup")
        space = {key: _range(each) for key, each in stored["space"]}
        return Sweep(base, search(space, **{name: stored[name] for name in names}))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{where}: holds no sweep of this version; choose another --workdir") from None


def larger(old: dict[str, Any], new: Sweep) -> Sweep:
    """The new sweep, with as many trials as the old one, in its plain form, if those were more."""
    if isinstance(new.what, Search) and old["trials"] > new.what.trials:
        return Sweep(new.base, dataclasses.replace(new.what, trials=int(old["trials"])))
    return new


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of two sweeps, each as `Sweep.plain` gives it, differs, as `key: old -> new`.

    How many trials a search has is no difference: the larger number counts.
    """
    lines = []
    before, after = flattened(old["config"]), flattened(new["config"])
    for key in sorted(before.keys() | after.keys()):
        free = any(key == each or key.startswith(each + ".") for each in configs.FREE_ON_RESUME)
        if key != "dataset" and not free and before.get(key) != after.get(key):
            lines.append(f"config.{key}: {before.get(key)!r} -> {after.get(key)!r}")
    if ("grid" in old) != ("grid" in new):
        return [
            *lines,
            f"a {'grid' if 'grid' in old else 'search'} -> a {'grid' if 'grid' in new else 'search'}",
        ]
    if "grid" in old:
        lines += _point_differences(old["grid"], new["grid"])
    else:
        spaces = dict(old["space"]), dict(new["space"])
        for key in [*spaces[0], *(key for key in spaces[1] if key not in spaces[0])]:
            if spaces[0].get(key) != spaces[1].get(key):
                lines.append(f"{key}: {_told_range(spaces[0].get(key))} -> {_told_range(spaces[1].get(key))}")
        if not lines and [key for key, _ in old["space"]] != [key for key, _ in new["space"]]:
            lines.append("the order of the keys")
    for name in ("sampler", "pruner", "seed", "startup"):
        if old.get(name) != new.get(name):
            lines.append(f"{name}: {old.get(name)!r} -> {new.get(name)!r}")
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


def read(path: Path) -> dict[str, Any]:
    """The JSON of a sweep's folder; raises DataError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
        return found
    except (OSError, ValueError):
        raise DataError(f"{path}: missing or damaged; expected what `dynrec sweep` wrote") from None


def _points(found: Any) -> list[Point]:
    expected = 'expected points such as {"train.learning_rate": 1e-3}, or search(…)'
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ConfigError(f"get_sweep() returned {type(found).__name__}; {expected}")
    if not found:
        raise ConfigError(f"get_sweep() returned nothing to try; {expected}")
    for point in found:
        if not isinstance(point, dict) or not all(isinstance(key, str) for key in point):
            raise ConfigError(f"get_sweep(): {point!r} is no point; {expected}")
    return list(found)


def _clean(value: Any) -> Any:
    """Values as configs hold them: NumPy's as Python's own, lists as tuples."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(_clean(each) for each in value) if isinstance(value, list | tuple) else value


def _clean_point(point: Point) -> Point:
    return {key: _clean(value) for key, value in point.items()}


def plain_point(point: Point) -> dict[str, Any]:
    """A point as JSON gives it back."""
    return json.loads(json.dumps(point))


def _clean_range(each: Range) -> Range:
    if isinstance(each, When):
        return When(each.key, tuple(map(_clean, each.values)), _clean_range(each.then))  # type: ignore[arg-type] # none within
    return Choice(tuple(map(_clean, each.values))) if isinstance(each, Choice) else each


def _plain_range(each: Range) -> dict[str, Any]:
    fields = {f.name: getattr(each, f.name) for f in dataclasses.fields(each)}
    if isinstance(each, When):
        fields["then"] = _plain_range(each.then)
    return json.loads(json.dumps({"kind": NAMES[type(each)], **fields}))


def _range(stored: dict[str, Any]) -> Range:
    fields = {name: _clean(value) for name, value in stored.items() if name != "kind"}
    if "then" in fields:
        fields["then"] = _range(stored["then"])
    return KINDS[stored["kind"]](**fields)


def _told_range(stored: dict[str, Any] | None) -> str:
    if stored is None:
        return "nothing"
    inner = ", ".join(
        f"{name}={_told_range(value) if name == 'then' else value!r}"
        for name, value in stored.items()
        if name != "kind"
    )
    return f"{stored['kind']}({inner})"


def _one_is_valid(sweep: Sweep, points: Iterator[Point]) -> None:
    """Raises what is wrong with the first point where none of them makes a config."""
    fault: ConfigError | None = None
    for point in points:
        try:
            sweep.config_of(point)
            return
        except ConfigError as error:
            fault = fault or error
    if fault is not None:
        raise fault


def _corners(search: Search) -> Iterator[Iterator[Point]]:
    """For both ends of every range, and for every choice, points that have it: not all combinations need be valid."""
    for key, each in search.space.items():
        for end in _ends(each):
            yield _points_with(search, key, end)


def _points_with(search: Search, key: str, value: Any) -> Iterator[Point]:
    """Points with a value of a key: with the first values of the others, and then with some at random."""
    draws = random.Random(0)
    for number in range(CORNER_TRIES):
        point = {
            name: ends[0] if number == 0 else draws.choice(ends)
            for name, ends in ((name, _ends(each)) for name, each in search.space.items())
        }
        point[key] = value
        asked = search.space[key]
        while isinstance(asked, When):
            point[asked.key] = asked.values[0]
            asked = search.space[asked.key]
        yield _held(search, point)


def _held(search: Search, point: Point) -> Point:
    """The point with what its conditions ask for, in the order of the space."""
    made: Point = {}
    for key, each in search.space.items():
        if not isinstance(each, When) or made.get(each.key) in each.values:
            made[key] = point[key]
    return made


def _ends(each: Real | Integer | Choice | When) -> list[Any]:
    if isinstance(each, When):
        return _ends(each.then)
    return list(each.values) if isinstance(each, Choice) else [each.low, each.high]


def _point_differences(old: list[Point], new: list[Point]) -> list[str]:
    lines = []
    if len(old) != len(new):
        lines.append(f"{len(old)} trials -> {len(new)}")
    for number, (was, now) in enumerate(zip(old, new, strict=False)):
        for key in [*was, *(key for key in now if key not in was)]:
            if was.get(key) != now.get(key):
                lines.append(f"trial {number}: {key}: {was.get(key)!r} -> {now.get(key)!r}")
    return lines
