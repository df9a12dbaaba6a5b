"""What can be said of a scoring job before a run is opened: whether its flags go together, and its files are there."""

import math
from pathlib import Path

from dynrec_jax.errors import ConfigError
from dynrec_jax.score.files import check_there
from dynrec_jax.score.options import BOTH, ITEMS, LISTS, NEIGHBOURS, USERS, ScoreOptions
from dynrec_jax.score.parts import check_both, check_folder


def check(options: ScoreOptions, runs: int, out: Path) -> None:
    """Whether a job of so many runs makes sense, as far as nothing but its flags and files can tell.

    Raises:
      ConfigError: options contradict each other or would change nothing, or `out` is no folder for an output.
      DataError: a file is missing.
    """
    _check_runs(options, runs)
    _check_lists(options)
    if options.what != LISTS:
        _check_what(options)
    for path, column in (
        (options.users, "user_id"),
        (options.allow, "item_id"),
        (options.deny, "item_id"),
        (options.candidates, "user_id and a column item_id"),
    ):
        if path is not None:
            check_there(path, f"a column {column}")
    if options.what == BOTH:
        check_both(out, (USERS, ITEMS))
    else:
        check_folder(out)


def _check_runs(options: ScoreOptions, runs: int) -> None:
    if runs > 1 and options.what != LISTS:
        raise ConfigError(f"--what={options.what}: is of one run; leave the others out")
    if options.shares and runs == 1:
        raise ConfigError("--weights: is of several runs, and there is one; leave it out")
    if options.shares and len(options.shares) != runs:
        raise ConfigError(
            f"--weights: has {len(options.shares)} numbers, and there are {runs} runs; expected one each"
        )
    if any(not 0 < weight < math.inf for weight in options.shares):
        raise ConfigError("--weights: expected numbers above 0")


def _check_lists(options: ScoreOptions) -> None:
    """Options that say how lists are made."""
    for name, share in (("diversify", options.diversify), ("calibrate", options.calibrate)):
        if not 0 <= share <= 1:
            raise ConfigError(f"--{name}={share}: expected a number from 0 to 1")
    if options.min_score is not None and not math.isfinite(options.min_score):
        raise ConfigError(f"--min_score={options.min_score}: expected a score, which is finite")
    if options.diversify and options.calibrate:
        raise ConfigError(
            "--diversify and --calibrate: lists are made anew by one of them; leave the other out"
        )
    if (options.diversify or options.calibrate) and options.pool < options.k:
        raise ConfigError(f"--pool={options.pool}: lists have {options.k} items; give {options.k} or more")
    if options.compression is not None and options.compression.table != "float32":
        for name in ("candidates", "diversify", "calibrate"):
            if getattr(options, name):
                raise ConfigError(f"--{name} and --table: one of them alone; leave the other out")


def _check_what(options: ScoreOptions) -> None:
    """What is written is no lists for users: what is about these is not given."""
    of_lists = {
        "candidates": options.candidates,
        "min_score": options.min_score,
        "filter_seen": options.filter_seen or None,
        "diversify": options.diversify or None,
        "calibrate": options.calibrate or None,
        "table, --encoder or --prune": options.compression,
    }
    of_users = {
        "users": options.users,
        "split": None if options.split == "all" else options.split,
        "at": options.at,
        "until": options.until,
        "hops": options.hops,
    }
    of_items = {"allow": options.allow, "deny": options.deny, "where": options.where or None}
    for given, about in (
        (of_lists, "lists for users"),
        (of_users if options.what in (ITEMS, NEIGHBOURS) else {}, "users"),
        (of_items if options.what == USERS else {}, "items"),
    ):
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"--what={options.what}: goes without --{name}, which is about {about}")
