"""The folder that serves a run without this package: programs, weights, item ids, a runner, and what they are."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dynrec_jax import __version__
from dynrec_jax.data.cache import Histories, from_start
from dynrec_jax.data.folder import new_folder, refuse_existing
from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.export import index, runner
from dynrec_jax.export.program import PLATFORMS, VECTORS, Served, arguments, export_program
from dynrec_jax.parallel.digest import tree_digest
from dynrec_jax.workdir import Run

FORMATS = ("stablehlo", "faiss")
RUNNER = "run.py"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
      k: length of the lists.
      filter_seen: whether the program is given items to leave out.
      formats: some of `FORMATS`.
      platforms: that programs are lowered for, some of `program.PLATFORMS`.
      factory: FAISS's name of the index; "Flat" is exact.
      search: FAISS's parameters of a search, such as "nprobe=8"; empty for those of the index.
      cache_dir: memory-mapped copies of the shards; empty for the run's own setting.
    """

    k: int = 100
    filter_seen: bool = False
    formats: tuple[str, ...] = ("stablehlo",)
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    factory: str = "Flat"
    search: str = ""
    cache_dir: str = ""

    def shortened(self, items: int) -> "ExportOptions":
        """The same with lists that are no longer than the catalogue."""
        return dataclasses.replace(self, k=min(self.k, items))


def check(options: ExportOptions, out: Path) -> None:
    """Whether these are options at all, before a run is opened.

    Raises:
      ConfigError: an unknown or repeated format or platform; an index without the package that makes it, or settings of
        one that is not asked for; `out` is where a disk is mounted.
      DataError: `out` exists and is no empty folder.
    """
    for flag, given, known in (
        ("formats", options.formats, FORMATS),
        ("platforms", options.platforms, PLATFORMS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown or not given or len(set(given)) < len(given):
            found = (
                f"{unknown[0]!r} is unknown"
                if unknown
                else "names nothing"
                if not given
                else "repeats a name"
            )
            raise ConfigError(f"--{flag}={','.join(given)}: {found}; expected some of {', '.join(known)}")
    if "faiss" in options.formats:
        index.check_installed()
    elif (options.factory, options.search) != (ExportOptions.factory, ExportOptions.search):
        raise ConfigError(
            f"--faiss={options.factory} --faiss_search={options.search}: are of an index, and "
            f"--formats={','.join(options.formats)} has none; expected faiss among them"
        )
    if out.is_mount():  # it is written beside `out` and renamed
        raise ConfigError(f"{out}: another disk is mounted there; choose a folder in it for --out")
    if not _is_empty(out):
        refuse_existing(out)


def export(
    run: Run, out: Path, options: ExportOptions, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Writes the folder `out`, which is there whole or not at all.

    Args:
      run: the trained model.
      out: is not there yet, or is an empty folder.
      options: what to export.
      say: is told what the user should know.

    Returns:
      What `export.json` says.

    Raises:
      ConfigError: as `check`; k exceeds the catalogue; FAISS knows no such index.
      DataError: `out` exists.
      NonFiniteScores: the weights are not finite.
      MachineError: the disk is full.
    """
    check(options, out)
    number = run.items.number
    if not 1 <= options.k <= number:
        raise ConfigError(
            f"--k={options.k}: the catalogue has {number:,} items; give a number from 1 to {number}"
        )
    served = Served(run, options.k, options.filter_seen)
    weights = served.weights()
    if "faiss" in options.formats:
        index.make(options.factory, options.search, weights[VECTORS].shape[1])
    if _is_empty(out):
        out.rmdir()
    try:
        with new_folder(out) as folder:
            manifest = _described(run, options, weights)
            manifest["programs"] = _write_programs(folder, served, weights, options)
            if "faiss" in options.formats:
                histories = Histories(run.dataset, options.cache_dir or run.config.data.cache_dir)
                manifest["index"] = index.write(
                    folder, served, weights, histories, options.factory, options.search
                )
                for line in index.told(manifest["index"], run):
                    say(line)
            save_file(weights, folder / runner.WEIGHTS)
            _write(folder / runner.ITEMS, json.dumps(run.item_ids.to_pylist(), ensure_ascii=False) + "\n")
            # As readable as the other files: safetensors keeps its own to the user.
            shutil.copymode(folder / runner.ITEMS, folder / runner.WEIGHTS)
            (folder / RUNNER).write_bytes(Path(runner.__file__).read_bytes())
            manifest["files"] = {path.name: _facts(path) for path in sorted(folder.iterdir())}
            _write(folder / runner.MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    except PermissionError as error:
        raise ConfigError(
            f"{out}: no folder can be made there ({error.strerror}); choose another --out"
        ) from None
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{out}: cannot be written ({error}); nothing is left of it") from None
    return manifest


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


def _described(run: Run, options: ExportOptions, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a reader must know to use the files, and whose they are."""
    data = run.dataset
    began, ended = data.first_time or 0, int(data.info["last_time"] or 0)
    return {
        "format": runner.FORMAT,
        "formats": list(options.formats),
        "workdir": run.path.absolute().name,
        "step": run.step,
        "weights_digest": tree_digest((run.params, run.tables)),
        "dataset": data.content,
        "items": run.items.number,
        "k": options.k,
        "filter_seen": options.filter_seen,
        "max_length": run.model.max_length,
        "interests": run.model.abra.interests,
        "event_types": list(data.event_types),
        "log_began": began,
        "log_ended": int(from_start(np.array([ended]), began)[0]),
        "platforms": list(options.platforms),
        "versions": {"dynrec-jax": __version__, "jax": jax.__version__},
        "weights": arguments(weights),
    }


def _write_programs(
    folder: Path, served: Served, weights: dict[str, np.ndarray], options: ExportOptions
) -> dict[str, Any]:
    """The programs that the formats need, each in a file of StableHLO; returns how each is called."""
    users, seen = jax.export.symbolic_shape("b, m")
    programs: dict[str, tuple[Any, dict[str, Any], list[str]]] = {}
    if "stablehlo" in options.formats:
        programs["recommend"] = served.lists, served.inputs_of_lists(users, seen, _int32), ["ids", "scores"]
    if "faiss" in options.formats:
        programs["query"] = served.queries, served.inputs_of_queries(users, _int32), ["query"]
    described = {}
    for name, (function, inputs, outputs) in programs.items():
        exported = export_program(function, weights, inputs, options.platforms)
        (folder / f"{name}.stablehlo").write_bytes(exported.mlir_module_serialized)
        described[name] = {
            "calling_convention": exported.calling_convention_version,
            "inputs": arguments(inputs),
            "outputs": arguments(dict(zip(outputs, exported.out_avals, strict=True))),
        }
    return described


def _int32(*shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
