"""What a program allocates: from the compiler's dump, on text and on tiny programs whose answer is known."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from dynrec_jax.compile import buffers, hlo
from dynrec_jax.compile.machines import GPUS
from dynrec_jax.compile.measure import Compiled, Program, compile_program, memory_numbers
from dynrec_jax.compile.topology import Target

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
 value: <3 table.1 @0> (size=4096,offset=0): f32[32,32]{1,0}
 value: <9 scatter.2 @0> (size=4096,offset=0): f32[32,32]{1,0}
allocation 1: size 512, maybe-live-out:
 value: <4 out.1 @0> (size=512,offset=0): f32[128]{0}
allocation 2: size 64, constant:
 value: <5 constant.1 @0> (size=64,offset=0): f32[16]{0}
allocation 3: size 24, output shape is |(f32[32,32], f32[128])|, maybe-live-out:
 value: <6 tuple.1{} @0> (size=24,offset=0): (f32[32,32]{1,0}, f32[128]{0})
allocation 4: size 4, thread-local:
 value: <7 add.1 @0> (size=4,offset=0): f32[]
allocation 5: size 3072, preallocated-temp:
 value: <10 while.1{1} (phi) @0> (size=1024,offset=0): f32[256]{0}
 value: <11 made.1 @0> (size=1024,offset=0): f32[256]{0}
 value: <12 other.1 @0> (size=1000,offset=0): s32[250]{0}
 value: <13 made.2{0} @0> (size=2048,offset=1024): f32[512]{0}
allocation 6: size 8192, color 1, preallocated-temp:
 value: <14 fast.1 @1> (size=8192,offset=0): f32[2048]{0:T(1024)S(1)}
 value: <15 made.1 @1> (size=4,offset=0): f32[]{:T(128)S(1)}
Total bytes used: 1
"""
MODULE = """ENTRY %main (x: f32[]) -> f32[] {
  %made.1 = f32[256]{0} negate(%x), metadata={op_name="jit(f)/neg"}
  %made.2 = (f32[512]{0}, s32[]) fusion(%x), calls=%g
  ROOT %x = f32[] parameter(0)
}
"""


def test_allocations_are_read_and_sorted():
    allocations = buffers.parse(ASSIGNMENT)
    assert buffers.sizes(allocations) == buffers.Sizes(
        arguments=4096, outputs=4096 + 512 + 24, aliased=4096, temporary=3072 + 8192
    )
    found = buffers.largest(allocations, hlo.parse(MODULE), 10, {buffers.OWN})
    told = [(str(each.array), each.array.bytes, each.op) for each in found]
    # Neither the argument nor what is updated in its place; a name in a loop only where nothing else makes it.
    assert told == [
        ("f32[512]", 2048, "fusion"),
        ("f32[256]", 1024, "jit(f)/neg"),
        ("s32[250]", 1000, "other.1"),
        ("f32[128]", 512, "out.1"),
    ]
    (fast, _) = buffers.largest(allocations, hlo.parse(MODULE), 10, {buffers.FAST})
    assert (str(fast.array), fast.op) == ("f32[2048]", "fast.1")
    assert len(buffers.largest(allocations, hlo.parse(MODULE), 2, {buffers.OWN})) == 2


def target() -> Target:
    machine = GPUS["h100"]
    return Target("h100:1", machine, jax.devices()[:1], 1, True, machine.memory)


def compiled(function: Any, *shapes: tuple[int, ...], donated: bool = False) -> Compiled:
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) > 1 else jnp.int32) for shape in shapes]
    lowered = jax.jit(function, donate_argnums=(0,) if donated else ()).lower(*structs)
    return compile_program(Program("tiny", lowered, None, "float32", {}), target())


TABLE = 1000, 64


def shapes_of(found: Compiled) -> list[str]:
    return [str(each.array) for each in buffers.largest(found.allocations, found.module, 20, {buffers.OWN})]


def update(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table.at[ids].add(1.0)


def test_a_table_updated_in_place_is_no_second_table():
    assert "f32[1000,64]" not in shapes_of(compiled(update, TABLE, (10,), donated=True))


def test_a_table_that_is_not_donated_and_a_copy_are_second_tables():
    assert "f32[1000,64]" in shapes_of(compiled(update, TABLE, (10,)))

    def keeps_the_old(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = update(table, ids)
        return new, jnp.sort(table, axis=0)[ids]

    found = shapes_of(compiled(keeps_the_old, TABLE, (10,), donated=True))
    assert found[0] == "f32[1000,64]"


def test_the_sizes_are_those_that_the_compiler_states():
    found = compiled(
        lambda table, ids: (update(table, ids), (table @ table.T)[ids]), TABLE, (10,), donated=True
    )
    m, own = found.memory, buffers.sizes(found.allocations)
    assert own.arguments == m.argument_size_in_bytes == 1000 * 64 * 4 + 10 * 4
    assert own.outputs == m.output_size_in_bytes
    assert own.aliased == m.alias_size_in_bytes
    assert own.temporary == m.temp_size_in_bytes
    assert own.temporary >= 1000 * 1000 * 4


def numbers(memory: int, **changes: int) -> dict[str, Any]:
    stated = {
        "argument_size_in_bytes": 100, "output_size_in_bytes": 80, "alias_size_in_bytes": 60,
        "temp_size_in_bytes": 30, "peak_memory_in_bytes": 140, "generated_code_size_in_bytes": 7, **changes,
    }  # fmt: skip
    return memory_numbers(Compiled(SimpleNamespace(**stated), hlo.parse(MODULE), [], ""), memory)


def test_the_larger_figures_count():
    assert numbers(200) == {
        "fits": True, "argument_bytes": 100, "temporary_bytes": 30, "output_bytes": 80, "aliased_bytes": 60,
        "code_bytes": 7, "peak_bytes": 157, "memory_bytes": 200, "room_bytes": 43,
    }  # fmt: skip
    # A peak that counts what lies in fast memory, which the temporary memory does not.
    fast = numbers(200, peak_memory_in_bytes=190)
    assert (fast["temporary_bytes"], fast["peak_bytes"], fast["fits"]) == (70, 197, True)
    assert not numbers(156)["fits"]
    assert numbers(157)["fits"]


def test_what_the_compiler_refuses_does_not_fit_and_has_numbers_all_the_same():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.00K of 15.75K hbm. Exceeded …"
    refused = Compiled(None, hlo.parse(MODULE), buffers.parse(ASSIGNMENT), said)
    found = memory_numbers(refused, 2**40)
    assert not found["fits"]
    assert (found["argument_bytes"], found["temporary_bytes"]) == (4096, 11264)
    assert found["peak_bytes"] == 18 * 1024, "what the compiler says, where it is more than the sum"
    other = Compiled(None, hlo.parse(MODULE), buffers.parse(ASSIGNMENT), "the total memory (1.00G) exceeds")
    assert memory_numbers(other, 2**40)["peak_bytes"] == 4096 + 512 + 24 + 11264
