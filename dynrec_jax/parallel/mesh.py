"""The mesh of devices: named axes, made once at the start of a run."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.rules import ITEM_AXES, sharding

AXES = ("slice", "data", "fsdp", "tensor")
SUMMED = 2**20  # counts that processes add up at a time


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 0,
    tables: str = "slice",
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `AXES`.

    Args:
      data: devices of a slice along this axis, as for the two that follow; one of the three may be -1, "what is left".
      fsdp: see `data`.
      tensor: see `data`.
      slices: groups of devices with a fast network inside; 0 for as many as the devices say that they lie in.
      tables: "slice" for item tables over the devices of a slice, and a replica in each; "all" for tables over all
        devices. The axis "slice" has the size 1 then, and "data" goes over the slices too.
      devices: all that there are, unless others are given.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    groups = _slices(jax.devices() if devices is None else devices, slices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    each = len(groups[0])
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"config.mesh: {sizes}; expected sizes from 1 up and at most one -1")
    if unknown and each % known == 0:
        sizes[unknown[0]] = each // known
    if math.prod(sizes.values()) != each:
        where = f" of each of {len(groups)} slices" if len(groups) > 1 else ""
        raise ConfigError(
            f"config.mesh: {sizes} does not make {each} devices{where}; choose sizes whose product is {each}"
        )
    shape = tuple(sizes.values())
    # Each slice is laid out by itself, as its network is.
    placed = np.stack([jax.make_mesh(shape, AXES[1:], devices=group).devices for group in groups])
    if tables == "all":
        placed = placed.reshape(1, -1, *shape[1:])
    return _mesh(placed)


def _slices(devices: Sequence[jax.Device], wanted: int) -> list[list[jax.Device]]:
    """The devices by slice; those that know of no slices are cut in their order."""
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if len(found) > 1:
        if wanted not in (0, len(found)):
            raise ConfigError(f"config.mesh.slices: {wanted}, and the devices lie in {len(found)}; use 0")
        if len({len(group) for group in found.values()}) > 1:
            sizes = ", ".join(str(len(group)) for group in found.values())
            raise ConfigError(f"config.mesh: slices of {sizes} devices; expected slices of one size")
        return [found[index] for index in sorted(found)]
    count = max(wanted, 1)
    if len(devices) % count:
        raise ConfigError(
            f"config.mesh.slices: {len(devices)} devices do not divide into {count} slices; choose a divisor"
        )
    each = len(devices) // count
    return [list(devices[start : start + each]) for start in range(0, len(devices), each)]


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
    return _mesh(np.array(devices).reshape(1, -1, 1, 1))


def table_devices(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the rows of an item table lie."""
    return math.prod(mesh.shape[axis] for axis in ITEM_AXES)


def check_model(mesh: Mesh, rows: int, dim: int, heads: int, hidden: int) -> None:
    """Raises ConfigError where a model does not divide over a mesh."""
    holders = table_devices(mesh)
    if rows % holders:
        most = math.gcd(rows, 2**16)
        raise ConfigError(
            f"config.mesh: item tables of {rows} rows do not divide over {holders} devices; use a power of two up to "
            f"{most}, on several slices perhaps with mesh.tables=slice"
        )
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if heads % tensor:
        raise ConfigError(
            f"config.mesh.tensor: {tensor} does not divide model.heads={heads}; choose one that does"
        )
    if hidden % tensor:
        raise ConfigError(
            f"config.mesh.tensor: {tensor} does not divide the {hidden} hidden units that model.feedforward gives; "
            "choose one that does"
        )
    if dim % fsdp:
        raise ConfigError(f"config.mesh.fsdp: {fsdp} does not divide model.dim={dim}; choose one that does")


def device_memory() -> int | None:
    """Bytes of one of this process's devices; simulated ones share the machine's. None where nobody tells."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    told = (devices[0].memory_stats() or {}).get("bytes_limit")
    return None if told is None else int(told)


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


def row_pieces(mesh: Mesh | AbstractMesh) -> int:
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
    """Adds up int64 counts (of any shape, less than 2^48) that the parts of a batch have; all processes get the sum.

    In pieces, since every device gets the whole of one.
    """
    if own.parts == 1:
        return counts
    flat = counts.reshape(-1)
    pieces = [_sum_of_parts(mesh, own, flat[start : start + SUMMED]) for start in range(0, flat.size, SUMMED)]
    return np.concatenate(pieces).reshape(counts.shape)


def _sum_of_parts(mesh: Mesh, own: Feed, counts: np.ndarray) -> np.ndarray:
    spread, whole = sharding(mesh, "batch", None, None), sharding(mesh)
    halves = np.zeros((own.pieces, 2, counts.size), np.uint32)  # JAX counts in 32 bits
    halves[0] = counts & 0xFFFF, counts >> 16
    total = _sum(whole)(jax.make_array_from_process_local_data(spread, halves))
    low, high = np.asarray(total).astype(np.int64)
    return low + (high << 16)


@functools.cache
def _sum(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.sum(axis=0), out_shardings=where)


def _mesh(devices: np.ndarray) -> Mesh:
    # Auto: the compiler places what the rules leave open; Explicit axes would refuse table[ids].
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
