"""How often the loops of an optimised HLO program run, where its text tells."""

import re
from collections.abc import Callable, Iterator

from dynrec_jax.compile.hlo import Computation, Instruction, Module

PASSED_ON = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape")
State = Callable[[int], int | None]  # of a loop: the value of an element


# How often a loop runs whose text does not tell: by the loop and the computation it is in.
Trips = Callable[[Instruction, Module], float]


def walk(module: Module, trips: Trips) -> Iterator[tuple[Instruction, Computation, float]]:
    """Everything that runs, each instruction with its computation and how often it runs.

    Loops multiply. All branches of a conditional count, which is the most that it can be. What is inside of fusions
    is walked as well; those who want instructions that write to memory skip computations that `fused` names.
    """

    def inside(name: str, times: float) -> Iterator[tuple[Instruction, Computation, float]]:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            if instruction.opcode in (
                "reduce",
                "sort",
                "scatter",
                "map",
                "reduce-window",
                "select-and-scatter",
            ):
                continue  # a function of scalars
            called = instruction.called
            if instruction.opcode == "while":
                number: float | None = trip_count(instruction, computation, module)
                number = trips(instruction, module) if number is None else number
                yield from inside(called["body"][0], times * number)
                continue
            for role, names in called.items():
                # `to_apply` is a function of scalars too, but where a call or an asynchronous operation has it.
                if role != "to_apply" or instruction.opcode in ("call", "async-start"):
                    for each in names:
                        yield from inside(each, times)

    yield from inside(module.entry, 1.0)


def trip_count(loop: Instruction, computation: Computation, module: Module) -> int | None:
    """How often a loop of a computation runs; None where that is known at run time alone.

    XLA notes what it knows on CPU and GPU. On TPUs the loop's condition is read: a counter that begins at a constant,
    goes up by a constant and is compared with a constant. What the loop hands on unchanged is as constant as it was.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    called = loop.called
    condition, body = module.computations[called["condition"][0]], module.computations[called["body"][0]]
    compare, arguments = _opened(condition.root, condition, module)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = arguments
    place = _element_read(counter)
    begin = computation.instructions[loop.operands[0]]
    if place is None or begin.opcode != "tuple" or body.root.opcode != "tuple":
        return None

    def at_start(element: int) -> int | None:
        return _value(computation.instructions[begin.operands[element]], computation, module, lambda _: None)

    def unchanged(element: int) -> int | None:
        after = body.instructions[body.root.operands[element]]
        return at_start(element) if _element_read(after) == element else None

    first, end = at_start(place), _value(limit, condition, module, unchanged)
    if first is None or end is None:
        return None
    step = body.instructions[body.root.operands[place]]
    second = _value(step, body, module, lambda element: first if element == place else unchanged(element))
    if second is None or second <= first:
        return None
    return max(0, -(-(end - first) // (second - first)))


def _element_read(instruction: Instruction) -> int | None:
    """The element of a loop's state that is read, where an instruction does nothing else."""
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if instruction.opcode == "get-tuple-element" and found else None


def _opened(
    instruction: Instruction, computation: Computation, module: Module
) -> tuple[Instruction, list[Instruction]]:
    """An operation and what it reads; of a fusion, its last operation and what that reads outside of it."""
    arguments = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode != "fusion":
        return instruction, arguments
    inner = module.computations[instruction.called["calls"][0]]

    def outside(each: Instruction) -> Instruction:
        return arguments[int(each.inside)] if each.opcode == "parameter" else each

    return inner.root, [outside(inner.instructions[name]) for name in inner.root.operands]


def _value(instruction: Instruction, computation: Computation, module: Module, state: State) -> int | None:
    """The integer that an instruction gives, as far as constants, sums and a loop's state tell."""
    if instruction.opcode == "constant":
        return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None
    if (element := _element_read(instruction)) is not None:
        read = computation.instructions[instruction.operands[0]]
        return state(element) if read.opcode == "parameter" else None
    operation, arguments = _opened(instruction, computation, module)
    if operation.opcode not in (*PASSED_ON, "add"):
        return None
    values = []
    for each in arguments if operation.opcode == "add" else arguments[:1]:
        # An operand inside of a fusion that is no parameter of it is looked at no further than a constant.
        known = each.opcode == "constant" or each.name in computation.instructions
        value = _value(each, computation, module, state) if known else None
        if value is None:
            return None
        values.append(value)
    return sum(values)
