"""What `dynrec evaluate --lists` does: measures lists that `dynrec score` wrote; prints tables."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.processes import ALONE
from dynrec_jax.verbs.caches import keep_programs

if TYPE_CHECKING:
    from dynrec_jax.evaluate.beyond import Sets
    from dynrec_jax.workdir import Run

FIRST = 10  # the cut-off beside the whole list
TOGETHER = 256  # lists whose items are compared at a time
DIVERSITY = "diversity"
ROWS = ("recall", "ndcg", "coverage", "gini", "novelty", DIVERSITY, "popularity")


def measure(
    workdir: Path,
    folder: Path,
    dataset: str | None = None,
    cache_dir: str | None = None,
    attributes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Metrics of an output folder of scoring, as they are written as JSON; of the checkpoint that made it.

    Args:
      workdir: the run that made the lists.
      folder: the lists.
      dataset: where the dataset folder lies now, if it moved.
      cache_dir: memory-mapped copies of the shards; None for the run's own setting.
      attributes: columns of attributes, as `item.attributes` takes them; by default those that hold sets, and those
        that the run's config names.

    Raises:
      ConfigError: the lists are another run's; no such column.
      DataError: the folder is no whole output of scoring.
    """
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.pipeline import make_splits
    from dynrec_jax.evaluate.beyond import Beyond
    from dynrec_jax.evaluate.metrics import ranking_metrics
    from dynrec_jax.evaluate.popular import known_of
    from dynrec_jax.score.lists import batches, check_config, check_weights, item_numbers, open_written

    written = open_written(folder)
    config = workdirs.open_config(workdir)
    check_config(written, workdir, config, workdirs.content_of(workdir))
    keep_programs(config, cache_dir, ALONE)
    run = workdirs.open(workdir, written.about["step"], dataset)
    check_weights(written, run)
    sets = _sets(run, attributes)
    histories = Histories(run.dataset, cache_dir or config.data.cache_dir)
    splits = make_splits(histories, config)
    k, split = int(written.about["k"]), str(written.about["split"])
    beyond = Beyond(known_of(histories, splits, config), sorted({min(FIRST, k), k}))
    apart = _apart(run, sets, beyond.ks)
    hits = _Hits(histories, splits, split, k)
    for users, lists in batches(written):
        ids_UxK = item_numbers(lists, run.item_ids, k, folder)
        users_U = histories.numbers_of(users)
        beyond.add(ids_UxK, users_U, apart(ids_UxK))
        hits.add(ids_UxK, users_U)
    result: dict[str, Any] = {
        "lists": str(folder),
        **{name: written.about[name] for name in ("split", "k", "filter_seen", "step")},
        "catalogue": run.dataset.items,
        "users": beyond.users,
        "unknown_users": beyond.unknown,
        "users_without_training": beyond.without,
        **beyond.metrics(),
    }
    if split != "all":
        ks = sorted({k for k in config.evaluation.ks if k <= result["k"]} | set(beyond.ks))
        result |= {"asked": int(hits.counts.sum()), **ranking_metrics(hits.counts, tuple(ks))}
    result["dataset"] = run.dataset.content
    result["made_by"] = written.about
    return result


class _Hits:
    """At which places of the lists the targets of a split stand; users who are asked for nothing are left out.

    Attributes:
      counts: as `evaluate.metrics.rank_counts` gives them.
    """

    def __init__(self, histories: Any, splits: Any, split: str, k: int):
        from dynrec_jax.data.examples import NONE
        from dynrec_jax.evaluate.evaluator import asked

        self.counts = np.zeros(k + 1, np.int64)
        self._histories = histories
        self._end_U = np.full(histories.users, NONE, np.int64)
        if split != "all":
            users, ends = asked(splits, split)
            self._end_U[users] = ends

    def add(self, ids_UxK: np.ndarray, users_U: np.ndarray) -> None:
        """Counts some lists; a user of -1 is not the dataset's."""
        from dynrec_jax.evaluate.metrics import rank_counts, ranks

        end_U = self._end_U[users_U]
        kept = (users_U >= 0) & (end_U >= 0)
        targets = self._histories.item_at(users_U[kept], end_U[kept])
        self.counts += rank_counts(ranks(ids_UxK[kept], targets), len(self.counts) - 1)


def _sets(run: "Run", attributes: tuple[str, ...]) -> dict[str, "Sets"]:
    """Attributes of the items, by column."""
    from dynrec_jax.data.kinds import SET, VECTOR
    from dynrec_jax.evaluate.beyond import Sets
    from dynrec_jax.models.towers.attributes import sets_of

    kinds = run.dataset.item_column_kinds
    if not attributes:
        named = tuple(run.config.item.attributes)
        taken = {each.partition(":")[0] for each in named}
        attributes = (*named, *(name for name, kind in kinds.items() if kind == SET and name not in taken))
    found = {}
    for each in attributes:
        name, _, separator = each.partition(":")
        if kinds.get(name, VECTOR) == VECTOR:
            there = ", ".join(name for name, kind in kinds.items() if kind != VECTOR) or "none"
            raise ConfigError(
                f"--attributes: {run.dataset.path} has no item column of attributes {name!r}; found {there}"
            )
        found[name] = Sets.of(sets_of(run.dataset.items_table(), name, separator))
    return found


def _apart(
    run: "Run", sets: Mapping[str, "Sets"], ks: tuple[int, ...]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """How varied lists are, by the model's item vectors and by each set of attributes, `[len(ks), U]`."""
    from dynrec_jax.evaluate.beyond import set_diversity, vector_diversity

    gather = _gather(run)

    def blocks(ids_UxK: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(ids_UxK), TOGETHER):
            yield ids_UxK[start : start + TOGETHER]

    def apart(ids_UxK: np.ndarray) -> dict[str, np.ndarray]:
        made = {DIVERSITY: [vector_diversity(gather(ids), ks) for ids in blocks(ids_UxK)]}
        for name, each in sets.items():
            made[f"{DIVERSITY}_{name}"] = [set_diversity(each.of_lists(ids), ks) for ids in blocks(ids_UxK)]
        return {name: np.concatenate(parts, axis=1) for name, parts in made.items()}

    return apart


def _gather(run: "Run") -> Callable[[np.ndarray], np.ndarray]:
    """Vectors of the items of at most `TOGETHER` lists, `[U, K, D]`, as they are scored; zeros where an id is 0.

    Asked of the devices that hold them: nobody holds the whole table.
    """
    import jax

    from dynrec_jax.evaluate.recommender import Recommender
    from dynrec_jax.parallel.mesh import place_rows, row_pieces
    from dynrec_jax.parallel.table import lookup

    recommender = Recommender(run.model, run.mesh, TOGETHER, 1, False, items=run.items)
    _, table_RxD = recommender.vectors(run.params, run.tables)
    find = jax.jit(lookup)
    rows = -(-TOGETHER // row_pieces(run.mesh)) * row_pieces(run.mesh)

    def gather(ids_UxK: np.ndarray) -> np.ndarray:
        short = ((0, rows - len(ids_UxK)), (0, 0))
        with jax.set_mesh(run.mesh):
            found = np.asarray(find(table_RxD, place_rows(run.mesh, np.pad(ids_UxK, short))))
        return np.where(ids_UxK[..., None] > 0, found[: len(ids_UxK)], 0.0)

    return gather


def show(result: Mapping[str, Any]) -> None:
    """Two tables: metrics by cut-off, and the popularity of what groups of users are shown."""
    ks = sorted({min(FIRST, result["k"]), result["k"]})
    seen = "seen items left out" if result["filter_seen"] else "seen items too"
    title = f"{escape(result['lists'])}: {result['users']:,} lists, {result['catalogue']:,} items"
    table = Table(
        title=title,
        caption=f"split {result['split']}, {seen}; novelty in bits; popularity: share of histories",
    )
    table.add_column("metric")
    for k in ks:
        table.add_column(f"@{k}", justify="right")
    for name in [*ROWS, *_more(result)]:
        if f"{name}@{ks[0]}" in result:
            table.add_row(escape(name), *(f"{result[f'{name}@{k}']:.4f}" for k in ks))
    if "mrr" in result:
        table.add_row("mrr", *([""] * (len(ks) - 1)), f"{result['mrr']:.4f}")
    console = Console()
    console.print(table)
    _show_groups(result, ks, console)
    for name, what in (
        ("unknown_users", "users are not in the dataset"),
        ("users_without_training", "users have no training event"),
    ):
        if result[name]:
            print(f"{result[name]:,} {what}, and are in no group")


def _more(result: Mapping[str, Any]) -> list[str]:
    """Names of diversity by attributes."""
    return sorted({name.partition("@")[0] for name in result if name.startswith(f"{DIVERSITY}_")})


def _show_groups(result: Mapping[str, Any], ks: list[int], console: Console) -> None:
    table = Table(
        title="Popularity by group of users",
        caption="users in thirds by the popularity of what they took; lift: (shown - taken) / taken; apart: how far "
        "the shares of popular, middling and rare items are from those taken",
        pad_edge=False,
    )
    names = ("shown", "lift", "apart")
    for column in ("", "users", "taken", *(f"{name}\n@{k}" for k in ks for name in names)):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for name, group in result["groups"].items():
        if group:
            values = [f"{group['users']:,}", f"{group['history_popularity']:.4f}"]
            for k in ks:
                values += [f"{group[f'popularity@{k}']:.4f}", f"{group[f'lift@{k}']:+.1%}"]
                values.append(f"{group[f'miscalibration@{k}']:.3f}")
            table.add_row(name, *values)
    console.print(table)
