"""Batch and mesh sizes that fit a target, best first by expected speed: a few compilations in place of a guess."""

from collections.abc import Callable, Iterator
from typing import Any

import ml_collections

from dynrec_jax.compile.topology import Target
from dynrec_jax.errors import ConfigError

MESHES = 3  # that are tried, the config's own first
CHANGES = 3  # doublings, or halvings, of the batch in each
MOST = MESHES * (CHANGES + 1)  # compilations of a training step

# The numbers of a config's training step (see `measure`); raises ConfigError where it cannot be.
Measure = Callable[[ml_collections.ConfigDict], dict[str, Any]]


def search(
    config: ml_collections.ConfigDict,
    target: Target,
    measure: Measure,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Doubles the batch in each of a few meshes until it does not fit, or halves it until it does.

    Args:
      config: where the search starts.
      target: what is compiled for.
      measure: compiles; it is called `MOST` times at most.
      say: is told what is tried and what came of it, a line each.

    Returns:
      What fits, the most expected histories a second first: `mesh`, `batch_size`, `histories_per_second`, the step's
      `seconds`, `peak_bytes`, `room_bytes`, and `flags`, which set it.
    """
    found = []
    for mesh in meshes(config, target):
        for numbers in _batches(config, mesh, measure, say):
            if numbers["fits"]:
                found.append(numbers)
    return sorted(found, key=lambda each: -each["histories_per_second"])


def meshes(config: ml_collections.ConfigDict, target: Target) -> list[dict[str, int]]:
    """Sizes of a slice's axes: the config's own, all to data, all to fsdp, half of them to pairs that share heads."""
    each = len(target.devices) // target.slices
    own = {name: int(config.mesh[name]) for name in ("data", "fsdp", "tensor")}
    whole = max(n for n in range(1, each + 1) if each % n == 0 and config.model.dim % n == 0)
    tried = [
        _filled(own, each),
        {"data": each, "fsdp": 1, "tensor": 1},
        {"data": each // whole, "fsdp": whole, "tensor": 1},
    ]
    if each % 2 == 0 and config.model.heads % 2 == 0:
        tried.append({"data": each // 2, "fsdp": 1, "tensor": 2})
    return [mesh for index, mesh in enumerate(tried) if mesh not in tried[:index]][:MESHES]


def _filled(mesh: dict[str, int], each: int) -> dict[str, int]:
    """With what is left in place of -1."""
    known = 1
    for size in mesh.values():
        known *= size if size > 0 else 1
    return {name: size if size > 0 else each // known for name, size in mesh.items()}


def _batches(
    config: ml_collections.ConfigDict, mesh: dict[str, int], measure: Measure, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The numbers of each batch that is tried in a mesh."""
    size, grows = int(config.train.batch_size), None
    for _ in range(CHANGES + 1):
        numbers = _tried(config, mesh, size, measure, say)
        if numbers is None:
            return
        yield numbers
        if grows is None:
            grows = numbers["fits"]
        elif grows != numbers["fits"]:
            return
        if not grows and size % 2:
            return
        size = size * 2 if grows else size // 2


def _tried(
    config: ml_collections.ConfigDict,
    mesh: dict[str, int],
    size: int,
    measure: Measure,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """What comes of one mesh and batch; None where the config cannot be so."""
    keys = {**{f"mesh.{name}": n for name, n in mesh.items()}, "train.batch_size": size}
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(keys)
    flags = " ".join(f"--config.{key}={value}" for key, value in keys.items())
    if config.train.accumulation and size % config.train.accumulation:
        return None
    try:
        step = measure(changed)
    except ConfigError as error:
        say(f"{flags}: {error}")
        return None
    speed = size / step["seconds"]["expected"]
    say(f"{flags}: {'fits' if step['fits'] else 'does not fit'}, {speed:,.0f} histories/s expected")
    kept = {name: step[name] for name in ("fits", "peak_bytes", "room_bytes", "seconds")}
    return {"mesh": mesh, "batch_size": size, "histories_per_second": speed, **kept, "flags": flags}
