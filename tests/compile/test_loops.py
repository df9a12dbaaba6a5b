"""How often loops run: as XLA notes it, as the loop's condition says, or as its scope is expected to."""

import jax
import jax.numpy as jnp
import pytest

from dynrec_jax.compile import hlo
from dynrec_jax.compile.loops import trip_count, walk
from dynrec_jax.compile.measure import uncounted
from dynrec_jax.compile.scopes import direct_scope, expected_trips

# A loop as TPUs' compiler writes it; what is told in braces is filled in.
LOOP = """HloModule f

%body (p.1: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p.1 = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %x = f32[8]{0} get-tuple-element(%p.1), index=1
  %n = s32[] get-tuple-element(%p.1), index=2
  %stride = s32[] constant(STRIDE)
  %next = s32[] STEP
  %y = f32[8]{0} all-reduce(%x), replica_groups={}
  ROOT %t.1 = (s32[], f32[8]{0}, s32[]) tuple(%next, %y, HANDED_ON)
}

%add_fused (a.1: s32[], a.2: s32[]) -> s32[] {
  %a.1 = s32[] parameter(0)
  %a.2 = s32[] parameter(1)
  ROOT %a.3 = s32[] add(%a.2, %a.1)
}

%compare_fused (c.1: s32[], c.2: s32[]) -> pred[] {
  %c.1 = s32[] parameter(0)
  %c.2 = s32[] parameter(1)
  ROOT %c.3 = pred[] compare(%c.2, %c.1), direction=LT
}

%condition (p.2: (s32[], f32[8], s32[])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}, s32[]) parameter(0)
  %k = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[] LIMIT
  ROOT %go = pred[] GO, metadata={op_name="jit(f)/rounds/while/cond/lt"}
}

ENTRY %main (q: f32[8], m: s32[]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %m = s32[] parameter(1)
  %zero = s32[] constant(2)
  %copy.1 = s32[]{:S(6)} copy(%zero)
  %copy.2 = s32[] copy(%copy.1)
  %twenty = s32[] constant(20)
  %begin = (s32[], f32[8]{0}, s32[]) tuple(%copy.2, %q, THIRD)
  %w = (s32[], f32[8]{0}, s32[]) while(%begin), condition=%condition, body=%bodyNOTED
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}
"""
PLAIN = {
    "STRIDE": "3", "STEP": "add(%i, %stride)", "HANDED_ON": "%n", "LIMIT": "constant(20)",
    "GO": "compare(%k, %limit), direction=LT", "THIRD": "%twenty", "NOTED": "",
}  # fmt: skip


def module(**changes: str) -> hlo.Module:
    text = LOOP
    for name, value in {**PLAIN, **changes}.items():
        text = text.replace(name, value)
    return hlo.parse(text)


def found(read: hlo.Module) -> int | None:
    main = read.computations[read.entry]
    return trip_count(main.instructions["w"], main, read)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 6),  # 2, 5, 8, 11, 14, 17
        ({"LIMIT": "constant(21)"}, 7),  # and 20
        ({"LIMIT": "constant(2)"}, 0),
        ({"LIMIT": "get-tuple-element(%p.2), index=2"}, 6),
        ({"STEP": "fusion(%i, %stride), kind=kLoop, calls=%add_fused"}, 6),
        ({"GO": "fusion(%limit, %k), kind=kLoop, calls=%compare_fused"}, 6),
        ({"NOTED": ', backend_config={"known_trip_count":{"n":"41"}}'}, 41),
    ],
)
def test_what_the_text_tells(changes: dict[str, str], times: int):
    assert found(module(**changes)) == times


@pytest.mark.parametrize(
    "changes",
    [
        {"LIMIT": "get-tuple-element(%p.2), index=2", "THIRD": "%m"},  # an argument of the program
        {"LIMIT": "get-tuple-element(%p.2), index=2", "HANDED_ON": "%next"},  # the limit moves
        {"GO": "compare(%k, %limit), direction=NE"},
        {"STEP": "multiply(%i, %stride)"},
        {"STRIDE": "-1"},
    ],
)
def test_what_the_text_does_not_tell(changes: dict[str, str]):
    assert found(module(**changes)) is None


def times_of(read: hlo.Module, trips: dict[str, float], opcode: str) -> list[float]:
    return [times for each, _, times in walk(read, expected_trips(trips)) if each.opcode == opcode]


def test_loops_multiply_and_unknown_ones_go_by_their_scope():
    assert times_of(module(), {}, "all-reduce") == [6]
    unknown = module(LIMIT="get-tuple-element(%p.2), index=2", THIRD="%m")
    assert times_of(unknown, {}, "all-reduce") == [1]
    # The loop itself has no name here; its condition has.
    assert times_of(unknown, {"rounds": 2.5}, "all-reduce") == [2.5]
    assert times_of(unknown, {"round": 2.5}, "all-reduce") == [1]
    assert uncounted(unknown, {"rounds": 2.5}) == []
    assert uncounted(unknown, {"round": 2.5}) == ["jit(f)/rounds/while"], "what counts once is said"
    assert uncounted(module(), {}) == []


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(f)/rounds/while", "rounds"),
        ("jit(f)/transpose(jvp(rounds))/shard_map/while", "rounds"),
        ("jit(f)/other/rounds/while", "rounds"),
        ("jit(f)/rounds/other/while", "other"),
        ("jit(f)/rounds/while/body/while", None),
        ("jit(f)/rounds_of/while", None),
        ("rounds", None),
    ],
)
def test_a_loop_is_known_by_the_scope_right_above_it(path: str, scope: str | None):
    assert direct_scope(path, ("rounds", "other")) == scope


def test_a_real_program_is_walked_loop_by_loop():
    """The compiler's own text: a scan of 3 in a loop of 5, and a branch."""

    def f(x: jax.Array, n: jax.Array) -> jax.Array:
        def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(c) @ c, None

        def outer(_: jax.Array, c: jax.Array) -> jax.Array:
            return jax.lax.scan(inner, c, None, 3)[0]

        x = jax.lax.fori_loop(0, 5, outer, x)
        with jax.named_scope("rounds"):
            return jax.lax.fori_loop(0, n, lambda _, c: c @ c, x)

    compiled = jax.jit(f).lower(jnp.eye(16), 3).compile()
    text = hlo.parse(compiled.as_text())
    dots = [
        times
        for each, _, times in walk(text, expected_trips({"rounds": 7.0}))
        if each.opcode == "dot" or "dot" in each.attributes.split("custom_call_target=")[-1][:40]
    ]
    assert sorted(dots) == [7.0, 15.0]
