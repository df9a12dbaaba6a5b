"""Trees of arrays on the disk: the only module that knows Orbax.

Each process writes what lies on its devices, and reads what will. Nothing in here waits for another process: who is
ready, and what went wrong where, the callers tell each other.
"""

import asyncio
import gc
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath  # type: ignore[import-untyped]

# Orbax reports each save, and each failed write, over many lines; a run's own log says in one what came of it.
logging.getLogger("absl").setLevel(logging.CRITICAL)

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that its tools pass over

# Why a call fails although nothing is wrong with the files.
ELSEWHERE = (jax.errors.JaxRuntimeError, MemoryError, PermissionError)

Hook = Callable[[Any], Any]


def make_folders(folder: Path, names: Iterable[str]) -> None:
    """Makes the folders that trees are written to; one process calls this before any writes."""
    for name in names:
        # Orbax's first process makes the one below itself, late, and others wait ten minutes for it if that fails.
        (folder / name / "array_metadatas").mkdir(parents=True)


def start_to_write(folder: Path, trees: Mapping[str, Any]) -> Callable[[], None]:
    """Starts to write each tree to the folder of its name, which is there, below `folder`.

    Returns:
      What waits until this process's part is written, and raises what went wrong. The arrays may be overwritten as
      soon as this function returns: it has copied them to the host.
    """
    _hush_late_work()

    async def begin() -> list[Any]:
        handler = ocp.StandardCheckpointHandler()
        begun = [
            await handler.async_save(_orbax_path(folder / name), args=ocp.args.StandardSave(tree))
            for name, tree in trees.items()
        ]
        return [future for futures in begun for future in futures or []]

    # Not asyncio.run: it goes through the tasks of all threads, and the writes under way have theirs.
    loop = asyncio.new_event_loop()
    try:
        futures = loop.run_until_complete(begin())
    except Exception as error:
        _drop_pending(error)
        raise
    finally:
        loop.close()

    def wait() -> None:
        fault: Exception | None = None
        for future in futures:
            try:
                future.result()
            except Exception as error:  # the others are waited for: they still write to the folder
                fault = fault or error
        if fault is not None:
            _drop_pending(fault)
            raise fault

    return wait


def merge(folder: Path, names: Iterable[str]) -> None:
    """Makes one of what the processes have written; one of them calls this when all are through."""
    for name in names:
        ocp.StandardCheckpointHandler().finalize(_orbax_path(folder / name))


def read(folder: Path, template: Any) -> Any:
    """A tree laid out as `template` (arrays, or shapes with shardings) is; raises whatever Orbax raises."""
    _hush_late_work()
    item = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    try:
        return ocp.StandardCheckpointHandler().restore(
            _orbax_path(folder), args=ocp.args.StandardRestore(item)
        )
    except Exception as error:
        _drop_pending(error)
        raise


def read_leaves(folder: Path, template: Any) -> Iterator[Any]:
    """The leaves of a tree one by one, in the template's order; None for one that Orbax cannot read."""
    leaves, structure = jax.tree.flatten(jax.tree.map(ocp.utils.to_shape_dtype_struct, template))
    with _dropping():
        for number, leaf in enumerate(leaves):
            alone = [ocp.PLACEHOLDER] * len(leaves)
            alone[number] = leaf
            item = jax.tree.unflatten(structure, alone)
            args = ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
            )
            try:
                tree = ocp.PyTreeCheckpointHandler().restore(_orbax_path(folder), args=args)
            except ELSEWHERE:
                raise
            except Exception:
                yield None
            else:
                yield jax.tree.leaves(tree)[number]


def reason(error: BaseException) -> str:
    """What Orbax or TensorStore said first, without their pages of settings."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    told = re.split(r" \[(?:tensorstore_spec|source locations)", " ".join(str(first).split()))[0]
    return told or type(first).__name__


def _orbax_path(path: Path) -> Any:
    return epath.Path(path.absolute())


def _drop_pending(error: BaseException) -> None:
    """Frees what a failed call has left."""
    link: BaseException | None = error
    with _dropping():
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__


@contextmanager
def _dropping() -> Iterator[None]:
    """Frees the coroutines that failed calls never started, here and in silence, not at exit and with warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        yield
        gc.collect()


def _hush_late_work() -> None:
    """Silences what reads and writes still under way say once one has failed and Orbax has closed their event loop.

    TensorStore's threads and asyncio's tasks say it, a traceback each, whenever they come to it: so the filters stay.
    """
    if not isinstance(sys.unraisablehook, _Filter):
        sys.unraisablehook = _Filter(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(
        _is_no_late_failure
    )  # once: a filter is added only if it is not there


def _is_no_late_failure(record: logging.LogRecord) -> bool:
    """The first failure is raised; that of a write beside it nobody asks for."""
    return "exception was never retrieved" not in record.getMessage()


class _Filter:
    """A hook for exceptions that nobody can catch; passes over those of closed event loops and dropped coroutines."""

    def __init__(self, before: Hook):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        dropped = error is not None and isinstance(error.__cause__, GeneratorExit)
        if not (closed or dropped):
            self._before(unraisable)
