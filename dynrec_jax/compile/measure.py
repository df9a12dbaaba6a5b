"""The numbers of one compiled program, each for one device, from what the compiler says and dumps."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dynrec_jax.compile import buffers, hlo
from dynrec_jax.compile.accessed import bytes_accessed
from dynrec_jax.compile.collectives import Traffic, traffic
from dynrec_jax.compile.flops import product_flops
from dynrec_jax.compile.loops import trip_count, walk
from dynrec_jax.compile.scopes import direct_scope, expected_trips, loop_path
from dynrec_jax.compile.topology import Target
from dynrec_jax.errors import MachineError, one_line
from dynrec_jax.train.peak import stated_peak

LISTED = 20  # largest arrays
ASSIGNMENT = "after_optimizations-buffer-assignment.txt"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      name: for people.
      lowered: `jax.stages.Lowered`, for the target's devices.
      jaxpr: the same program as traced.
      dtype: of its matrix products.
      trips: by named scope, how often loops run of which the program does not tell; see `scopes`.
    """

    name: str
    lowered: Any
    jaxpr: Any
    dtype: str
    trips: Mapping[str, float]


class Compiled(NamedTuple):
    """What came of compiling.

    Attributes:
      memory: the compiler's own figures; None where the program does not fit.
      module: the optimised program.
      allocations: its buffer assignment.
      reason: why it does not fit, in the compiler's words; empty where it does.
    """

    memory: Any
    module: hlo.Module
    allocations: list[buffers.Allocation]
    reason: str


def compile_program(program: Program, target: Target) -> Compiled:
    """Compiles for a target, and reads what the compiler dumps of it.

    Raises:
      MachineError: the compiler failed, and not for lack of the devices' memory.
    """
    with tempfile.TemporaryDirectory(prefix="dynrec-compile-") as folder:
        options: dict[str, Any] = {"xla_dump_to": folder}
        if target.simulated:
            # Memory is laid out before code is generated, so the code need not be fast.
            options["xla_backend_optimization_level"] = 0
        memory, reason = None, ""
        try:
            memory = program.lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            reason = one_line(error)
            if "RESOURCE_EXHAUSTED" not in reason:
                raise MachineError(f"{program.name}: the compiler failed: {reason[:500]}") from None
        # The compiler may dump a program several times, numbered, before it is done.
        dumped = sorted(Path(folder).glob(f"*{ASSIGNMENT}"))
        if not dumped:
            raise MachineError(
                f"{program.name}: the compiler left no {ASSIGNMENT} to read; {reason[:500] or 'use jax 0.10.2'}"
            )
        module = hlo.parse(
            dumped[-1].with_name(dumped[-1].name.replace("-buffer-assignment", "")).read_text()
        )
        return Compiled(memory, module, buffers.parse(dumped[-1].read_text()), reason[:500])


def measure(program: Program, target: Target, slices: Sequence[int]) -> dict[str, Any]:
    """Compiles a program and returns its numbers, as `dynrec compile --out` writes them.

    `largest_arrays` lie in the device's memory; those that a TPU holds in its fast memory alone (VMEM, 128 MiB on v5e),
    where the compiler also keeps what it has read of arguments, are in `largest_fast_arrays`.

    Args:
      program: see `Program`.
      target: what it is compiled for.
      slices: the slice of each device in the order of the program's device assignment.
    """
    compiled = compile_program(program, target)
    trips = expected_trips(program.trips)
    sent = traffic(compiled.module, trips, slices)
    flops = product_flops(program.jaxpr, len(slices), program.trips)
    accessed = bytes_accessed(compiled.module, trips)

    def listed(space: int) -> list[dict[str, Any]]:
        found = buffers.largest(compiled.allocations, compiled.module, LISTED, {space})
        return [{"shape": str(each.array), "bytes": each.array.bytes, "op": each.op} for each in found]

    return {
        **memory_numbers(compiled, target.memory),
        "collective_bytes": {"within": _whole(sent.within), "between": _whole(sent.between)},
        "wire_bytes": {"within": round(sent.wire_within), "between": round(sent.wire_between)},
        "flops": round(flops),
        "accessed_bytes": round(accessed),
        "seconds": seconds(flops, accessed, sent, target, program.dtype),
        "largest_arrays": listed(buffers.OWN),
        "largest_fast_arrays": listed(buffers.FAST),
        "loops_counted_once": uncounted(compiled.module, program.trips),
        "reason": compiled.reason,
    }


def memory_numbers(compiled: Compiled, memory: int) -> dict[str, Any]:
    """Bytes by kind, and whether they fit into a device's `memory`.

    `temporary_bytes` is the larger of two figures: what the compiler calls temporary, and its peak beside arguments
    and outputs, which counts arrays in the device's fast memory as well. `peak_bytes` is the larger of the compiler's
    peak and arguments + outputs + temporary memory, an output in the place of an argument counted once, and the
    program's own code on top. A program that the compiler refuses does not fit, whatever the sum says.
    """
    found = buffers.sizes(compiled.allocations)
    if compiled.memory is None:
        arguments, outputs, aliased, temporary = found
        peak, code = max(arguments + outputs - aliased + temporary, refused_bytes(compiled.reason)), 0
    else:
        m = compiled.memory
        arguments, outputs = m.argument_size_in_bytes, m.output_size_in_bytes
        aliased, code = m.alias_size_in_bytes, m.generated_code_size_in_bytes
        held = arguments + outputs - aliased
        temporary = max(m.temp_size_in_bytes, m.peak_memory_in_bytes - held)
        peak = max(m.peak_memory_in_bytes, held + m.temp_size_in_bytes) + code
    return {
        "fits": compiled.memory is not None and peak <= memory,
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "output_bytes": outputs,
        "aliased_bytes": aliased,
        "code_bytes": code,
        "peak_bytes": peak,
        "memory_bytes": memory,
        "room_bytes": memory - peak,
    }


def refused_bytes(reason: str) -> int:
    """The memory that a program needs, of the compiler's message that it does not fit; 0 where it does not tell.

    The message says "Used 16.5G of 15.75G hbm" or "HLO temporaries (16.5G) exceeds available HBM", by its stage.
    """
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)", reason)
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def seconds(flops: float, accessed: float, sent: Traffic, target: Target, dtype: str) -> dict[str, Any]:
    """Expected seconds of one execution, from stated peaks, and what they are made of.

    Products and memory overlap, so the slower of the two counts; the networks are taken not to overlap with them. No
    program reaches all of a peak, and nothing is counted for the time until a message arrives: it takes longer.
    """
    machine = target.machine
    products = stated_peak(machine.kind, dtype)
    if products is None:
        raise ValueError(f"{machine.kind}: no peak of products is stated for it")
    terms = {
        "compute": flops / products,
        "memory": accessed / machine.memory_rate,
        "network_within": sent.wire_within / machine.link_rate,
        "network_between": sent.wire_between / machine.network_rate,
    }
    expected = max(terms["compute"], terms["memory"]) + terms["network_within"] + terms["network_between"]
    peaks = {
        f"flops_{dtype}": products,
        "memory": machine.memory_rate,
        "network_within": machine.link_rate,
        "network_between": machine.network_rate,
    }
    return {"expected": expected, **terms, "peaks": peaks}


def uncounted(module: hlo.Module, trips: Mapping[str, float]) -> list[str]:
    """Loops of which nobody knows how often they run: what is in them counts once."""
    paths = {
        loop_path(loop, module) or loop.name
        for loop, computation, _ in walk(module, expected_trips(trips))
        if loop.opcode == "while" and trip_count(loop, computation, module) is None
    }
    return sorted(path for path in paths if direct_scope(path, trips) is None)


def _whole(by_kind: dict[str, float]) -> dict[str, int]:
    return {kind: round(size) for kind, size in sorted(by_kind.items())}
