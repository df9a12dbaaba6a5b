"""The mesh of devices: named axes, made once at the start of a run."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.rules import sharding

AXES = ("data", "table", "tensor")


def make_mesh(data: int = -1, table: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with the axes `AXES`; one of the sizes may be -1, "what is left".

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "table": table, "tensor": tensor}
    devices = jax.device_count()
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"config.mesh: {sizes}; expected sizes from 1 up and at most one -1")
    if unknown and devices % known == 0:
        sizes[unknown[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"config.mesh: {sizes} does not make {devices} devices; choose sizes whose product is {devices}"
        )
    return _mesh(tuple(sizes.values()), jax.devices())


def usable_mesh(rows: int) -> Mesh:
    """A mesh of as many devices as a table of `rows` divides over; all of them where their number is a power of two.

    Raises:
      ConfigError: it does not divide over the processes.
    """
    held: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        held.setdefault(device.process_index, []).append(device)
    fewest = min(map(len, held.values()))
    each = next((n for n in range(fewest, 0, -1) if rows % (n * len(held)) == 0), None)
    if each is None:
        raise ConfigError(
            f"{len(held)} processes: item tables of {rows} rows do not divide over them; start a power of two"
        )
    devices = [device for own in held.values() for device in own[:each]]
    return _mesh((len(devices), 1, 1), devices)


def check_model(mesh: Mesh, rows: int, heads: int) -> None:
    """Raises ConfigError where a model does not divide over a mesh."""
    if rows % mesh.size:
        raise ConfigError(
            f"config.mesh: item tables of {rows} rows do not divide over {mesh.size} devices; use a power of two"
        )
    tensor = mesh.shape["tensor"]
    if heads % tensor:
        raise ConfigError(
            f"config.mesh.tensor: {tensor} does not divide model.heads={heads}; choose one that does"
        )


class Feed(NamedTuple):
    """Which part of every batch a process supplies. Processes that share a model's tensor axis supply the same part.

    Attributes:
      part: number of the part.
      parts: how many there are.
      pieces: a part's rows divide by this, so that each of its devices gets as many.
      lead: whether this process speaks for the part where values are gathered.
    """

    part: int = 0
    parts: int = 1
    pieces: int = 1
    lead: bool = True


def row_pieces(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch lie; those along the tensor axis hold the same rows."""
    return math.prod(mesh.shape[axis] for axis in AXES if axis != "tensor")


def feed(mesh: Mesh, process: int) -> Feed:
    """The part of a batch that lies on a process's devices.

    Raises:
      ConfigError: processes hold overlapping parts, or parts of different sizes.
    """
    pieces = row_pieces(mesh)
    held: dict[int, set[int]] = {}
    places = sharding(mesh, "batch").devices_indices_map((pieces,))
    for device, (place,) in places.items():
        process_index = device.process_index  # type: ignore[attr-defined] # jax.Device's stub lacks it
        held.setdefault(process_index, set()).add(place.start or 0)
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if sum(map(len, parts)) != pieces or len({len(part) for part in parts}) > 1 or process not in held:
        raise ConfigError(
            f"config.mesh: {dict(mesh.shape)} cuts the batch across processes unevenly; choose a tensor axis that "
            "divides the devices of a process, or is a multiple of them"
        )
    own = tuple(sorted(held[process]))
    lead = min(index for index, part in held.items() if tuple(sorted(part)) == own)
    return Feed(parts.index(own), len(parts), len(own), lead == process)


def place_rows(mesh: Mesh, part: np.ndarray) -> jax.Array:
    """A global array, rows over the batch axes, of which each process gives its part."""
    spread = sharding(mesh, "batch", *(None,) * (part.ndim - 1))
    if spread.is_fully_addressable:
        return jax.device_put(part, spread)
    return jax.make_array_from_process_local_data(spread, part)


def own_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array that `place_rows` took from this process, in their order."""
    if x.is_fully_addressable:
        return np.asarray(x)
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def place_same(where: NamedSharding, x: np.ndarray) -> jax.Array:
    """A global array of which every process holds the whole, laid out as `where` says."""
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def sum_of_parts(mesh: Mesh, own: Feed, counts: np.ndarray) -> np.ndarray:
    """Adds up int64 counts (of any shape, less than 2^48) that the parts of a batch have; all processes get the sum."""
    if own.parts == 1:
        return counts
    spread, whole = sharding(mesh, "batch", None, *(None,) * counts.ndim), sharding(mesh)
    halves = np.zeros((own.pieces, 2, *counts.shape), np.uint32)  # JAX counts in 32 bits
    halves[0] = counts & 0xFFFF, counts >> 16
    total = _sum(whole)(jax.make_array_from_process_local_data(spread, halves))
    low, high = np.asarray(total).astype(np.int64)
    return low + (high << 16)


@functools.cache
def _sum(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.sum(axis=0), out_shardings=where)


def _mesh(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    # Auto: the compiler places what the rules leave open; Explicit axes would refuse table[ids].
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
