"""One table over several runs and all baselines: the same queries, whole catalogue, intervals by a paired bootstrap.

Runs of one kind with several seeds are joined by a plus sign: --workdirs=runs/a0+runs/a1,runs/b0+runs/b1 compares two
kinds of two seeds each. The first is what the others, baselines included, are compared with.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.parallel.processes import ALONE
from dynrec_jax.verbs.caches import CACHE_DIR, keep_programs
from dynrec_jax.verbs.evaluate import parse_step

if TYPE_CHECKING:
    from dynrec_jax.evaluate.comparison import Compared
    from dynrec_jax.workdir import Run

SHOWN = ("ndcg@10", "recall@10", "recall@50", "mrr")
WIDE = 150  # columns of the table in a file


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdirs", None, "run folders, as a,b or with seeds a0+a1,b0+b1", flag_values=values)
    flags.DEFINE_string("out", None, "JSON file to write", flag_values=values)
    flags.DEFINE_string(
        "baselines", "all", "which baselines: all, none, or names with commas between", flag_values=values
    )
    flags.DEFINE_enum("split", "test", ["validation", "test"], "which targets", flag_values=values)
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_string("dataset", None, "where the dataset folder lies now, if it moved", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Compares; prints the table and where the JSON went."""
    if not values.workdirs:
        raise ConfigError(
            "--workdirs is missing; expected run folders made by `dynrec train`, such as runs/a,runs/b"
        )
    groups = parse_groups(values.workdirs)
    chosen = parse_baselines(values.baselines)
    out = Path(values.out) if values.out else None
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out={out}: no file can be written there; give a file in a folder that is there")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    compared, protocol = measure(
        groups,
        chosen,
        values.split,
        parse_step(values.step),
        values.dataset,
        values.cache_dir,
        lambda line: console.print(line, highlight=False, markup=False),
    )
    show(compared, protocol, console)
    if out is not None:
        write(out, compared, protocol)
        print(f"written to {out}")


def parse_groups(text: str) -> list[list[Path]]:
    """Run folders by kind; raises ConfigError for an empty name."""
    groups = [[Path(name.strip()) for name in group.split("+")] for group in text.split(",")]
    if any(not str(path) or str(path) == "." for group in groups for path in group):
        raise ConfigError(f"--workdirs={text}: expected names with a comma or a plus sign between two")
    return groups


def parse_baselines(text: str) -> list[str]:
    """Names of baselines; raises ConfigError for an unknown one."""
    from dynrec_jax.evaluate.baselines.known import BASELINES

    if text in ("all", "none"):
        return list(BASELINES) if text == "all" else []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"--baselines: {name!r} is not one of all, none, {', '.join(BASELINES)}")
    return names


def measure(
    groups: list[list[Path]],
    baselines: list[str],
    which: str = "test",
    step: str | int = "best",
    dataset: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list["Compared"], dict[str, Any]]:
    """What `show` and `write` take: the rows, and the protocol that they have in common."""
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.pipeline import make_splits
    from dynrec_jax.evaluate.baselines.learned import Learning
    from dynrec_jax.evaluate.comparison import Entry, baseline_entries, compare
    from dynrec_jax.evaluate.evaluator import Evaluator, asked
    from dynrec_jax.score.several import check_same

    first_path = groups[0][0]
    configs = {path: workdirs.open_config(path) for group in groups for path in group}
    check_same(configs, "numbers of different protocols cannot be compared")
    keep_programs(configs[first_path], cache_dir, ALONE)
    first = workdirs.open(first_path, step, dataset)
    histories = Histories(first.dataset, cache_dir or first.config.data.cache_dir)
    splits = make_splits(histories, first.config)

    def evaluator(run: "Run", part: str) -> Evaluator:
        return Evaluator(histories, splits, part, run.model, run.config, run.mesh, items=run.items)

    entries, query_time = [], {}
    for group, name in zip(groups, _names(groups), strict=True):
        ranks = []
        for path in group:
            opened = first if path == first_path else workdirs.open(path, step, dataset)
            if opened.dataset.content != first.dataset.content:
                raise ConfigError(
                    f"{path}: was trained on another dataset than {first_path}; compare runs of one dataset"
                )
            measured = evaluator(opened, which)
            ranks.append(measured.ranks_of(measured.recommender.prepare(opened.params, opened.tables)))
            query_time[name] = bool(opened.config.model.query_time)
            say(f"{path} is measured: step {opened.step}")
        about = {"runs": len(group), "query_time": query_time[name]}
        entries.append(Entry(name, np.stack(ranks), about))
    test = evaluator(first, which)
    validation = evaluator(first, "validation") if len(asked(splits, "validation").users) else None
    learning = Learning(histories, splits, first.config, say)
    entries += baseline_entries(baselines, learning, test, validation, say)
    protocol = {**test.protocol(), "queries": test.users, "catalogue": first.dataset.items, "asked": which}
    del protocol["query_time"]
    return compare(entries, test.users_U, test.ks), protocol


def _names(groups: list[list[Path]]) -> list[str]:
    """Names of the folders, or whole paths where two have the same."""
    names = [group[0].name for group in groups]
    return [
        name if names.count(name) == 1 else str(group[0]) for name, group in zip(names, groups, strict=True)
    ]


def write(out: Path, compared: list["Compared"], protocol: dict[str, Any]) -> None:
    """Writes the rows, each with the protocol; raises MachineError where it cannot."""
    from dynrec_jax.files import write_whole

    rows = [{**row.as_dict(), "protocol": protocol} for row in compared]
    try:
        write_whole(out, json.dumps(rows, indent=2) + "\n")
    except OSError as error:
        raise MachineError(f"{out}: cannot be written ({error})") from None


def show(compared: list["Compared"], protocol: dict[str, Any], console: Console) -> None:
    """The table: a row a run or baseline, with the interval of the main metric and whether it beats the first."""
    from dynrec_jax.evaluate.comparison import main_metric

    main, first = main_metric(compared[0].metrics), compared[0].entry.name
    seen = "seen items masked" if protocol["filter_seen"] else "seen items ranked"
    table = Table(
        title=f"{protocol['asked']}: {protocol['queries']:,} queries, {protocol['catalogue']:,} items",
        caption=f"{protocol['split']}, whole catalogue, {seen}, ties: {protocol['ties']}; leak: {protocol['leak']}; "
        f"intervals: 95 %, users drawn with replacement, paired; differences in {main} to {escape(first)}",
    )
    others = [name for name in SHOWN if name != main and name in compared[0].metrics]
    table.add_column("", overflow="fold")
    for column in (main, "95 %", *others, "difference", "95 %", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in compared:
        apart, value = row.differences[main], row.metrics[main]
        told = [f"{value.mean:.4f}", f"{value.low:.4f} to {value.high:.4f}"]
        told += [f"{row.metrics[name].mean:.4f}" for name in others]
        if row is not compared[0]:
            told += [f"{apart.mean:+.4f}", f"{apart.low:+.4f} to {apart.high:+.4f}"]
            told.append(_verdict(apart.low, apart.high))
        runs = row.entry.about.get("runs", 1)
        name = f"{row.entry.name}, mean of {runs}" if runs > 1 else row.entry.name
        table.add_row(escape(name) + (", told the time" if row.entry.about.get("query_time") else ""), *told)
    console.print(table)
    for row in compared:
        if "accuracy" in row.entry.about:
            value = row.entry.about["accuracy"]
            line = f"{row.entry.name}: accuracy {value:.4f} at telling targets from items drawn at random"
            console.print(line, highlight=False)


def _verdict(low: float, high: float) -> str:
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not told apart"
