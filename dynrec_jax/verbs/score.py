"""Recommends for all users of a run's dataset, or those of a file; writes Parquet parts.

Columns: user_id (string), item_ids (list of string, best first), scores (list of float).
"""

import datetime
from pathlib import Path

from absl import flags

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.processes import join
from dynrec_jax.verbs import compressed
from dynrec_jax.verbs.caches import CACHE_DIR, keep_programs
from dynrec_jax.verbs.evaluate import WITH, parse_step, paths_of
from dynrec_jax.verbs.telling import teller


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string(
        "out", None, "folder of the Parquet parts; an interrupted job goes on", flag_values=values
    )
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
    flags.DEFINE_boolean("filter_seen", False, "leave out items of the history", flag_values=values)
    flags.DEFINE_enum(
        "split", "all", ["all", "test", "validation"], "which history to recommend from", flag_values=values
    )
    flags.DEFINE_string(
        "at",
        None,
        "when the lists are asked for, as 2026-01-31, 2026-01-31T20:15 (UTC) or seconds since 1970, for a model with "
        "model.query_time [the time of the last event]",
        flag_values=values,
    )
    flags.DEFINE_string("with", None, WITH, flag_values=values)
    compressed.define(values)
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_string("dataset", None, "where the dataset folder lies now, if it moved", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Scores; prints what was written."""
    for name, what in (("workdir", "a run folder made by `dynrec train`"), ("out", "a folder to write")):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing; expected {what}")
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.evaluate.evaluator import LIST_LENGTH
    from dynrec_jax.score.job import ScoreOptions, score
    from dynrec_jax.score.several import open_together

    step, others = parse_step(values.step), paths_of(values["with"].value)
    processes = join()
    compression = compressed.parse(values, processes)
    processes.start_jax()
    keep_programs(
        processes.agree(lambda: workdirs.open_config(Path(values.workdir))), values.cache_dir, processes
    )
    runs = open_together(
        [Path(values.workdir), *others],
        step,
        values.dataset,
        processes,
        values["items"].value,
        teller(processes),
    )
    options = ScoreOptions(
        k=min(LIST_LENGTH, runs[0].items.number) if values.k is None else values.k,
        filter_seen=values.filter_seen,
        split=values.split,
        users=Path(values.users) if values.users else None,
        cache_dir=values.cache_dir or "",
        at=None if values.at is None else parse_moment(values.at),
        compression=compression,
    )
    done = score(runs[0], Path(values.out), options, processes, runs[1:])
    if not processes.first:
        return
    told = f" ({done['skipped']} were there already)" if done["skipped"] else ""
    print(f"{done['users']:,} users, {done['parts']} parts in {values.out}{told}")


def parse_moment(text: str) -> int:
    """Seconds since 1970 of a date, a time of day (UTC unless it says another zone), or such seconds themselves.

    Raises:
      ConfigError: it is none of them.
    """
    if text.isascii() and text.isdigit() and len(text) > 4:
        return int(text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--at={text}: expected a date such as 2026-01-31, a time such as 2026-01-31T20:15, or seconds since 1970"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp())
