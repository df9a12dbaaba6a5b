"""Measures a run on the whole catalogue, beside its baselines; prints a table and writes JSON."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.table import Table

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.processes import ALONE, Processes, join
from dynrec_jax.parallel.watchdog import Watchdog
from dynrec_jax.verbs import compressed, drift, lists, prequential
from dynrec_jax.verbs.caches import CACHE_DIR, keep_programs
from dynrec_jax.verbs.telling import teller, write_json
from dynrec_jax.verbs.watching import define_watchdog

if TYPE_CHECKING:
    from dynrec_jax.evaluate.compressed import Compression

WITH = "other runs of the same dataset, with commas: their scores count too, an ensemble"
SHOWN = ("recall@10", "ndcg@10", "recall@50", "ndcg@50", "mrr", "coverage@10")


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_enum("split", "test", ["validation", "test"], "which targets", flag_values=values)
    flags.DEFINE_boolean(
        "drift",
        False,
        "also in parts of the queries: by time, change of interest, history, age and popularity; with a plot",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "prequential",
        0,
        "walk through the time after training in so many periods, each scored before it is learnt from; trains anew "
        "for each but the first",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_string(
        "lists",
        None,
        "instead of making lists, measure those in this folder, as `score` wrote it: accuracy where they are of a "
        "split, coverage, novelty, diversity, popularity",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "attributes",
        None,
        "with --lists: an item column to measure diversity by, as item.attributes takes it; several times for several "
        "columns [those of sets, and those of item.attributes]",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out",
        None,
        "with --lists: JSON file to write [lists_<split>.json in the run's evaluation folder]",
        flag_values=values,
    )
    flags.DEFINE_string("with", None, WITH, flag_values=values)
    compressed.define(values)
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_string("dataset", None, "where the dataset folder lies now, if it moved", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    define_watchdog(values)
    return values


def run(values: flags.FlagValues) -> None:
    """Prints the table and where the JSON went."""
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected a run folder made by `dynrec train`")
    step, others = parse_step(values.step), paths_of(values["with"].value)
    processes = join()
    if values.lists is not None:
        _of_lists(values, processes)
        return
    for name in ("attributes", "out"):
        if values[name].value is not None:
            raise ConfigError(f"--{name}: is for --lists alone; leave it out")
    compression = compressed.parse(values, processes)
    if values.drift or values.prequential:
        name = "drift" if values.drift else "prequential"
        if processes.count > 1:
            raise ConfigError(f"--{name}: is measured by one process, and this is one of several; start one")
        if others:
            raise ConfigError(f"--{name}: is of one run; leave --with out")
        if compression is not None:
            raise ConfigError(f"--{name}: is of a run as it is; leave --table, --encoder and --prune out")
    if values.prequential:
        if values.drift or values.split != "test":
            raise ConfigError(
                "--prequential: walks through the test's time alone; leave --drift and --split out"
            )
        _walk(Path(values.workdir), values.prequential, step, values.dataset, values.cache_dir)
        return
    with Watchdog(processes, values.watchdog):
        result = measure(
            Path(values.workdir),
            values.split,
            step,
            values.dataset,
            values.cache_dir,
            processes,
            values.drift,
            others,
            compression,
        )
    if not processes.first:
        return
    parts = result.pop("drift", None)
    show(result)  # first: numbers that took long must not be lost with a folder that cannot be written
    if parts is not None:
        drift.show(parts)
    print(f"written to {write(Path(values.workdir), result)}")
    if parts is not None:
        print("written to " + " and ".join(map(str, drift.write(Path(values.workdir), parts))))


def _walk(workdir: Path, periods: int, step: str | int, dataset: str | None, cache_dir: str | None) -> None:
    """The prequential mode: measures, shows and writes."""
    from dynrec_jax import workdir as workdirs

    keep_programs(workdirs.open_config(workdir), cache_dir, ALONE)
    result = prequential.measure(workdir, workdirs.open(workdir, step, dataset), periods, cache_dir)
    prequential.show(result)
    print("written to " + " and ".join(map(str, prequential.write(workdir, result))))


def _of_lists(values: flags.FlagValues, processes: Processes) -> None:
    """The mode that measures files: shows and writes."""
    if processes.count > 1:
        raise ConfigError("--lists: are measured by one process, and this is one of several; start one")
    for name in ("split", "drift", "prequential", "with", "step", "table", "encoder", "prune"):
        if values[name].present:
            raise ConfigError(
                f"--{name}: the lists say what they are of and how they were made; leave it out"
            )
    workdir, out = Path(values.workdir), Path(values.out) if values.out else None
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out={out}: no file can be written there; give a file in a folder that is there")
    result = lists.measure(
        workdir, Path(values.lists), values.dataset, values.cache_dir, tuple(values.attributes or ())
    )
    lists.show(result)
    path = out or workdir / "evaluation" / f"lists_{result['split']}.json"
    print(f"written to {write_json(path, result)}")


def parse_step(text: str) -> str | int:
    """Which checkpoint: "best", "last" or a number; ConfigError for anything else."""
    if text in ("best", "last"):
        return text
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--step={text}: expected best, last or a step's number")
    return int(text)


def paths_of(text: str | None) -> list[Path]:
    """The run folders of `--with`; raises ConfigError for an empty name."""
    names = [name.strip() for name in text.split(",")] if text is not None else []
    if not all(names):
        raise ConfigError(f"--with={text}: expected run folders with a comma between two")
    return [Path(name) for name in names]


def measure(
    workdir: Path,
    which: str,
    step: str | int = "best",
    dataset: str | None = None,
    cache_dir: str | None = None,
    processes: Processes = ALONE,
    parts: bool = False,
    others: Sequence[Path] = (),
    compression: "Compression | None" = None,
) -> dict[str, Any]:
    """Metrics, baselines and protocol, as `write` writes them; several processes share the users.

    With `parts`, "drift" is what `verbs.drift` measures. With `others`, lists are those of all these runs together, and
    "together" says which they are. With a `compression`, "compressed" says of what, and there are no `parts`.
    """
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.pipeline import make_splits
    from dynrec_jax.evaluate.evaluator import Evaluator
    from dynrec_jax.evaluate.oracle import oracle_lists, synthetic_spec
    from dynrec_jax.parallel.mesh import feed
    from dynrec_jax.score.several import described, lists_of, open_together

    processes.start_jax()
    keep_programs(processes.agree(lambda: workdirs.open_config(workdir)), cache_dir, processes)
    runs = open_together([workdir, *others], step, dataset, processes, say=teller(processes))
    opened = runs[0]
    own = feed(opened.mesh, processes.index)
    shards = range(own.part, opened.dataset.shards, own.parts)
    histories = processes.agree(
        lambda: Histories(opened.dataset, cache_dir or opened.config.data.cache_dir, shards)
    )
    splits = make_splits(histories, opened.config)
    evaluator = Evaluator(
        histories, splits, which, opened.model, opened.config, opened.mesh, processes, opened.items
    )
    length, filter_seen = evaluator.recommender.k, opened.config.evaluation.filter_seen
    lists = lists_of(runs, length, filter_seen, processes, compression=compression, cache_dir=cache_dir or "")
    result: dict[str, Any] = {
        "split": which,
        "users": evaluator.users,
        "catalogue": opened.dataset.items,
        "step": opened.step,
        "protocol": evaluator.protocol(),
        **evaluator.metrics_of(lists),
        "baselines": evaluator.baselines(),
    }
    if cold := evaluator.cold(lists):
        result["cold"] = cold
    spec = synthetic_spec(opened.dataset)
    if spec is not None:
        result["oracle"] = evaluator.metrics_of(oracle_lists(spec, opened.dataset, evaluator.recommender.k))
    result["dataset"] = opened.dataset.content
    if others:
        result["together"] = described(runs)
        result["protocol"]["query_time"] = any(run.config.model.query_time for run in runs)
    if compression is not None:
        result["compressed"] = dataclasses.asdict(compression)
    if parts:
        result["drift"] = drift.measure(opened, evaluator, lists)
    return result


def write(workdir: Path, result: dict[str, Any]) -> Path:
    """Writes `evaluation/<split>.json`, or `<split>_together.json` of several runs; returns which.

    What was compressed has a name of its own, as `<split>_table_int8.json`: the run's own result stays.

    Raises:
      MachineError: it cannot be written.
    """
    from dynrec_jax.evaluate.compressed import Compression

    name = f"{result['split']}_together" if "together" in result else result["split"]
    if "compressed" in result:
        name = f"{name}_{Compression(**result['compressed']).name}"
    return write_json(workdir / "evaluation" / f"{name}.json", result)


def show(result: dict[str, Any]) -> None:
    """The table: a row a metric, the model beside what it must beat."""
    columns: dict[str, dict[str, float]] = {"model": result, **result["baselines"]}
    if "oracle" in result:
        columns["oracle"] = result["oracle"]
    protocol = result["protocol"]
    seen = "seen items masked" if protocol["filter_seen"] else "seen items ranked"
    caption = (
        f"{protocol['split']}, whole catalogue, {seen}, ties: {protocol['ties']}; leak: {protocol['leak']}"
    )
    asked = "queries" if protocol.get("targets") == "all" else "users"
    title = f"{result['split']}: {result['users']:,} {asked}, {result['catalogue']:,} items"
    if "together" in result:
        title += f"; {len(result['together'])} models together"
    if "compressed" in result:
        title += "; compressed: " + ", ".join(
            f"{name} {value}" for name, value in result["compressed"].items()
        )
    table = Table(title=title, caption=caption)
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in SHOWN:
        if metric in result:
            table.add_row(metric, *(f"{column[metric]:.4f}" for column in columns.values()))
    Console().print(table)
    if "cold" in result:
        print(_cold_line(result["cold"], result["catalogue"]))


def _cold_line(cold: dict[str, float], items: int) -> str:
    """How items are found that training never saw, beside drawing lists at random."""
    told = [f"cold items: {int(cold['users']):,} users are asked for an item that no training history has"]
    for k in (10, 50):
        if (value := cold.get(f"recall@{k}")) is not None:
            told.append(f"recall@{k} {value:.4f}, {value * items / k:.1f} times that of random lists")
    return "; ".join(told)
