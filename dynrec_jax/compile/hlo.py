"""Optimised HLO as text, read: computations, instructions, their arrays, and how often each instruction runs.

Only what the numbers of `dynrec compile` need is read: https://openxla.org/xla/operation_semantics names the
operations, and the text is what XLA prints of a module (`Compiled.as_text()`, or a dump).
"""

import math
import re
from typing import NamedTuple

BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "c64": 64,
    "c128": 128,
}  # of other types the number is in the name
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Array(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      dtype: as HLO writes it, "f32".
      shape: its sizes.
      bytes: that it takes on a device: tiles of its layout are filled up.
      space: number of the memory that it lies in, 0 for the device's own; on TPUs 1 is VMEM.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    space: int

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: such as "all-gather".
      arrays: of the result; of a tuple, all that are in it.
      inside: text between the parentheses: a constant's value, a parameter's number, otherwise the operands.
      attributes: text behind the operands.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    inside: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, named scopes included; may be empty."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'").replace('\\"', '"') if found else ""

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations that it runs, by role, such as {"body": [...], "condition": [...]}."""
        result: dict[str, list[str]] = {}
        for role, name, several in _CALLED.findall(self.attributes):
            names = re.findall(r"%?([\w.\-]+)", several) if several else [name]
            result.setdefault(role or "branches", []).extend(names)
        return result


class Computation(NamedTuple):
    """Instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in reversed(self.instructions.values()) if i.is_root)


class Module(NamedTuple):
    """A program: computations by name, and which of them is the program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The module of an HLO text.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := _COMPUTATION.match(line):
                current = Computation(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            computations[current.name] = current
            current = None
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("not an HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    inside, attributes = rest[opening + 1 : closing], rest[closing + 1 :].lstrip(", ")
    return Instruction(head[2], opcode, arrays(rest[:end]), inside, attributes, bool(head[1]))


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at a place is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[opening : opening + 80]!r}")


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    return tuple(_array(*found) for found in _ARRAY.findall(text))


def _array(dtype: str, sizes: str, minor: str, layout: str) -> Array:
    # "<=5" is a size that may be less at run time: the most counts.
    shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    bits = BITS.get(dtype) if dtype in BITS else int(re.sub(r"^\D+(\d+).*", r"\1", dtype))
    space = re.search(r"S\((\d+)\)", layout)
    held = list(shape)
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        order = [int(axis) for axis in minor.split(",") if axis]
        # The last size of a tile belongs to the axis that is first in `minor_to_major`.
        for axis, size in zip(order, reversed([int(size) for size in tile[1].split(",")]), strict=False):
            held[axis] = -(-held[axis] // size) * size
    return Array(dtype, shape, math.prod(held) * (bits or 0) // 8, int(space[1]) if space else 0)


def fused(module: Module) -> set[str]:
    """Names of computations that are bodies of fusions: their instructions write nothing to memory by themselves."""
    return {
        name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion"
        for name in instruction.called.get("calls", [])
    }
