"""Trains what an experiment file describes; started again, it goes on from the newest checkpoint."""

import importlib.util
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from dynrec_jax.errors import ConfigError
from dynrec_jax.verbs.experiment import define_config, read_config


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    define_config(values)
    flags.DEFINE_string("workdir", None, "run folder, made or gone on with", flag_values=values)
    flags.DEFINE_string("cache_dir", None, "memory-mapped copies of the shards", flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Trains; prints where the run stands."""
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected the run folder to make or to go on with")
    train(read_config(values), Path(values.workdir), values.cache_dir)


def train(config: ml_collections.ConfigDict, workdir: Path, cache_dir: str | None = None) -> dict[str, Any]:
    """Checks that config, dataset and run folder fit, then trains; returns how the run stands.

    Args:
      config: complete, locked and valid.
      workdir: the run folder, made where it is not there.
      cache_dir: memory-mapped copies of the shards; None for the config's.
    """
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.dataset import open_dataset
    from dynrec_jax.data.examples import check_batch
    from dynrec_jax.data.pipeline import make_splits, trains
    from dynrec_jax.evaluate.evaluator import measured_ks
    from dynrec_jax.parallel.mesh import check_model, make_mesh
    from dynrec_jax.parallel.table import rows_for
    from dynrec_jax.train import loop

    if config.logging.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "config.logging.tensorboard: tensorboardX is not installed; pip install 'dynrec-jax[tensorboard]'"
        )
    if not config.dataset:
        raise ConfigError("config.dataset is empty; expected a dataset folder made by `dynrec prepare`")
    dataset = open_dataset(Path(config.dataset))
    check_batch(config.train.batch_size, dataset.shards)
    measured_ks(config, dataset.items)
    mesh = make_mesh(config.mesh.data, config.mesh.table, config.mesh.tensor)
    check_model(mesh, rows_for(dataset.items), config.model.heads)
    histories = Histories(dataset, cache_dir or config.data.cache_dir)
    trains(histories, make_splits(histories, config))
    workdirs.start(workdir, config, dataset)
    with workdirs.locked(workdir):
        standing = loop.train(config, histories, workdir, mesh)
    best = standing.get("best")
    metric = config.evaluation.metric
    told = "" if best is None else f", best validation {metric} {best:.4f} at step {standing['best_step']}"
    print(f"trained to step {standing['step']}{told}; next: dynrec evaluate --workdir={workdir} --split=test")
    return standing
