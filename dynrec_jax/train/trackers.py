"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, each where it is asked for.

What they miss, `metrics.jsonl` has: a server that does not answer never ends a run.
"""

import contextlib
import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_collections

from dynrec_jax.config import flat
from dynrec_jax.errors import ConfigError, one_line
from dynrec_jax.files import write_whole

RECORD = "trackers.json"  # in the run folder: what a run is called elsewhere, to go on there
# Config key -> the package that it needs, and the extra of ours that installs it.
NEEDS = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}


class Tracker(Protocol):
    """Takes scalars of a step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Finite scalars by name."""
        ...

    def close(self) -> None:
        """The run has ended, or goes on another time."""
        ...


def asked(config: ml_collections.ConfigDict) -> list[str]:
    """Which trackers a config asks for."""
    logging = config.logging
    wanted = {"tensorboard": logging.tensorboard, "wandb": logging.wandb, "mlflow": logging.mlflow}
    return [key for key, value in wanted.items() if value]


def check_installed(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where the config asks for a tracker whose package is not there."""
    for key in asked(config):
        package, extra = NEEDS[key]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"config.logging.{key}: {package} is not installed; pip install 'dynrec-jax[{extra}]'"
            )


class Trackers:
    """All trackers of a run; one that fails is told of and left alone, and the run goes on."""

    def __init__(
        self, config: ml_collections.ConfigDict, folder: Path, start: int, say: Callable[[str], None]
    ):
        """Raises ConfigError where one is asked for and not installed."""
        check_installed(config)
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        for key in asked(config):
            with self._guarded(key):
                self._trackers[key] = KINDS[key](config, folder, start)

    def write(self, step: int, values: dict[str, float]) -> None:
        """To all; numbers that are not finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for key, tracker in list(self._trackers.items()):
            with self._guarded(key):
                tracker.write(step, finite)

    def close(self) -> None:
        """Of all."""
        for key, tracker in list(self._trackers.items()):
            with self._guarded(key):
                tracker.close()

    @contextlib.contextmanager
    def _guarded(self, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trackers.pop(key, None)  # asked again at each step, it would be waited for each time
            self._say(f"{key} does not take what it is told ({one_line(error)}); metrics.jsonl has it all")


class TensorBoard:
    """Event files in `tensorboard/` in the run folder."""

    def __init__(self, config: ml_collections.ConfigDict, folder: Path, start: int):
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """As `Tracker`."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """As `Tracker`."""
        self._board.close()


class Wandb:
    """A run of the W&B project `logging.wandb`, in the group `logging.group`; offline with WANDB_MODE=offline."""

    def __init__(self, config: ml_collections.ConfigDict, folder: Path, start: int):
        import wandb

        known = _record(folder)
        known.setdefault("wandb", secrets.token_hex(8))
        _keep(folder, known)
        self._run = wandb.init(
            project=config.logging.wandb,
            group=config.logging.group or None,
            name=folder.absolute().name,
            id=known["wandb"],
            resume="allow",
            dir=str(folder),
            config=flat(config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        # Our own steps: after a restart some come again, which W&B's would not take.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """As `Tracker`."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """As `Tracker`."""
        self._run.finish()


class Mlflow:
    """A run of the MLflow experiment `logging.mlflow`, tagged `group`; MLFLOW_TRACKING_URI says where."""

    def __init__(self, config: ml_collections.ConfigDict, folder: Path, start: int):
        # Its own patience with a server that does not answer is many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        known = _record(folder)
        if "mlflow" not in known:
            experiment = self._client.get_experiment_by_name(config.logging.mlflow)
            identity = (
                self._client.create_experiment(config.logging.mlflow)
                if experiment is None
                else experiment.experiment_id
            )
            made = self._client.create_run(identity, run_name=folder.absolute().name)
            known["mlflow"] = made.info.run_id
            _keep(folder, known)
            params = [Param(key, str(value)[:500]) for key, value in flat(config).items()]
            tags = [RunTag("group", config.logging.group)] if config.logging.group else []
            for part in range(0, len(params), 100):  # as many as a request takes
                self._client.log_batch(known["mlflow"], params=params[part : part + 100], tags=tags)
        self._identity = known["mlflow"]
        self._client.update_run(self._identity, status="RUNNING")

    def write(self, step: int, values: dict[str, float]) -> None:
        """As `Tracker`; `ndcg@10` is called `ndcg_at_10`, since names there have no @."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._identity, metrics=metrics)

    def close(self) -> None:
        """As `Tracker`."""
        self._client.set_terminated(self._identity)


KINDS: dict[str, Callable[[ml_collections.ConfigDict, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _keep(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / RECORD, json.dumps(record) + "\n")
