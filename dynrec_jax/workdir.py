"""The run folder: written by training, opened by everything after it, on any machine.

`config.json` (the resolved config), `run.json` (the dataset's place and fingerprint, package versions),
`metrics.jsonl`, `checkpoints/`, `evaluation/`.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax import linen as nn
from jax.sharding import Mesh

from dynrec_jax import __version__
from dynrec_jax import config as configs
from dynrec_jax.data.dataset import Dataset, open_dataset
from dynrec_jax.errors import ConfigError, DataError, MachineError
from dynrec_jax.files import is_temporary, remove_temporary, write_whole
from dynrec_jax.models.bstm import MODELS, Bstm
from dynrec_jax.parallel.mesh import usable_mesh
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.parallel.rules import tree_shardings
from dynrec_jax.parallel.table import rows_for
from dynrec_jax.train.checkpoint import open_model

FORMAT = 1
LOCK = ".lock"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pyarrow",
    "ml-collections",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, ready to be used.

    Attributes:
      path: the run folder.
      config: the resolved config, locked.
      dataset: the dataset folder that it was trained on.
      model: the model's pure functions.
      params: dense weights.
      tables: item tables {name: [R, D]}; item i has the row `parallel.table.rows_of(i, R)`, which is i below 65,536.
      step: the checkpoint's step.
      mesh: where params and tables lie.
    """

    path: Path
    config: ml_collections.ConfigDict
    dataset: Dataset
    model: Bstm
    params: Any
    tables: Any
    step: int
    mesh: Mesh


def start(path: Path, config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Makes a run folder, or checks that the one that is there is of the same config and dataset.

    Raises:
      ConfigError: the folder is of another config or dataset (the difference is named) or of something else.
      MachineError: it cannot be written.
    """
    if (path / "config.json").exists():
        changed = configs.difference(configs.from_json(path / "config.json"), config)
        changed = [line for line in changed if not line.startswith("dataset:")]
        if changed:
            raise ConfigError(
                f"{path}: is a run of another config ({'; '.join(changed)}); "
                "choose another --workdir, or the old values"
            )
        _check_fingerprint(path, dataset)
        _write_record(path, config, dataset)  # the dataset may have moved, and the mesh may be another one
        return
    # A start that was cut short leaves no more than these; the config comes last.
    if path.exists() and (
        not path.is_dir() or any(p for p in path.iterdir() if p.name != "run.json" and not is_temporary(p))
    ):
        raise ConfigError(f"{path}: exists and is no run folder; choose another --workdir")
    _write_record(path, config, dataset)


def _write_record(path: Path, config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    record = {
        "format": FORMAT,
        "dataset": {"path": str(dataset.path.absolute()), "content": dataset.content},
        "versions": versions(),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_temporary(path)
        write_whole(path / "run.json", json.dumps(record, indent=2) + "\n")
        # Last: a folder with a config is a run.
        write_whole(path / "config.json", configs.to_json(config))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(
            f"{path}: no folder can be made there ({error.strerror}); choose another --workdir"
        ) from None
    except OSError as error:
        raise MachineError(f"{path}: the run folder cannot be written ({error})") from None


@contextmanager
def locked(path: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Holds a run folder for one run, which may write there; the lock goes with process 0, however it ends.

    Raises:
      ConfigError: another run on this machine trains there.
    """
    with contextlib.ExitStack() as held:
        processes.first_does(lambda: held.enter_context(_lock(path)))
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with (path / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{path}: another process trains there; wait for it, end it, or choose another --workdir"
            ) from None
        except OSError:  # a file system without locks: nothing can be held, and nothing is refused
            pass
        yield


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"dynrec-jax": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def open_config(path: Path) -> ml_collections.ConfigDict:
    """The config of a run folder; raises ConfigError or DataError where it is none."""
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such folder"
        raise DataError(f"{path}: {found}; expected a run folder made by `dynrec train`")
    if not (path / "config.json").exists():
        raise DataError(f"{path}: holds no config.json; expected a run folder made by `dynrec train`")
    return configs.from_json(path / "config.json")


def open(
    path: str | Path,
    step: str | int = "best",
    dataset: str | Path | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Opens a run on this machine's devices, without the optimizer's state.

    Args:
      path: the run folder.
      step: "best" by validation (the last where none was measured), "last", or a step's number.
      dataset: where the dataset folder lies now, if not where the run found it; its content must be the same.
      processes: that open it together, each on its devices.

    Raises:
      DataError: no run folder, no such checkpoint, another dataset.
      ConfigError: a config of another version.
    """
    path = Path(path)
    config, data, mesh = processes.agree(lambda: _opened(path, dataset))
    processes.check_same(
        {"config": configs.to_json(config), "content of the dataset folder": data.content, "step": step},
        "open the same run with the same flags in all",
    )
    model = MODELS[config.model.name](config, data.items)
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    shardings = tree_shardings(mesh, boxed)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )
    variables, chosen = open_model(path / "checkpoints", abstract, step, processes=processes)
    return Run(path, config, data, model, variables["params"], variables["tables"], chosen, mesh)


def _opened(path: Path, dataset: str | Path | None) -> tuple[ml_collections.ConfigDict, Dataset, Mesh]:
    config = open_config(path)
    data = open_dataset(Path(dataset) if dataset else Path(_record(path)["dataset"]["path"]))
    _check_fingerprint(path, data)
    return config, data, usable_mesh(rows_for(data.items))


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        str(record["dataset"]["path"]), str(record["dataset"]["content"])
        return record
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path}/run.json: missing or damaged; expected a run folder made by `dynrec train`"
        ) from None


def _check_fingerprint(path: Path, dataset: Dataset) -> None:
    record = _record(path)
    if record["dataset"]["content"] != dataset.content:
        raise DataError(
            f"{path}: was trained on dataset {record['dataset']['content'][:12]}, and {dataset.path} is "
            f"{dataset.content[:12]}; give the dataset folder that it was trained on"
        )
