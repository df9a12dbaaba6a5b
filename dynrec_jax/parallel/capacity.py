"""Sizes of the exchange of rows, chosen from the ids that a run looks up.

A capacity that is too small costs rounds, one that is too large costs bytes in every round; results depend on
neither. It is chosen so that nearly every step needs one round.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.mesh import table_devices

TWO_HOPS_FROM = 16  # owners on a torus
ROOM = 1.03  # beyond the most that the sample needed
MULTIPLE = 4


def hops(devices: int, torus: bool) -> tuple[int, ...]:
    """Devices along each hop: one hop through a switch, two along the rings of a torus."""
    if not torus or devices < TWO_HOPS_FROM:
        return (devices,)
    near = next(size for size in range(math.isqrt(devices), 0, -1) if devices % size == 0)
    return (devices // near, near) if near > 1 else (devices,)


def most(row_DxM: np.ndarray, rows: int, sizes: tuple[int, ...]) -> list[int]:
    """The most distinct rows that any device sends another in each hop, and that any owner is asked for.

    Args:
      row_DxM: int[D, M], what each of the D owners looks up, in the order of the mesh; `rows` for none.
      rows: of the whole table.
      sizes: devices along each hop.
    """
    devices = math.prod(sizes)
    held = rows // devices
    device = np.repeat(np.arange(devices), row_DxM.shape[1])
    row = row_DxM.reshape(-1).astype(np.int64)
    device, row = device[row < rows], row[row < rows]
    found = []
    for hop in range(len(sizes) + 1):
        # After `hop` hops a request lies with the device that has the owner's first digits and the asker's others.
        low = math.prod(sizes[hop:])
        span = held * (math.prod(sizes[hop + 1 :]) if hop < len(sizes) else 1)
        asked = np.unique((device % low) * (rows + 1) + row)
        place = asked // (rows + 1) * (rows // span) + asked % (rows + 1) // span
        found.append(int(np.unique(place, return_counts=True)[1].max(initial=1)))
    return found


def chosen(needs: Iterable[list[int]], sizes: tuple[int, ...], asked: int) -> Exchange:
    """The sizes of an exchange, from what several steps needed (see `most`) and the ids that a device asks for."""
    worst = np.max(list(needs), axis=0)
    roomy = [-(-math.ceil(need * ROOM) // MULTIPLE) * MULTIPLE for need in worst]
    capacities = tuple(min(capacity, asked) for capacity in roomy[:-1])
    return Exchange(sizes, capacities, roomy[-1])


def rounds(need: list[int], exchange: Exchange) -> int:
    """Rounds of a step with such needs."""
    room = (*exchange.capacities, exchange.touched)
    return max(math.ceil(n / c) for n, c in zip(need, room, strict=True))


def default(mesh: Any, ids: int) -> Exchange:
    """Sizes for a number of ids of all devices together, spread evenly: where nothing is known of them."""
    count = table_devices(mesh)
    each = -(-ids // mesh.size)
    sizes = hops(count, torus=False)
    room = min(each, 2 * -(-each // count) + 16)
    return Exchange(sizes, (room,) * len(sizes), each * 2)


def zipf(generator: np.random.Generator, items: int, shape: tuple[int, ...]) -> np.ndarray:
    """Item indices 1 .. N, index i with probability proportional to 1/i; exact, by rejection."""
    drawn = np.empty(math.prod(shape), np.int64)
    filled = 0
    while filled < drawn.size:
        u = generator.random(2 * (drawn.size - filled) + 16)
        # floor((N+1)^u) has probability proportional to log(1 + 1/i), at least log 2 times 1/i.
        proposed = np.minimum(np.exp(u * math.log(items + 1)).astype(np.int64), items)
        kept = proposed[generator.random(u.size) * np.log1p(1 / proposed) * proposed < math.log(2)]
        taken = kept[: drawn.size - filled]
        drawn[filled : filled + taken.size] = taken
        filled += taken.size
    return drawn.reshape(shape)


def is_torus(mesh: jax.sharding.Mesh) -> bool:
    """Whether the devices' network is a torus."""
    return bool(mesh.devices.flat[0].platform == "tpu")
