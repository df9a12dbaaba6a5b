"""The run folder: written by training, opened by everything after it, on any machine.

`config.json` (the resolved config), `run.json` (the dataset's place and fingerprint, package versions),
`metrics.jsonl`, `checkpoints/`, `evaluation/`; `neighbours.safetensors` where counts of neighbours are used.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import pyarrow as pa
from flax import linen as nn
from jax.sharding import Mesh

from dynrec_jax import __version__
from dynrec_jax import config as configs
from dynrec_jax.data.dataset import Dataset, open_dataset
from dynrec_jax.data.new_items import NewItems, read_new_items
from dynrec_jax.data.remote import fetched
from dynrec_jax.errors import ConfigError, DataError, HeldRunError, MachineError
from dynrec_jax.files import LOCK, HeldError, held, is_temporary, remove_temporary, write_whole
from dynrec_jax.models.features import Items, read_items
from dynrec_jax.models.model import Model
from dynrec_jax.models.towers.kinds import columns_of
from dynrec_jax.parallel.mesh import usable_mesh
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.parallel.rules import sharding, tree_shardings
from dynrec_jax.parallel.table import ids_of, lookup, rows_for
from dynrec_jax.train.arrays import UNFINISHED
from dynrec_jax.train.checkpoint import open_model

FORMAT = 1
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
      items: the items, and what describes them besides their ids.
      new: those of them that came after training, if any.
    """

    path: Path
    config: ml_collections.ConfigDict
    dataset: Dataset
    model: Model
    params: Any
    tables: Any
    step: int
    mesh: Mesh
    items: Items
    new: NewItems | None = None

    @property
    def item_ids(self) -> pa.Array:
        """Ids of all items as strings; position i - 1 is item i."""
        own = self.dataset.item_ids().cast(pa.string())
        return (
            own
            if self.new is None
            else pa.concat_arrays([own, self.new.table.column("item_id").combine_chunks()])
        )


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
      HeldRunError: another run on this machine trains there.
    """
    with contextlib.ExitStack() as held:
        processes.first_does(lambda: held.enter_context(_lock(path)))
        yield


def copy_of(path: Path, new: Path) -> None:
    """Copies a run, which may still go on, as of its newest checkpoint; nothing where it has none yet.

    Args:
      path: the run folder.
      new: the folder to make, which is not there yet; it is there whole or not at all.
    """
    making = new.with_name(f".{new.name}.copy")
    for _ in range(3):  # a checkpoint that is given up in the meantime is not missed: there is a newer one
        shutil.rmtree(making, ignore_errors=True)
        try:
            shutil.copytree(path, making, ignore=shutil.ignore_patterns(LOCK, f"*{UNFINISHED}*", ".*"))
        except OSError:  # shutil.Error, of files that have gone, is one
            continue
        if (making / "config.json").exists():
            os.replace(making, new)
            return
    shutil.rmtree(making, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        with held(path):
            yield
    except HeldError:
        raise HeldRunError(
            f"{path}: another process trains there; wait for it, end it, or choose another --workdir"
        ) from None


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


def content_of(path: Path) -> str:
    """The content hash of the dataset that a run folder is of; raises DataError where it is damaged."""
    return str(_record(path)["dataset"]["content"])


def open(
    path: str | Path,
    step: str | int = "best",
    dataset: str | Path | None = None,
    processes: Processes = ALONE,
    items: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Run:
    """Opens a run on this machine's devices, without the optimizer's state.

    Args:
      path: the run folder; or its address in an object store, such as `gs://bucket/run`, as `dataset` may be too.
      step: "best" by validation (the last where none was measured), "last", or a step's number.
      dataset: where the dataset folder lies now, if not where the run found it; its content must be the same.
      processes: that open it together, each on its devices.
      items: a file of items that came after training, to be recommended with the others; as `prepare --items` takes it.
      say: is told how far long work is.

    Raises:
      DataError: no run folder, no such checkpoint, another dataset; no new item in `items`, or nothing tells of it.
      ConfigError: a config of another version; a model of ids alone, which knows nothing of new `items`.
    """
    path = fetched(str(path))
    dataset = None if dataset is None else fetched(str(dataset))
    config, data, new, mesh = processes.agree(lambda: _opened(path, dataset, items))
    processes.check_same(
        {"config": configs.to_json(config), "content of the dataset folder": data.content, "step": step},
        "open the same run with the same flags in all",
    )
    described = processes.agree(lambda: read_items(config, data, path, say=say))
    model = described.model(config)
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    shardings = tree_shardings(mesh, boxed)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )
    variables, chosen = open_model(path / "checkpoints", abstract, step, processes=processes)
    run = Run(path, config, data, model, variables["params"], variables["tables"], chosen, mesh, described)
    return run if new is None else _with_new(run, new, processes, say)


def _opened(
    path: Path, dataset: str | Path | None, items: str | Path | None
) -> tuple[ml_collections.ConfigDict, Dataset, NewItems | None, Mesh]:
    config = open_config(path)
    data = open_dataset(Path(dataset) if dataset else Path(_record(path)["dataset"]["path"]))
    _check_fingerprint(path, data)
    if items is None:
        return config, data, None, usable_mesh(rows_for(data.items))
    if not configs.describes_items(config):
        raise ConfigError(
            f"--items={items}: the model of {path} knows items by their ids alone and nothing of new ones; train it "
            "with item.fusion text, both or ensemble"
        )
    new = read_new_items(Path(items), data, columns_of(config), config.item.triples)
    rows = rows_for(data.items), rows_for(data.items + new.table.num_rows)
    return config, data, new, usable_mesh(math.gcd(*rows))


def _with_new(run: Run, new: NewItems, processes: Processes, say: Callable[[str], None]) -> Run:
    """The run with items behind the dataset's: they have no id of their own, and all that describes them."""
    items = processes.agree(lambda: read_items(run.config, run.dataset, run.path, new.table, say))
    now = rows_for(items.number)

    def longer(table_RxD: jax.Array) -> jax.Array:
        id_R = ids_of(jnp.arange(now, dtype=jnp.int32), now)
        had_R = id_R <= run.dataset.items
        # Asked of their owners: nobody holds the whole table.
        rows_RxD = lookup(table_RxD, jnp.where(had_R, id_R, 0)[:, None])[:, 0]
        return jnp.where(had_R[:, None], rows_RxD, 0.0)

    with jax.set_mesh(run.mesh):
        place = jax.jit(longer, out_shardings=sharding(run.mesh, "items", None))
        tables = {name: place(table) for name, table in run.tables.items()}
    return dataclasses.replace(run, model=items.model(run.config), tables=tables, items=items, new=new)


def _record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        version = record["format"]
        if not all(isinstance(record["dataset"][key], str) for key in ("path", "content")):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path}/run.json: missing or damaged; expected a run folder made by `dynrec train`"
        ) from None
    if version != FORMAT:
        raise DataError(
            f"{path}/run.json: has format {version!r}, and this version reads {FORMAT}; use the dynrec-jax that wrote "
            f"it ({_writer(record)})"
        )
    return record


def _writer(record: dict[str, Any]) -> str:
    versions = record.get("versions")
    return str(versions.get("dynrec-jax", "unknown") if isinstance(versions, dict) else "unknown")


def _check_fingerprint(path: Path, dataset: Dataset) -> None:
    content = content_of(path)
    if content != dataset.content:
        raise DataError(
            f"{path}: was trained on dataset {content[:12]}, and {dataset.path} is "
            f"{dataset.content[:12]}; give the dataset folder that it was trained on"
        )
