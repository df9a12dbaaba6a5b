"""Tries what an experiment file's get_sweep() lists or searches, with any number of workers, here and elsewhere.

The same command joins a sweep that goes on, and goes on with one that ended early. Workers of one machine share a
SQLite file in the sweep's folder; those of several a database: --storage=postgresql://USER:PASSWORD@HOST/NAME, or with
the address in the environment variable DYNREC_STORAGE. A plain grid can be divided without one: --shard=i/n.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from dynrec_jax.errors import ConfigError, MachineError, report_errors
from dynrec_jax.files import is_temporary, write_whole
from dynrec_jax.verbs.caches import CACHE_DIR
from dynrec_jax.verbs.experiment import define_config, load_sweep, read_config

if TYPE_CHECKING:
    from dynrec_jax.sweep.definition import Sweep
    from dynrec_jax.sweep.ledger import Ledger, Row

STORAGE = "DYNREC_STORAGE"
DEFINITION, DATABASE = "sweep.json", "sweep.db"
OWN = {DATABASE, f"{DATABASE}.lock", "trials", "logs", "results", "claims"}
GRACE_SECONDS, BEATS = 60.0, 6  # a lease outlives so many signs of life that did not come


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    define_config(values)
    flags.DEFINE_string("workdir", None, "the sweep's folder, made or gone on with", flag_values=values)
    flags.DEFINE_integer(
        "workers",
        1,
        "trials at a time on this machine; cores and cards are divided",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "shard", None, "i/n: every n-th trial of a grid, from i, and no database", flag_values=values
    )
    flags.DEFINE_string(
        "storage", None, f"database that workers of several machines share [${STORAGE}, or SQLite in --workdir]",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "grace",
        GRACE_SECONDS,
        "seconds without a sign of life after which another worker goes on with a trial",
        lower_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Does the sweep, or this machine's part of it; prints the table and where the results are."""
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected the sweep's folder, to make or to go on with")
    if values.shard and values.storage:
        raise ConfigError("--shard: divides a grid without a database; leave out --storage or --shard")
    from dynrec_jax.sweep import supervisor, table

    workdir = Path(values.workdir)
    sweep = _defined(values)
    storage = "" if values.shard else values.storage or os.environ.get(STORAGE) or _own_storage(workdir)
    sweep = _of_folder(workdir, sweep)
    ledger = _ledger(sweep, workdir, storage, values.shard, values.grace)
    sweep = ledger.sweep
    _begin(workdir, sweep)

    def command(index: int) -> list[str]:
        # What is secret in the storage's address goes by the environment, which others cannot read.
        arguments = {
            "workdir": str(workdir),
            "index": index,
            "workers": values.workers,
            "shard": values.shard,
            "grace": values.grace,
            "cache_dir": values.cache_dir,
            "parent": os.getpid(),
        }
        return supervisor.python("dynrec_jax.verbs.sweep", json.dumps(arguments))

    members = supervisor.members(values.workers, command, workdir, {STORAGE: storage})
    watch = supervisor.Supervisor(sweep, ledger, workdir, members, lambda rows: write(sweep, rows, workdir))
    try:
        rows = watch.run()
    except (KeyboardInterrupt, MachineError):
        rows = ledger.rows()
        write(sweep, rows, workdir)
        print(f"{table.summary(sweep, rows)}; the same command goes on", file=sys.stderr)
        raise
    _finish(sweep, rows, workdir)


def _defined(values: flags.FlagValues) -> "Sweep":
    """The sweep that the flags name, after all that can be checked without a device."""
    from dynrec_jax.sweep import definition
    from dynrec_jax.sweep.space import Grid
    from dynrec_jax.verbs.train import checked_dataset

    base = read_config(values)
    with base.unlocked():
        base.logging.group = base.logging.group or Path(values.workdir).absolute().name
    sweep = definition.make(base, load_sweep(values))
    points = sweep.what.points if isinstance(sweep.what, Grid) else [{}]
    seen: set[str] = set()
    for point in points:
        config = sweep.config_of(point)
        # Only what the dataset bears on; most grids change none of it.
        key = json.dumps(
            [config.item.to_dict(), config.train.batch_size, config.logging.to_dict()], default=str
        )
        if key not in seen:
            seen.add(key)
            checked_dataset(config, Path(values.workdir))
    return sweep


def _own_storage(workdir: Path) -> str:
    from dynrec_jax.sweep.storage import check_local

    check_local(workdir / DATABASE)
    return f"sqlite:///{(workdir / DATABASE).absolute()}"


def _of_folder(workdir: Path, sweep: "Sweep") -> "Sweep":
    """The sweep, with as many trials as the folder's, if those were more.

    Raises:
      ConfigError: the folder is of another sweep or of something else.
    """
    from dynrec_jax.sweep import definition

    path = workdir / DEFINITION
    if path.exists():
        stored = definition.read(path)
        definition.from_plain(stored, str(path))
        if changed := definition.difference(stored, sweep.plain()):
            raise ConfigError(
                f"{workdir}: is another sweep ({'; '.join(changed)}); choose another --workdir, or the old values"
            )
        return definition.larger(stored, sweep)
    if workdir.exists() and (not workdir.is_dir() or not all(map(_is_own, workdir.iterdir()))):
        raise ConfigError(f"{workdir}: exists and is no sweep's folder; choose another --workdir")
    return sweep


def _is_own(path: Path) -> bool:
    """Whether a start that was cut short may have left it."""
    return path.name in OWN or path.name.startswith(f"{DATABASE}-") or is_temporary(path)


def _begin(workdir: Path, sweep: "Sweep") -> None:
    """Writes what is tried, for the workers and for whoever comes later; raises ConfigError where it cannot."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{workdir}: no folder can be made there ({error.strerror}); choose another --workdir"
        ) from None
    text = json.dumps(sweep.plain(), indent=2) + "\n"
    path = workdir / DEFINITION
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _ledger(sweep: "Sweep", workdir: Path, storage: str, shard: str | None, grace: float) -> "Ledger":
    from dynrec_jax.sweep import shards
    from dynrec_jax.sweep.storage import Storage
    from dynrec_jax.sweep.study import StudyLedger

    if shard:
        return shards.ShardLedger(sweep, workdir, *shards.parse(shard))
    name = workdir.absolute().name
    return StudyLedger(
        sweep, Storage(storage, grace), name, workdir, grace, lambda line: print(line, file=sys.stderr)
    )


def write(sweep: "Sweep", rows: "list[Row]", workdir: Path) -> None:
    """The tables and the best config so far."""
    from dynrec_jax.sweep import table
    from dynrec_jax.sweep.best import experiment_file

    table.write(sweep, rows, workdir)
    text = experiment_file(sweep, rows)
    if text is not None:
        write_whole(workdir / "best.py", text)


def _finish(sweep: "Sweep", rows: "list[Row]", workdir: Path) -> None:
    from rich.console import Console

    from dynrec_jax.sweep import charts, table
    from dynrec_jax.sweep.ledger import FAILED

    write(sweep, rows, workdir)
    best = table.best(rows)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table.rich_table(sweep, rows))
    shares = charts.importance(sweep, rows)
    made = charts.draw(sweep, rows, shares, workdir)
    if shares:
        told = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        print(f"importance for {sweep.metric}: {told}")
    for row in rows:
        if row.state == FAILED:
            print(f"trial {row.number} failed: {row.reason}")
    if len(rows) < sweep.total:
        print(f"the space has no more than {len(rows)} different configs; {sweep.total} were asked for")
    names = ["sweep.csv", "sweep.parquet", *(["best.py"] if best else []), *(path.name for path in made)]
    print(f"written to {workdir}: {', '.join(names)}")
    if best is None:
        raise MachineError(f"{workdir}: no trial is complete; {workdir}/logs says why")
    print(f"next: dynrec train --config={workdir}/best.py --workdir=runs/best")


def work(arguments: dict[str, Any]) -> int:
    """One worker, in a process of its own; returns the exit status."""
    from dynrec_jax.sweep import machines

    machines.end_with_parent()
    if os.getppid() != arguments["parent"]:
        return 1
    cores = machines.own_cores()
    machines.keep_to(machines.cores_of(arguments["index"], arguments["workers"], cores), len(cores))

    def worked() -> int:
        from dynrec_jax.sweep import definition
        from dynrec_jax.sweep.worker import Worker, end_on_signals
        from dynrec_jax.verbs.train import train

        warnings.simplefilter("ignore", FutureWarning)  # Optuna's, of what is experimental
        workdir, cache = Path(arguments["workdir"]), arguments["cache_dir"]
        stored = workdir / DEFINITION
        sweep = definition.from_plain(definition.read(stored), str(stored))
        ledger = _ledger(sweep, workdir, os.environ[STORAGE], arguments["shard"], arguments["grace"])
        worker = Worker(
            sweep,
            ledger,
            workdir,
            lambda config, folder, watch: train(config, folder, cache, watch=watch),
            arguments["grace"] / BEATS,
            lambda line: print(line, flush=True),
            arguments["parent"],
        )
        end_on_signals(worker)
        worker.run()
        return 0

    return report_errors(worked)


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[1])))
