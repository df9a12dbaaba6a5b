"""Several runs of one dataset, such as the seeds of an experiment, that recommend together."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from dynrec_jax import workdir as workdirs
from dynrec_jax.config import flat
from dynrec_jax.data.cache import default_cache_dir
from dynrec_jax.errors import ConfigError
from dynrec_jax.evaluate.compressed import CompressedRecommender, Compression
from dynrec_jax.evaluate.joined import joined, offered
from dynrec_jax.evaluate.only import EVERYTHING, Only
from dynrec_jax.evaluate.recommender import ListMaker, Recommender
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.score.rerank import Rerank
from dynrec_jax.workdir import Run

FILTER_SEEN = "evaluation.filter_seen"
# What runs must have in common for their numbers to be of the same queries.
PROTOCOL = (
    *(
        f"evaluation.{name}"
        for name in ("split", "holdout", "validation_from", "test_from", "targets", "filter_seen")
    ),
    "data.target_events",
    "data.cold_items",
)
# What they must have in common for none to have been trained on what another one is asked for.
TRAINED = tuple(key for key in PROTOCOL if key != FILTER_SEEN)


def check_same(
    configs: Mapping[Path, ml_collections.ConfigDict], why: str, keys: Sequence[str] = PROTOCOL
) -> None:
    """Refuses runs that differ from the first one in `keys`.

    Raises:
      ConfigError: what differs is named, and `why` it must not.
    """
    first, *others = configs
    expected = flat(configs[first])
    for path in others:
        found = flat(configs[path])
        for key in keys:
            if found[key] != expected[key]:
                raise ConfigError(
                    f"{path}: {key} is {found[key]!r}, of {first} it is {expected[key]!r}; {why}"
                )


def _check_together(paths: Sequence[Path]) -> None:
    """Whether runs may recommend together, before any of them is opened."""
    configs: dict[Path, ml_collections.ConfigDict] = {}
    for path in paths:
        if path.resolve() in [other.resolve() for other in configs]:
            raise ConfigError(
                f"--with: {path} is named twice, or as --workdir too; its lists would count twice"
            )
        configs[path] = workdirs.open_config(path)
    contents = {path: workdirs.content_of(path) for path in paths}
    for path, content in contents.items():
        if content != contents[paths[0]]:
            raise ConfigError(
                f"{path}: was trained on another dataset than {paths[0]}; runs of one dataset can recommend together"
            )
    check_same(configs, "runs recommend together that were trained for the same queries", TRAINED)


def open_together(
    paths: Sequence[Path],
    step: str | int = "best",
    dataset: str | Path | None = None,
    processes: Processes = ALONE,
    items: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Run]:
    """Opens the runs of some folders, which recommend together; one alone as `workdir.open` does.

    The other arguments are those of `workdir.open`. The dataset is where that of the first run lies, unless `dataset`
    says where.

    Raises:
      ConfigError: a run is named twice, is of another dataset, or was trained for other queries than the first.
      DataError: one is no run folder, or has no such checkpoint; as `workdir.open`.
    """
    first, *others = paths
    processes.check_same(
        {"--with": [str(path) for path in others]}, "start all with the same runs in the same order"
    )
    if others:
        processes.agree(lambda: _check_together(paths))
    runs = [workdirs.open(first, step, dataset, processes, items, say)]
    place = dataset or runs[0].dataset.path
    return runs + [workdirs.open(path, step, place, processes, items, say) for path in others]


def lists_of(
    runs: Sequence[Run],
    k: int,
    filter_seen: bool,
    processes: Processes = ALONE,
    only: Only = EVERYTHING,
    weights: Sequence[float] = (),
    rerank: Rerank | None = None,
    compression: Compression | None = None,
    cache_dir: str = "",
) -> ListMaker:
    """Lists of `k` items by all of `runs` together; of one run, its own, as `Recommender.prepare` gives them.

    Args:
      runs: as `open_together` gives them.
      k: length of the lists.
      filter_seen: whether items of the history are left out.
      processes: that make the lists together.
      only: which items may be in a list.
      weights: of each run's scores; empty for their mean.
      rerank: how lists of `k` items are made from longer ones; how alike items are, the first run says.
      compression: of all the runs. Where their tables are compressed, the runs' own are given up: they are deleted.
      cache_dir: for exact vectors on the disk, where tables are compressed; empty for the runs' own setting.

    Raises:
      NonFiniteScores: an item vector is not finite.
      ConfigError: there are several processes, and the table is compressed.
    """
    pool = k if rerank is None else rerank.length(k, runs[0].items.number)
    length = pool if len(runs) == 1 else offered(pool, runs[0].items.number)
    makers, table_RxD = [], None
    for run in runs:
        size = runs[0].config.evaluation.batch_size
        settings = run.model, run.mesh, size, length, filter_seen, processes, run.items, only
        recommender = Recommender(*settings)
        if compression is not None:
            folder = Path(cache_dir or run.config.data.cache_dir or default_cache_dir())
            recommender = CompressedRecommender(*settings, compression=compression, folder=folder)
        if compression is None or compression.table == "float32":
            vectors = recommender.vectors(run.params, run.tables)
            makers.append(recommender.prepare(run.params, run.tables, vectors))
            table_RxD = vectors[1] if table_RxD is None else table_RxD
            continue
        makers.append(recommender.prepare(run.params, run.tables))
        for table in run.tables.values():
            table.delete()
    lists = makers[0] if len(runs) == 1 else joined(makers, pool, weights)
    if rerank is None:
        return lists
    if table_RxD is None:
        raise ConfigError("lists by a compressed table cannot be made anew; leave out one of the two")
    return rerank.of(lists, runs[0].mesh, table_RxD, k, processes)


def described(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Which runs recommend together, for the output: folder, step and seed of each."""
    return [{"workdir": str(run.path), "step": run.step, "seed": int(run.config.seed)} for run in runs]
