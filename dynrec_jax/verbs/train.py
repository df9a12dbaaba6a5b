"""Trains what an experiment file describes; started again, it goes on from the newest checkpoint."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
from absl import flags

from dynrec_jax.config import describes_items
from dynrec_jax.errors import ConfigError, Preempted
from dynrec_jax.parallel.processes import ALONE, Processes, join
from dynrec_jax.parallel.watchdog import Watchdog
from dynrec_jax.verbs.caches import CACHE_DIR, keep_programs
from dynrec_jax.verbs.experiment import define_config, read_config
from dynrec_jax.verbs.watching import define_watchdog

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.dataset import Dataset
    from dynrec_jax.models.towers.tower import Job
    from dynrec_jax.parallel.mesh import Feed
    from dynrec_jax.train.hooks import Watch


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    define_config(values)
    flags.DEFINE_string("workdir", None, "run folder, made or gone on with", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    flags.DEFINE_string(
        "copy_to",
        "",
        "where in an object store a copy of the run folder is kept, as gs://bucket/runs/shop; a machine without the "
        "run folder begins with it",
        flag_values=values,
    )
    define_watchdog(values)
    return values


def run(values: flags.FlagValues) -> None:
    """Trains; prints where the run stands."""
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected the run folder to make or to go on with")
    if values.copy_to:
        from dynrec_jax.train.copies import check_address

        check_address(values.copy_to)
    processes = join()
    config = processes.agree(lambda: read_config(values))
    with Watchdog(processes, values.watchdog, stops=True) as watchdog:
        train(
            config,
            Path(values.workdir),
            values.cache_dir,
            processes,
            stop_here=watchdog.stop_here,
            copy_to=values.copy_to,
        )


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    cache_dir: str | None = None,
    processes: Processes = ALONE,
    watch: "Watch | None" = None,
    stop_here: Callable[[], bool] = lambda: False,
    copy_to: str = "",
) -> dict[str, Any]:
    """Checks that config, dataset and run folder fit, then trains; returns how the run stands.

    Args:
      config: complete, locked and valid.
      workdir: the run folder, made where it is not there.
      cache_dir: memory-mapped copies of the shards, and compiled programs; None for the config's.
      processes: that train together; each has read its own config and sees the same run folder.
      watch: as `train.loop.train` takes it.
      stop_here: as `train.loop.train` takes it.
      copy_to: where in an object store a copy of the run folder is kept, and begun with; nowhere if empty.
    """
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.examples import check_batch
    from dynrec_jax.data.pipeline import check_trains, make_splits, trains
    from dynrec_jax.parallel.mesh import check_model, feed, make_mesh
    from dynrec_jax.parallel.table import rows_for
    from dynrec_jax.train import copies, loop

    if copy_to:
        processes.first_does(lambda: copies.begin_from(copy_to, workdir, cache_dir or config.data.cache_dir))
    dataset = processes.agree(lambda: checked_dataset(config, workdir))
    processes.check_same(
        _must_be_same(config, dataset), "start all with the same config, dataset and packages"
    )
    processes.start_jax()
    keep_programs(config, cache_dir, processes)

    def placed() -> "tuple[Mesh, Feed]":
        m = config.mesh
        mesh = make_mesh(m.data, m.fsdp, m.tensor, m.slices, m.tables)
        check_model(mesh, rows_for(dataset.items), *loop.model_widths(config))
        loop.check_fits(config, dataset.items, mesh)
        if describes_items(config):
            from dynrec_jax.models.towers.text import check_text_mesh

            check_text_mesh(_job(config, dataset, workdir), mesh)
        own = feed(mesh, processes.index)
        check_batch(config.train.batch_size, dataset.shards, own.parts)
        return mesh, own

    def mapped() -> "tuple[Histories, int]":
        shards = range(own.part, dataset.shards, own.parts)
        histories = Histories(dataset, cache_dir or config.data.cache_dir, shards)
        return histories, int(trains(make_splits(histories, config)).sum())

    mesh, own = processes.agree(placed)
    histories, able = processes.agree(mapped)
    check_trains(dataset, sum(processes.exchange(able)))
    processes.first_does(lambda: workdirs.start(workdir, config, dataset))
    processes.check_shared(workdir)
    if describes_items(config):
        from dynrec_jax.models.towers.text import keep_text_model

        processes.first_does(lambda: keep_text_model(config, dataset, workdir))
    try:
        with contextlib.ExitStack() as opened:
            opened.enter_context(workdirs.locked(workdir, processes))
            kept = (
                copies.kept(workdir, copy_to, processes.pulse)
                if copy_to and processes.first
                else contextlib.nullcontext(_nothing)
            )
            saved = opened.enter_context(kept)
            standing = loop.train(config, histories, workdir, mesh, processes, watch, stop_here, saved)
    except Preempted:
        processes.exchange(None)
        raise
    # JAX gives those who leave first half a minute until all do, and process 0 may still copy.
    processes.exchange(None)
    if not processes.first:
        return standing
    best = standing.get("best")
    metric = config.evaluation.metric
    told = "" if best is None else f", best validation {metric} {best:.4f} at step {standing['best_step']}"
    print(f"trained to step {standing['step']}{told}; next: dynrec evaluate --workdir={workdir} --split=test")
    return standing


def _nothing() -> None:
    """Nobody wants to know of a checkpoint."""


def checked_dataset(config: ml_collections.ConfigDict, workdir: Path) -> "Dataset":
    """The dataset folder, after all that can be checked without a device."""
    from dynrec_jax.data.dataset import open_dataset
    from dynrec_jax.data.examples import check_batch
    from dynrec_jax.evaluate.evaluator import measured_ks
    from dynrec_jax.train.trackers import check_installed

    check_installed(config)
    if not config.dataset:
        raise ConfigError("config.dataset is empty; expected a dataset folder made by `dynrec prepare`")
    dataset = open_dataset(Path(config.dataset))
    if config.data["items"] not in (0, dataset.items):  # `config.data.items` is a method of the dict
        raise ConfigError(
            f"config.data.items: {config.data['items']:,}, and {dataset.path} has {dataset.items:,}; it is for "
            "planning without a dataset: set it to 0 to train"
        )
    check_batch(config.train.batch_size, dataset.shards)
    measured_ks(config, dataset.items)
    if describes_items(config):
        from dynrec_jax.models.towers.kinds import check_towers

        check_towers(_job(config, dataset, workdir))
    return dataset


def _job(config: ml_collections.ConfigDict, dataset: "Dataset", workdir: Path) -> "Job":
    from dynrec_jax.models.towers.tower import Job

    return Job(config, dataset, dataset.items_table(), workdir)


def _must_be_same(config: ml_collections.ConfigDict, dataset: "Dataset") -> dict[str, Any]:
    """What processes that train together may not differ in; paths are each machine's own."""
    from dynrec_jax.config import flat
    from dynrec_jax.workdir import versions

    keys = {f"config.{key}": value for key, value in flat(config).items()}
    for own in ("config.dataset", "config.data.cache_dir", "config.compiled_dir"):
        del keys[own]
    packages = {f"version of {name}": version for name, version in versions().items()}
    return {**keys, "content of the dataset folder": dataset.content, **packages}
