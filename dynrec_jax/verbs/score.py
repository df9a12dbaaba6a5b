"""Recommends for all users of a run's dataset, or those of a file; writes parts, Parquet by default.

Columns: user_id (string), item_ids (list of string, best first), scores (list of float). With --what, vectors of users
and of items, or each item's neighbours.
"""

import dataclasses
import datetime
from pathlib import Path

from absl import flags

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.processes import Processes, join
from dynrec_jax.parallel.watchdog import Watchdog
from dynrec_jax.score.formats import FORMATS
from dynrec_jax.score.options import LISTS, NEIGHBOURS, POOL, SPLITS, WHAT, ScoreOptions
from dynrec_jax.verbs import compressed
from dynrec_jax.verbs.caches import CACHE_DIR, keep_programs
from dynrec_jax.verbs.evaluate import WITH, parse_step, paths_of
from dynrec_jax.verbs.telling import teller
from dynrec_jax.verbs.watching import define_watchdog

SECONDS = 11  # digits of seconds since 1970, up to the year 5138


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string(
        "workdir",
        None,
        "run folder; given several times, or with --with, the runs recommend together",
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "folder of the parts; an interrupted job goes on", flag_values=values)
    flags.DEFINE_enum(
        "what",
        LISTS,
        WHAT,
        "lists for users; vectors of users, of items, or both; or neighbours, a list for each item",
        flag_values=values,
    )
    flags.DEFINE_enum("format", "parquet", sorted(FORMATS), "of the parts", flag_values=values)
    flags.DEFINE_integer(
        "k", None, "length of the lists [100, or the whole catalogue]", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("users", None, "CSV or Parquet of user ids, or of new histories", flag_values=values)
    flags.DEFINE_string(
        "items",
        None,
        "items that came after training, as `prepare --items` takes them: ranked by their text and features",
        flag_values=values,
    )
    flags.DEFINE_string(
        "allow", None, "CSV, Parquet or .txt of the only items that may be in a list", flag_values=values
    )
    flags.DEFINE_string("deny", None, "the same, of items that may not", flag_values=values)
    flags.DEFINE_string(
        "where",
        "",
        "a rule on the items' columns, in SQL, that those in a list keep: \"in_stock and category <> 'adult'\"",
        flag_values=values,
    )
    flags.DEFINE_string(
        "candidates",
        None,
        "CSV or Parquet with user_id and item_id (or lists item_ids): what each user is offered, and nothing else",
        flag_values=values,
    )
    flags.DEFINE_float("min_score", None, "leave out items with a lower score", flag_values=values)
    flags.DEFINE_integer(
        "hops",
        None,
        "how often the mixture refines the query [as the run was trained]",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_boolean("filter_seen", False, "leave out items of the history", flag_values=values)
    flags.DEFINE_enum("split", SPLITS[0], SPLITS, "which history to recommend from", flag_values=values)
    flags.DEFINE_string(
        "at",
        None,
        "when the lists are asked for, as 2026-01-31, 2026-01-31T20:15 (UTC) or seconds since 1970, for a model with "
        "model.query_time [--until, or the time of the last event]",
        flag_values=values,
    )
    flags.DEFINE_string(
        "until", None, "read histories up to this moment, as --at says it [all of them]", flag_values=values
    )
    flags.DEFINE_float(
        "diversify",
        0.0,
        "make lists more varied: how much it counts that an item is unlike those before it, 0 to 1",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "calibrate",
        0.0,
        "make lists as popular as the history: how much it counts that they have as much of popular, middling and rare "
        "items, 0 to 1",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "pool",
        None,
        "with --diversify or --calibrate: from how many candidates of a user [500, or k]",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string("with", None, WITH, flag_values=values)
    flags.DEFINE_list(
        "weights",
        [],
        "of several runs' scores, as 0.7,0.3: scores are their sum [their mean]",
        flag_values=values,
    )
    compressed.define(values)
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_string("dataset", None, "where the dataset folder lies now, if it moved", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    define_watchdog(values)
    return values


def run(values: flags.FlagValues) -> None:
    """Scores; prints what was written."""
    for name, what in (("workdir", "a run folder made by `dynrec train`"), ("out", "a folder to write")):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing; expected {what}")
    if values.pool is not None and not (values.diversify or values.calibrate):
        raise ConfigError("--pool: is for --diversify or --calibrate; give one of them, or leave it out")

    paths = [*(Path(path) for path in values.workdir), *paths_of(values["with"].value)]
    step, options = parse_step(values.step), options_of(values)
    processes = join()
    options = dataclasses.replace(options, compression=compressed.parse(values, processes))
    processes.agree(lambda: _check(values, options, len(paths)))
    with Watchdog(processes, values.watchdog):
        _score(values, paths, step, options, processes)


def _score(
    values: flags.FlagValues, paths: list[Path], step: str | int, options: ScoreOptions, processes: Processes
) -> None:
    """Scores, and tells what was written."""
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.score.job import score
    from dynrec_jax.score.several import open_together

    processes.start_jax()
    keep_programs(processes.agree(lambda: workdirs.open_config(paths[0])), values.cache_dir, processes)
    runs = open_together(
        paths,
        step,
        values.dataset,
        processes,
        values["items"].value,
        teller(processes),
    )
    if values.k is None:
        most = runs[0].items.number - (options.what == NEIGHBOURS)
        options = dataclasses.replace(options, k=min(options.k, most))
    done = score(runs[0], Path(values.out), options, processes, runs[1:])
    if not processes.first:
        return
    rows = " and ".join(f"{done[unit]:,} {unit}" for unit in ("users", "items") if done[unit])
    told = f" ({done['skipped']} were there already)" if done["skipped"] else ""
    print(f"{rows}, {done['parts']} parts in {values.out}{told}")


def _check(values: flags.FlagValues, options: ScoreOptions, runs: int) -> None:
    """Mistakes that need no run to be seen."""
    from dynrec_jax.score.checks import check

    # How long lists are by default, the catalogue says.
    check(options if values.k is not None else dataclasses.replace(options, k=1), runs, Path(values.out))
    if values.k is not None and options.what not in (LISTS, NEIGHBOURS):
        raise ConfigError(f"--what={options.what}: goes without --k, which is how long lists are")


def options_of(values: flags.FlagValues) -> ScoreOptions:
    """What the flags ask for.

    Raises:
      ConfigError: a moment or a weight cannot be read.
    """
    try:
        shares = tuple(float(weight) for weight in values.weights)
    except ValueError:
        raise ConfigError(
            f"--weights={','.join(values.weights)}: expected numbers with commas between, as 0.7,0.3"
        ) from None

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    given = {} if values.k is None else {"k": values.k}
    pool = max(POOL, given.get("k", 0)) if values.pool is None else values.pool
    return ScoreOptions(
        **given,
        filter_seen=values.filter_seen,
        split=values.split,
        users=path(values.users),
        cache_dir=values.cache_dir or "",
        at=None if values.at is None else parse_moment(values.at, "at"),
        until=None if values.until is None else parse_moment(values.until, "until"),
        what=values.what,
        file_format=str(values["format"].value),
        allow=path(values.allow),
        deny=path(values.deny),
        where=values.where,
        candidates=path(values.candidates),
        min_score=values.min_score,
        hops=values.hops,
        diversify=values.diversify,
        calibrate=values.calibrate,
        pool=pool,
        shares=shares,
    )


def parse_moment(text: str, flag: str = "at") -> int:
    """Seconds since 1970 of a date, a time of day (UTC unless it says another zone), or such seconds themselves.

    Raises:
      ConfigError: it is none of them.
    """
    if text.isascii() and text.isdigit() and len(text) > 4:
        if len(text) > SECONDS:
            raise ConfigError(
                f"--{flag}={text}: has more digits than seconds since 1970 have; is it in milliseconds?"
            )
        return int(text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--{flag}={text}: expected a date such as 2026-01-31, a time such as 2026-01-31T20:15, or seconds since "
            "1970"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp())
