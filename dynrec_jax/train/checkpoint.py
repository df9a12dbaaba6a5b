"""Checkpoints: written in the background, visible only when whole and on the disk, and proven when read.

A checkpoint is a folder, named by its step, of two trees of arrays and a manifest: `model` (parameters and tables:
all that scoring needs), `optimizer` (its state and the rows') and `manifest.json` (the step, which is the input
position, the progress, the digest of every leaf and file). It is written under another name, synced, renamed. A full
disk is no reason to stop training; what is damaged is moved aside and never deleted.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dynrec_jax.errors import DataError, HeldRunError, MachineError
from dynrec_jax.files import sync
from dynrec_jax.parallel.digest import digests
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.train import arrays, manifest
from dynrec_jax.train.manifest import Damaged, Manifest
from dynrec_jax.train.saving import BUSY, DONE, Save, of_the_disk, remove, remove_unfinished
from dynrec_jax.train.state import TrainState
from dynrec_jax.train.verified import Found, Reader, leaves_by_name

Say = Callable[[str], None]
TREES = ("model", "optimizer")
DAMAGED = "damaged"  # the folder beside `checkpoints`
MOST_TRIES = 3  # saves in a row that may fail for a reason that may pass; those of a full disk do not count


class Outcome(NamedTuple):
    """How a save ended: `full` is None where it is on the disk, and else what the disk said, mostly that it is full."""

    step: int
    full: str | None


class Checkpoints:
    """The checkpoints of one run, which its processes write and read together: all make the same calls.

    The best by validation and the latest few are kept; one whose seal is broken counts as neither, and stays.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        processes: Processes = ALONE,
        say: Say | None = None,
        may_write: Callable[[], None] = lambda: None,
        start: str = "",
    ):
        """Opens `folder`, makes it where it is not there, and clears what a killed save left behind.

        Args:
          folder: `checkpoints` in the run folder, which all processes see.
          keep_last: how many of the latest are kept.
          processes: that train together.
          say: takes a line for the user; standard error where it is None.
          may_write: raises where process 0 may write here no longer; called before a save begins, and before it gets
            its name.
          start: names this start of the run, the same in all processes: no two write to the same files.
        """
        self._folder, self._keep_last, self._processes = folder, keep_last, processes
        self._may_write, self._start = may_write, start
        self._say = say or _to_stderr
        self._reader = Reader(folder, processes)
        processes.first_does(self._tidy)
        self._known = self._reader.scan()
        self._numbers = itertools.count()
        self._save: Save | None = None
        self._outcomes: list[Outcome] = []
        self._passing = 0  # saves in a row that failed for a reason that may pass

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._folder

    def latest(self) -> int | None:
        """The newest step that is on the disk, or None."""
        return max(self._known, default=None)

    def say(self, text: str) -> None:
        """A line for the user, from process 0."""
        if self._processes.first:
            self._say(text)

    def save(
        self,
        state: TrainState,
        step: int,
        progress: dict[str, Any],
        value: float | None,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Starts to write a checkpoint, once the one before is through. How it ended, `poll` tells.

        Args:
          state: may be overwritten as soon as this returns.
          step: of the state.
          progress: JSON that comes back with it.
          value: the validation metric of this step, where it was measured.
          before: has something else on the disk first; a full disk there is one of the save.

        Returns:
          Whether it was started: False where this step is there already, or the disk is full.
        """
        self.wait()
        if step in self._known:
            return False
        trees = _trees(state)
        leaves = leaves_by_name(trees)
        told = manifest.describe(digests(list(leaves.values())), leaves)
        # A copy, by way of JSON: it is written in the background, and the run goes on changing its own.
        progress = json.loads(json.dumps(progress))
        body = Manifest(step, None if value is None else float(value), progress, told, {})
        name = f"{step}{arrays.UNFINISHED}-{self._start}{next(self._numbers)}"
        save = self._save = Save(body, self._folder / name)
        save.attempt(lambda: self._prepare(save, before))
        stands = self._processes.exchange(save.stands())
        if stands != [DONE] * self._processes.count:
            self._conclude(save, stands)
            return False
        # Alone, nobody has to be waited for: the thread that writes goes on to commit.
        save.committing = self._processes.count == 1
        save.write(trees, then=lambda: self._commit(save) if save.committing else None)
        return True

    def amend(self, step: int, progress: dict[str, Any], value: float | None) -> None:
        """Has a checkpoint that is there say what was measured of it since; its arrays stay as they are.

        Raises:
          MachineError: the disk is full, or the run goes on elsewhere.
        """
        self.wait()
        known = self._known[step]
        assert isinstance(known, Manifest)
        new = replace(known, progress=json.loads(json.dumps(progress)), value=value)

        def write() -> None:
            self._may_write()
            manifest.write(self._folder / str(step), new)

        self._processes.first_does(write)
        self._known[step] = new

    def poll(self) -> list[Outcome]:
        """How the saves ended that have ended since the last call. Quick: it is called after every step.

        Raises:
          Whatever ended a save but a full disk.
        """
        self._advance()
        ended, self._outcomes = self._outcomes, []
        return ended

    def wait(self) -> None:
        """Returns when nothing is written any more; raises as `poll` does."""
        while self._save is not None:
            self._save.join()
            self._advance()

    def close(self) -> None:
        """Waits for what is written; of several processes, which may have parted, each for its own part alone."""
        if self._processes.count > 1:
            if self._save is not None:
                self._save.join()
            return
        self.wait()
        for step, full in self.poll():
            if full is not None:
                self.say(f"the checkpoint of step {step} could not be written ({full})")

    def resume(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The state and progress of the newest checkpoint that is good, laid out as `state` is.

        Those that are damaged are moved aside, each with a line for the user.

        Returns:
          None where there is no checkpoint at all.

        Raises:
          DataError: there are checkpoints, and none is good; or they are of another shape or version.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for found in self._known.values():
            if isinstance(found, DataError) and not isinstance(found, Damaged):
                raise found
        for step in sorted(self._known, reverse=True):
            try:
                restored = self._restore(state, self._known[step])
            except Damaged as fault:
                damaged[step] = str(fault)
                continue
            older = {n: str(found) for n, found in self._known.items() if isinstance(found, Damaged)}
            self._move_aside({**damaged, **older}, step)
            return restored
        if not damaged:
            return None
        newest = max(damaged)
        raise DataError(
            f"{self._folder}: no checkpoint is good; the newest, of step {newest}, is damaged: {damaged[newest]}; "
            "copy the checkpoints again, or move this folder away to train from the start"
        )

    def restore(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state and progress of a step, laid out as `state` is.

        Raises:
          DataError: there is no such checkpoint, it is damaged, or of a state of another shape.
        """
        self.wait()
        if step not in self._known:
            raise DataError(_no_such_step(self._folder, step, self._known))
        try:
            return self._restore(state, self._known[step])
        except Damaged as fault:
            raise Damaged(_refusal(self._folder / str(step), fault)) from None

    def _restore(self, state: TrainState, found: Found) -> tuple[TrainState, dict[str, Any]]:
        trees = self._reader.read(found, _trees(state))
        assert isinstance(found, Manifest)
        model, optimizer = (trees[name] for name in TREES)
        step = jax.device_put(np.int32(found.step), state.step.sharding)
        weights = optimizer.pop("weights", None)
        average = {} if weights is None else model
        new = TrainState(step, **(weights or model), **{"caches": {}, **optimizer}, average=average)
        return new, json.loads(json.dumps(found.progress))

    def _tidy(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self._folder)

    def _prepare(self, save: Save, before: Callable[[], None]) -> None:
        before()
        if self._processes.first:
            self._may_write()
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self._folder, self._start)
            arrays.make_folders(save.folder, TREES)

    def _commit(self, save: Save) -> None:
        """In the background, in process 0."""
        save.commit(self._folder / str(save.manifest.step), TREES, self._may_write)
        for step in self._superseded(save.manifest):
            remove(self._folder / str(step))

    def _superseded(self, new: Manifest) -> list[int]:
        """Which checkpoints go when a new one is there; never one that is not known to be good."""
        good = _good({**self._known, new.step: new})
        kept = {*sorted(good)[-max(self._keep_last, 1) :], *_by_value(good)[:1]}
        return [step for step in good if step not in kept]

    def _advance(self) -> None:
        """Looks how the save under way stands in all processes, and goes on where all are through."""
        if (save := self._save) is None:
            return
        stands = self._processes.exchange(save.stands())
        if BUSY in stands:
            return
        if save.committing or any(one != DONE for one in stands):
            self._conclude(save, stands)
            return
        save.committing = True
        if self._processes.first:
            save.run(lambda: self._commit(save))

    def _conclude(self, save: Save, stands: list[Any]) -> None:
        """Takes note of how a save ended; raises what was more than a full disk."""
        self._save = None
        step = save.manifest.step
        faults = {index: one for index, one in enumerate(stands) if one != DONE}
        if not faults:
            # Process 0 alone has seen the files.
            told = manifest.to_json(save.manifest) if self._processes.first else None
            new = manifest.from_json(self._processes.exchange(told)[0])
            for old in self._superseded(new):
                del self._known[old]
            self._known[step] = new
            self._passing = 0
            self._outcomes.append(Outcome(step, None))
            return
        if self._processes.first:
            remove_unfinished(self._folder, self._start)
        full, passing = (
            next((one[what] for one in faults.values() if one[what]), None) for what in ("full", "passing")
        )
        self._passing = self._passing + 1 if full is None else 0
        if full is None and self._passing <= MOST_TRIES:
            full = passing
        if full is not None:
            self._outcomes.append(Outcome(step, full))
            return
        index, one = min(faults.items())
        if one["held"]:
            raise HeldRunError(one["told"]) from save.error
        if save.error is not None:
            if not of_the_disk(save.error):
                raise save.error
            raise MachineError(
                f"{self._folder}: the checkpoint of step {step} was not written: {one['told']}"
            ) from save.error
        raise MachineError(f"process {index}: the checkpoint of step {step} was not written: {one['told']}")

    def _move_aside(self, damaged: Mapping[int, str], instead: int) -> None:
        def move() -> None:
            for step, fault in damaged.items():
                to = _move_to(self._folder / str(step), self._folder.parent / DAMAGED)
                self.say(
                    f"{self._folder / str(step)}: is damaged ({fault}); moved to {to}; going on from step {instead}"
                )

        self._processes.first_does(move)
        for step in damaged:
            del self._known[step]


def open_model(
    folder: Path,
    abstract: dict[str, Any],
    step: str | int,
    say: Say | None = None,
    processes: Processes = ALONE,
) -> tuple[dict[str, Any], int]:
    """Parameters and tables of a checkpoint, on whatever devices `abstract`'s shardings name.

    Where the best or the last is damaged, the next that is good is used, with a line for the user.

    Args:
      folder: the run's `checkpoints` folder; it is only read.
      abstract: `{'params', 'tables'}` of jax.ShapeDtypeStruct with shardings.
      step: "best" (by the validation metric, the last where none was measured), "last", or a step's number.
      say: takes a line for the user; standard error where it is None.
      processes: that open it together.

    Returns:
      The variables and the step they are of.

    Raises:
      DataError: there is no checkpoint, or not of that step, it is damaged, or it does not fit `abstract`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the checkpoints of a run made by `dynrec train`")
    reader = Reader(folder, processes)
    known = reader.scan()
    if not known:
        raise DataError(f"{folder}: holds no complete checkpoint; train first, or longer")
    if step not in ("best", "last") and step not in known:
        raise DataError(_no_such_step(folder, step, known))
    damaged: dict[int, Damaged] = {}
    for candidate in _candidates(known, step):
        try:
            variables = reader.read(known[candidate], {"model": abstract})["model"]
        except Damaged as fault:
            if _is_gone(folder / str(candidate), processes):  # a run beside us has retired it
                return open_model(folder, abstract, step, say, processes)
            damaged[candidate] = Damaged(str(fault))  # without the traceback, which holds the arrays
            continue
        for number, told in damaged.items() if processes.first else ():
            text = f"{folder / str(number)}: is damaged ({told}); the checkpoint of step {candidate} is used"
            (say or _to_stderr)(text)
        return variables, candidate
    first = next(iter(damaged))
    raise DataError(_refusal(folder / str(first), damaged[first]))


def _is_gone(checkpoint: Path, processes: Processes) -> bool:
    return bool(processes.exchange(not checkpoint.is_dir() if processes.first else None)[0])


def _candidates(known: Mapping[int, Found], step: str | int) -> list[int]:
    """Steps in the order in which they will do."""
    newest_first = sorted(known, reverse=True)
    if step == "last":
        return newest_first
    if step != "best":
        return [int(step)]
    good = _good(known)
    ranked = _by_value(good)
    # First those of which nobody can tell whether they were the best: they are reported.
    return [
        *(number for number in newest_first if number not in good),
        *ranked,
        *(number for number in newest_first if number in good and number not in ranked),
    ]


def _good(known: Mapping[int, Found]) -> dict[int, Manifest]:
    return {step: found for step, found in known.items() if isinstance(found, Manifest)}


def _by_value(good: Mapping[int, Manifest]) -> list[int]:
    """Steps that were measured, the best first; of equal values the first is the best, as the loop sees it."""
    measured = [(-found.value, step) for step, found in good.items() if found.value is not None]
    return [step for _, step in sorted(measured)]


def _trees(state: TrainState) -> dict[str, Any]:
    optimizer = {"opt_state": state.opt_state, "row_state": state.row_state}
    if state.caches:  # what only training needs lies with the optimizer
        optimizer["caches"] = state.caches
    if state.average:  # who opens a model gets the average
        optimizer["weights"] = state.weights
    return {"model": state.served, "optimizer": optimizer}


def _move_to(checkpoint: Path, place: Path) -> Path:
    """Moves a checkpoint to a folder of such, under a name that is free; returns where it is."""
    place.mkdir(exist_ok=True)
    names = (place / f"{checkpoint.name}{more}" for more in ("", *(f"-{n}" for n in range(2, 1000))))
    to = next(name for name in names if not name.exists())
    os.rename(checkpoint, to)
    for changed in (place, checkpoint.parent, place.parent):
        sync(changed)
    return to


def _no_such_step(folder: Path, step: str | int, known: Mapping[int, Found]) -> str:
    return f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, sorted(known)))}"


def _refusal(checkpoint: Path, fault: Exception) -> str:
    return f"{checkpoint}: is damaged: {fault}; copy it again, or use another checkpoint"


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"dynrec: {text}\n")
