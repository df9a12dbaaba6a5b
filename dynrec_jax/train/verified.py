"""Reading of checkpoints: what is returned is what was saved, or it is said what of it is not.

First a look at the files (all of their bytes, shared out, where there are several processes: an error in one alone
would leave the others behind), then Orbax reads, then the digests of what was read are computed where it lies. Any
difference is traced to leaves and files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dynrec_jax.errors import DataError, MachineError
from dynrec_jax.parallel.digest import digests
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.train import arrays, manifest
from dynrec_jax.train.manifest import Damaged, Manifest

Found = Manifest | DataError


class Reader:
    """Reads the checkpoints of a folder in one or several processes, which make the same calls and get the same."""

    def __init__(self, folder: Path, processes: Processes = ALONE):
        self._folder = folder
        self._processes = processes

    def scan(self) -> dict[int, Found]:
        """The manifests by step; where one cannot be used, why."""
        everybody = self._processes
        told = everybody.agree(lambda: self._scan() if everybody.first else None)
        return {step: _untold(*found) for step, found in everybody.exchange(told)[0]}

    def _scan(self) -> list[Any]:
        return [[step, _told(self._folder / str(step))] for step in sorted(steps(self._folder))]

    def read(self, found: Found, templates: Mapping[str, Any]) -> dict[str, Any]:
        """Some trees of a checkpoint, by name, laid out as their templates are.

        Raises:
          Damaged: not all of it is what was saved.
          DataError: it is of trees of other shapes, or cannot be used for another reason.
        """
        if isinstance(found, DataError):
            raise found
        folder, part = self._folder / str(found.step), found.part(templates)
        _check_fits(folder, part, leaves_by_name(templates))
        if faults := self._check_files(folder, part):
            raise Damaged(self._trace(folder, part, templates, [], faults))
        trees = self._read(folder, part, templates)
        leaves = leaves_by_name(trees)
        read = dict(zip(leaves, digests(list(leaves.values())), strict=True))
        own = [name for name, digest in read.items() if digest != part.leaves[name][0]]
        wrong = {name for names in self._processes.exchange(own) for name in names}
        if wrong:
            raise Damaged(self._trace(folder, part, templates, sorted(wrong), []))
        return trees

    def _check_files(self, folder: Path, part: Manifest) -> list[str]:
        everybody = self._processes
        if everybody.count == 1:
            return manifest.cheap_check(folder, part)
        check = everybody.agree(lambda: manifest.full_check(folder, part, everybody.index, everybody.count))
        return [fault for faults in everybody.exchange(check) for fault in faults]

    def _read(self, folder: Path, part: Manifest, templates: Mapping[str, Any]) -> dict[str, Any]:
        trees: dict[str, Any] = {}
        fault: Exception | None = None
        try:
            trees = {name: arrays.read(folder / name, template) for name, template in templates.items()}
        except Exception as error:
            fault = error
        told = self._processes.exchange(None if fault is None else arrays.reason(fault))
        first = next((text for text in told if text), None)
        if first is None:
            return trees
        if isinstance(fault, arrays.ELSEWHERE):
            raise fault
        # With several processes, all bytes of the files were compared already.
        faults = manifest.full_check(folder, part) if self._processes.count == 1 else []
        if faults:
            raise Damaged(self._trace(folder, part, templates, [], faults))
        raise MachineError(f"{folder}: cannot be read, though its files are as they were written: {first}")

    def _trace(
        self,
        folder: Path,
        part: Manifest,
        templates: Mapping[str, Any],
        leaves: Sequence[str],
        files: Sequence[str],
    ) -> str:
        """Which leaves and files are not what they were; looks for those that are not known yet."""
        if self._processes.count == 1:
            files = manifest.full_check(folder, part)
            leaves = leaves or _wrong_leaves(folder, part, templates)
        told = [f"{_some(leaves)} {'is' if len(leaves) == 1 else 'are'} not what was saved"] if leaves else []
        return "; ".join(
            [*told, *files[:2], *([f"and {len(files) - 2} more files"] if len(files) > 2 else [])]
        )


def leaves_by_name(trees: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of trees by name, as in `model/params/user/kernel`."""
    return {
        f"{tree}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for tree in trees
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees[tree])
    }


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, whole or not; none where there is no folder."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return [int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name]


def _told(folder: Path) -> list[Any]:
    """A manifest, or what is wrong with it, as it travels."""
    try:
        return ["manifest", manifest.to_json(manifest.read(folder))]
    except Damaged as error:
        return ["damaged", str(error)]
    except DataError as error:
        return ["refused", str(error)]


def _untold(kind: str, told: Any) -> Found:
    if kind == "manifest":
        return manifest.from_json(told)
    return Damaged(told) if kind == "damaged" else DataError(told)


def _check_fits(folder: Path, part: Manifest, wanted: Mapping[str, Any]) -> None:
    """Raises DataError where the leaves of a checkpoint are of other shapes: no damage, but another model."""
    there = {name: f"{entry[2]}{entry[1]}" for name, entry in part.leaves.items()}
    config = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()}
    for name in sorted({*there, *config}):
        one, other = there.get(name, "absent"), config.get(name, "absent")
        if one != other:
            raise DataError(
                f"{folder}: does not fit the run's config: {name} is {one} there and {other} by the config; "
                "use the config that it was trained with"
            )


def _wrong_leaves(folder: Path, part: Manifest, templates: Mapping[str, Any]) -> list[str]:
    wrong = []
    for tree, template in templates.items():
        leaves = arrays.read_leaves(folder / tree, template)
        for name, leaf in zip(leaves_by_name({tree: template}), leaves, strict=True):
            if leaf is None or digests([leaf]) != [part.leaves[name][0]]:
                wrong.append(name)
    return wrong


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more leaves" if len(names) > 3 else "")
