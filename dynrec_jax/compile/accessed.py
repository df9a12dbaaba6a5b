"""Bytes that a program reads from and writes to a device's memory, read from its optimised HLO.

XLA's own estimate counts the body of a loop once. Here loops multiply; otherwise the rules are the same: an instruction
reads its operands and writes its result, a fusion is one instruction, and of an array of which only rows or a window
are read or changed, those count.
"""

from dynrec_jax.compile.hlo import Array, Computation, Instruction, Module, fused
from dynrec_jax.compile.loops import Trips, walk

# They name memory, or hand a name on, and touch none of it.
NOTHING = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "iota",
    ),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"),
    *(
        "copy-done",
        "async-done",
        "async-update",
        "send-done",
        "recv-done",
        "all-gather-done",
        "all-reduce-done",
    ),
    *("collective-permute-done", "async-start"),
}
WINDOWS = ("dynamic-slice", "gather", "slice")
UPDATES = ("dynamic-update-slice", "scatter")
SAME = ("bitcast", "reshape", "copy", "transpose")  # inside of a fusion: another name for the same elements


def bytes_accessed(module: Module, trips: Trips) -> float:
    """Of one execution on one device; arrays in a fast memory of its own (VMEM on TPUs) are left out."""
    bodies = fused(module)
    total = 0.0
    for instruction, computation, times in walk(module, trips):
        if computation.name not in bodies and instruction.opcode not in NOTHING:
            total += times * _touched(instruction, computation, module)
    return total


def _touched(instruction: Instruction, computation: Computation, module: Module) -> float:
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        return _of_fusion(instruction, operands, module)
    if instruction.opcode in UPDATES:
        return 2 * _updates(instruction, computation)
    if instruction.opcode in WINDOWS:
        return 2 * _size(instruction)
    written = instruction.arrays[:1] if instruction.opcode == "copy-start" else instruction.arrays
    return sum(map(_size, operands)) + sum(map(_held, written))


def _of_fusion(instruction: Instruction, operands: list[Instruction], module: Module) -> float:
    body = module.computations[instruction.called["calls"][0]]
    parameters = {int(each.inside): each for each in body.instructions.values() if each.opcode == "parameter"}
    read = sum(
        min(_size(operand), _read(parameters[number].name, body, module))
        for number, operand in enumerate(operands)
    )
    return read + _written(body.root, body, module)


def _read(name: str, body: Computation, module: Module) -> float:
    """Bytes of a parameter of a fusion that its body reads: windows where it reads nothing else."""
    total = 0.0
    for user in body.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in SAME:
            total += _read(user.name, body, module) if not user.is_root else _size(user)
        elif user.opcode in WINDOWS and user.operands[0] == name:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode in UPDATES and user.operands[0] == name:
            total += _updates(user, body)
        elif user.opcode == "fusion":
            inner = module.computations[user.called["calls"][0]]
            own = [each for each in inner.instructions.values() if each.opcode == "parameter"]
            total += sum(
                _read(each.name, inner, module) for each in own if user.operands[int(each.inside)] == name
            )
        else:
            return float("inf")
    return total


def _written(root: Instruction, body: Computation, module: Module) -> float:
    """Bytes that a fusion writes: of an update in place, what is new."""
    if root.opcode == "tuple":
        return sum(_written(body.instructions[name], body, module) for name in root.operands)
    if root.opcode in SAME and root.operands:
        below = body.instructions[root.operands[0]]
        return _written(below, body, module) if below.opcode in UPDATES else _size(root)
    if root.opcode in UPDATES:
        return _updates(root, body)
    return _size(root)


def _updates(instruction: Instruction, computation: Computation) -> float:
    """Bytes of what an update puts into an array: (array, update, where…), or (arrays…, where, updates…)."""
    operands = instruction.operands
    names = (
        operands[1:2] if instruction.opcode == "dynamic-update-slice" else operands[len(operands) // 2 + 1 :]
    )
    return sum(array.bytes for name in names for array in computation.instructions[name].arrays)


def _size(instruction: Instruction) -> int:
    return sum(map(_held, instruction.arrays))


def _held(array: Array) -> int:
    return array.bytes if array.space == 0 else 0
