"""What a program sends from device to device, read from its optimised HLO: bytes by kind of collective.

A collective's bytes are those of its result on one device, as XLA lists them. What goes over the wire differs by kind
and by the number of devices that take part, and is told apart.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from dynrec_jax.compile.hlo import Instruction, Module
from dynrec_jax.compile.loops import Trips, walk

KINDS = (
    *("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
# Their operands are in the result of what starts them, in front of it.
STARTED = ("all-gather-start", "collective-permute-start")
SEND = "send"

_RESHAPED = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # 0, 1, 2, … in an array of these sizes, its axes transposed

Groups = list[
    list[int]
]  # devices that take part together, by their number in the program's device assignment


class Traffic(NamedTuple):
    """Bytes of one device.

    Attributes:
      within: of results, by kind, where all that take part lie in one slice.
      between: of results, by kind, where they lie in several; on TPUs "send", what is handed to the host for that.
      wire_within: what such a device sends over the network of its slice.
      wire_between: what it sends to other slices.
    """

    within: dict[str, float]
    between: dict[str, float]
    wire_within: float
    wire_between: float


def traffic(module: Module, trips: Trips, slices: Sequence[int]) -> Traffic:
    """What one execution of a program sends.

    Args:
      module: its optimised HLO.
      trips: how often loops run of which the text does not tell it.
      slices: the slice of each device, by its number in the program's device assignment.
    """
    within: dict[str, float] = {}
    between: dict[str, float] = {}
    wire = {True: 0.0, False: 0.0}
    chains: set[tuple[str, str]] = set()
    for instruction, _, times in walk(module, trips):
        kind, size = _kind(instruction), _result_bytes(instruction) * times
        if kind is None or (chain := _chain(instruction)) in chains:
            continue
        chains |= {chain} if chain else set()
        if kind == SEND:
            between[kind] = between.get(kind, 0) + size
            wire[True] += size
            continue
        groups = groups_of(instruction, len(slices))
        spans = any(len({slices[device] for device in group}) > 1 for group in groups)
        held = between if spans else within
        held[kind] = held.get(kind, 0) + size
        wire[spans] += size * _wire_factor(kind, max(map(len, groups)))
    return Traffic(within, between, wire[False], wire[True])


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return kind
    is_send = instruction.opcode == SEND and "is_host_transfer=true" in instruction.attributes
    return SEND if is_send and "xla_megascale" in instruction.attributes else None


def _chain(instruction: Instruction) -> tuple[str, str] | None:
    """What names a collective that TPUs spread over a chain of fusions, each of which repeats it."""
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return (channel[1], chain[1]) if chain and channel else None


def _result_bytes(instruction: Instruction) -> int:
    arrays = instruction.arrays
    if instruction.opcode == SEND:  # what is sent, a handle and a token
        arrays = arrays[:1]
    elif instruction.opcode in STARTED:
        # (operands, results, handles): as many results as operands.
        count = len(instruction.operands)
        arrays = arrays[count : 2 * count]
    return sum(array.bytes for array in arrays)


def _wire_factor(kind: str, devices: int) -> float:
    """Bytes that a device sends for each byte of its result, by the usual algorithms on a ring."""
    share = (devices - 1) / devices
    if kind == "all-reduce":
        return 2 * share
    if kind == "reduce-scatter":
        return devices - 1.0
    return 1.0 if kind == "collective-permute" else share


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """Which devices take part together; all of them where nothing is said.

    Raises:
      ValueError: the groups are written in a way that is not known.
    """
    attributes = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])] or [[0]]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [
            [int(device) for device in group.split(",") if device]
            for group in re.findall(r"\{([\d,]*)\}", listed[1])
        ]
        return groups or [list(range(devices))]
    if iota := re.search(rf"replica_groups=\[\d+,(\d+)\]<=({_RESHAPED})", attributes):
        size, order = int(iota[1]), _devices(iota[2])
        return [order[start : start + size] for start in range(0, len(order), size)]
    if mesh := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(({_RESHAPED}|[\d,]+)\))? \{{([^}}]*)\}}",
        attributes,
    ):
        return _mesh_groups(mesh[1], mesh[2], mesh[5])
    raise ValueError(f"{instruction.name}: its replica groups cannot be read: {attributes[:200]}")


def _mesh_groups(axes: str, devices: str | None, along: str) -> Groups:
    """`mesh['x'=2,'y'=4] {'y'}`: groups along the axes named last, which may be parts of axes, `'y':(2)2`.

    Such a part is written with the product of the sizes in front of it, and its own size.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    named = re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", along)
    parts = {
        name: [(int(before or 1), int(size or sizes[name])) for each, before, size in named if each == name]
        for name in sizes
    }
    cut, chosen = [], []
    for name, size in sizes.items():
        places = sorted({1, size, *(p for before, own in parts[name] for p in (before, before * own))})
        for low, high in itertools.pairwise(places):
            chosen.append(any(before <= low and high <= before * own for before, own in parts[name]))
            cut.append(high // low)
    across = [axis for axis, is_along in enumerate(chosen) if not is_along]
    inside = [axis for axis, is_along in enumerate(chosen) if is_along]
    order = _transposed(cut, across + inside)
    if devices:
        order = [_devices(devices)[place] for place in order]
    size = math.prod(cut[axis] for axis in inside)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _devices(text: str) -> list[int]:
    """`0,2,1,3`, or `[2,2]T(1,0)`, which is the same."""
    reshaped = re.fullmatch(_RESHAPED, text)
    if not reshaped:
        return _numbers(text)
    sizes = _numbers(reshaped[1])
    return _transposed(sizes, _numbers(reshaped[2]) if reshaped[2] else list(range(len(sizes))))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _transposed(sizes: list[int], axes: list[int]) -> list[int]:
    """0, 1, 2, … in an array of these sizes, read off after its axes are put in another order."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    order = [0]
    for axis in axes:
        order = [start + step * strides[axis] for start in order for step in range(sizes[axis])]
    return order
