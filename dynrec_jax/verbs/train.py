"""Trains what an experiment file describes; started again, it goes on from the newest checkpoint."""

from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dynrec_jax import config as configs
from dynrec_jax.errors import ConfigError


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "experiment file; --config.KEY=VALUE changes a key", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "run folder, made or gone on with", flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Trains; prints where the run stands."""
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected the run folder to make or to go on with")
    if values["config"].value is None:
        raise ConfigError("--config is missing; expected an experiment file, such as experiments/ml1m.py")
    train(values.config, Path(values.workdir))


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Validates everything, then trains; returns how the run stands."""
    config = checked(config)
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.dataset import open_dataset
    from dynrec_jax.data.examples import check_batch
    from dynrec_jax.data.pipeline import make_splits
    from dynrec_jax.parallel.mesh import make_mesh
    from dynrec_jax.train import loop

    if not config.dataset:
        raise ConfigError("config.dataset is empty; expected a dataset folder made by `dynrec prepare`")
    dataset = open_dataset(Path(config.dataset))
    check_batch(config.train.batch_size, dataset.shards)
    mesh = make_mesh(config.mesh.data, config.mesh.table, config.mesh.tensor)
    histories = Histories(dataset, config.data.cache_dir)
    make_splits(histories, config)
    workdirs.start(workdir, config, dataset)
    standing = loop.train(config, histories, workdir, mesh)
    best = standing.get("best")
    metric = config.evaluation.metric
    told = "" if best is None else f", best validation {metric} {best:.4f} at step {standing['best_step']}"
    print(f"trained to step {standing['step']}{told}; next: dynrec evaluate --workdir={workdir} --split=test")
    return standing


def checked(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config, locked and with valid values; raises ConfigError also where a file removed or added keys."""
    expected, found = configs.flat(configs.default_config()), configs.flat(config)
    if missing := sorted(expected.keys() - found.keys()):
        raise ConfigError(
            f"--config: the experiment file left out {', '.join(missing)}; start from default_config()"
        )
    if unknown := sorted(found.keys() - expected.keys()):
        raise ConfigError(
            f"--config: unknown keys {', '.join(unknown)}; known keys are in dynrec_jax/config.py"
        )
    config.lock()
    configs.validate(config)
    return config
