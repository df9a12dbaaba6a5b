"""The compiler's buffer assignment, as XLA dumps it: what a program allocates on a device, and for which arrays."""

import re
from collections.abc import Collection
from typing import NamedTuple

from dynrec_jax.compile.hlo import Array, Module, arrays

OWN, FAST = 0, 1  # numbers of memories: the device's own (HBM), and VMEM of TPUs
_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(.*):$")
_VALUE = re.compile(
    r"^ value: <\d+ ([^\s{]+)(\{[\d,]*\})?( \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)$"
)


class Value(NamedTuple):
    """One array that lies in an allocation for some time.

    Attributes:
      name: of the instruction that makes it.
      phi: whether it is only the name, in a loop or a branch, of what others make.
      offset: bytes from the allocation's start.
      size: bytes.
      array: its type; None of a tuple of addresses.
    """

    name: str
    phi: bool
    offset: int
    size: int
    array: Array | None


class Allocation(NamedTuple):
    """Memory that a program holds on a device.

    Attributes:
      size: bytes.
      space: number of the memory, `OWN`, `FAST`, or one of a few bytes.
      kinds: words on it: "parameter", "maybe-live-out", "constant", "thread-local", "preallocated-temp".
      values: the arrays in it, which may follow each other in one place.
    """

    size: int
    space: int
    kinds: frozenset[str]
    values: list[Value]


class Buffer(NamedTuple):
    """An array that a program allocates beside its arguments.

    Attributes:
      array: type, shape and bytes.
      op: where in the traced program it is made, or the operation's name where that is not known.
    """

    array: Array
    op: str


def parse(text: str) -> list[Allocation]:
    """The allocations of a `…-buffer-assignment.txt`."""
    result: list[Allocation] = []
    for line in text.splitlines():
        if head := _ALLOCATION.match(line):
            color = re.search(r"color (\d+)", head[3])
            kinds = re.findall(r"parameter|maybe-live-out|constant|thread-local|preallocated-temp", head[3])
            result.append(Allocation(int(head[2]), int(color[1]) if color else 0, frozenset(kinds), []))
        elif result and (found := _VALUE.match(line)):
            name, _, phi, _, size, offset, kind = found.groups()
            array = None if kind.startswith("(") else next(iter(arrays(kind)), None)
            result[-1].values.append(Value(name, bool(phi), int(offset), int(size), array))
    return result


class Sizes(NamedTuple):
    """Bytes of a device's memory.

    Attributes:
      arguments: that the program is given.
      outputs: that it leaves, those that take the place of arguments included.
      aliased: outputs that take the place of arguments.
      temporary: of arrays in between, those in the device's fast memory included.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int


def sizes(allocations: list[Allocation]) -> Sizes:
    """What the allocations come to; constants and what code holds for itself are left out."""

    def total(*kinds: str) -> int:
        return sum(each.size for each in allocations if each.kinds.issuperset(kinds))

    return Sizes(
        arguments=total("parameter"),
        outputs=total("maybe-live-out"),
        aliased=total("parameter", "maybe-live-out"),
        temporary=total("preallocated-temp"),
    )


def largest(
    allocations: list[Allocation], module: Module, number: int, spaces: Collection[int]
) -> list[Buffer]:
    """The largest arrays beside arguments and what is updated in their place, largest first, each once a place.

    Args:
      allocations: of the program.
      module: the same program, which tells where an array comes from.
      number: how many at most.
      spaces: numbers of the memories that they lie in.
    """
    instructions = {
        name: instruction
        for computation in module.computations.values()
        for name, instruction in computation.instructions.items()
    }
    found: dict[tuple[int, int, str], Buffer] = {}
    for index, allocation in enumerate(allocations):
        if allocation.space not in spaces or allocation.kinds & {"parameter", "constant", "thread-local"}:
            continue
        for value in sorted(allocation.values, key=lambda value: value.phi):
            if value.array is None:
                continue
            array = value.array._replace(bytes=value.size)
            instruction = instructions.get(value.name)
            told = "" if instruction is None else instruction.op_name or instruction.opcode
            found.setdefault((index, value.offset, str(array)), Buffer(array, told or value.name))
    return sorted(found.values(), key=lambda buffer: -buffer.array.bytes)[:number]
