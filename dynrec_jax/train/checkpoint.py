"""Checkpoints: the only module that knows Orbax.

A checkpoint is one commit of three parts: `model` (parameters and tables: all that scoring needs), `optimizer`
(its state and the rows') and `progress` (JSON: the step, which is the input position, and the best metric so
far). It is visible only when it is whole.
"""

import copy
import gc
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from dynrec_jax.errors import DataError, MachineError
from dynrec_jax.train.state import TrainState

# Orbax reports each save over several lines; a run's own log says when one was written.
logging.getLogger("absl").setLevel(logging.ERROR)

VALUE, STEP = "value", "step"

Hook = Callable[[Any], Any]


def _rank(metrics: dict[str, Any]) -> Any:
    """What the best checkpoint has most of; of equal values the first is the best, as the loop sees it."""
    return metrics[VALUE], -metrics[STEP]


class Checkpoints:
    """The checkpoints of one run, written in the background.

    The best by `value` and the latest few are kept.
    """

    def __init__(self, folder: Path, keep_last: int = 2):
        """Opens `folder`, makes it where it is not there, and clears what a killed save left behind."""
        best = keep.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            create=True,
            best_fn=_rank,  # without it, metrics are neither written nor read
            best_mode="max",
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(keep_last), best]),
        )
        _hush_late_work()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_names=("model", "optimizer", "progress")
        )

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, progress: dict[str, Any], value: float | None) -> bool:
        """Starts to write a checkpoint; `value` is the validation metric of this step where it was measured.

        Returns whether it was started: False where this step is there already. Raises MachineError where the disk
        is full, also if it was the save before that failed in the background.
        """
        if step in self._manager.all_steps():
            return False
        args = ocp.args.Composite(
            model=ocp.args.StandardSave({"params": state.params, "tables": state.tables}),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "row_state": state.row_state}),
            # A copy: it is written in the background, and the run goes on changing its own.
            progress=ocp.args.JsonSave(copy.deepcopy(progress)),
        )
        metrics = None if value is None else {VALUE: float(value), STEP: step}
        with _full_disk(self._folder):
            return self._manager.save(step, args=args, metrics=metrics)

    def restore(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state and progress of a step, laid out as `state` is.

        Raises:
          DataError: the checkpoint is damaged, or of a state of another shape.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(
            model=ocp.args.StandardRestore({"params": template.params, "tables": template.tables}),
            optimizer=ocp.args.StandardRestore(
                {"opt_state": template.opt_state, "row_state": template.row_state}
            ),
            progress=ocp.args.JsonRestore(),
        )
        with _damage(self._folder / str(step)):
            restored = self._manager.restore(step, args=args)
        model, optimizer = restored["model"], restored["optimizer"]
        placed = jax.device_put(step, state.step.sharding)
        new = TrainState(
            placed.astype("int32"),
            model["params"],
            model["tables"],
            optimizer["opt_state"],
            optimizer["row_state"],
        )
        return new, restored["progress"]

    def wait(self) -> None:
        """Returns when all that was started is written; raises what went wrong."""
        with _full_disk(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        with _full_disk(self._folder):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()


def open_model(folder: Path, abstract: dict[str, Any], step: str | int) -> tuple[dict[str, Any], int]:
    """Parameters and tables of a checkpoint, on whatever devices `abstract`'s shardings name.

    Args:
      folder: the run's `checkpoints` folder; it is only read.
      abstract: `{'params', 'tables'}` of jax.ShapeDtypeStruct with shardings.
      step: "best" (by the validation metric, the last where none was measured), "last", or a step's number.

    Returns:
      The variables and the step they are of.

    Raises:
      DataError: there is no checkpoint, or not of that step, or it does not fit `abstract`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the checkpoints of a run made by `dynrec train`")
    _hush_late_work()
    options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_rank, best_mode="max")
    manager = ocp.CheckpointManager(
        folder.absolute(), options=options, item_names=("model", "optimizer", "progress")
    )
    try:
        steps = sorted(manager.all_steps())
        if not steps:
            raise DataError(f"{folder}: holds no complete checkpoint; train first, or longer")
        best = manager.best_step()
        chosen = (
            (steps[-1] if best is None else best) if step == "best" else steps[-1] if step == "last" else step
        )
        if chosen not in steps:
            raise DataError(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        args = ocp.args.Composite(model=ocp.args.StandardRestore(abstract))
        with _damage(folder / str(chosen)):
            return manager.restore(chosen, args=args)["model"], int(chosen)
    finally:
        manager.close()


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise on a full disk into a MachineError."""
    try:
        yield
    except Exception as error:
        # TensorStore raises ValueError, but keeps the operating system's words.
        reason = next((words for words in ("No space left", "quota exceeded") if words in str(error)), None)
        if reason is None:
            raise
        raise MachineError(
            f"{folder}: a checkpoint cannot be written ({reason}); free some space, and the same command goes on "
            "from the last one that is whole"
        ) from None


@contextmanager
def _damage(checkpoint: Path) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise on reading a damaged checkpoint into a DataError.

    They raise ValueError, KeyError, FileNotFoundError and plain Exception alike, with pages of settings.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        _drop_pending(error)
        reason = re.split(r" \[(?:tensorstore_spec|source locations)", " ".join(str(first).split()))[0]
        raise DataError(
            f"{checkpoint}: does not fit the run's config or is damaged: {reason or type(first).__name__}; "
            "copy it again, or remove this folder to use an earlier checkpoint"
        ) from None


def _drop_pending(error: BaseException) -> None:
    """Frees the coroutines that a failed read never started, here and in silence, not at exit and with warnings."""
    link: BaseException | None = error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        gc.collect()


def _hush_late_work() -> None:
    """Silences what reads and writes still under way say once one has failed and Orbax has closed their event loop.

    TensorStore's threads say it, a traceback each, whenever they come to it: so the filter stays.
    """
    if not isinstance(sys.unraisablehook, _Filter):
        sys.unraisablehook = _Filter(sys.unraisablehook)


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
