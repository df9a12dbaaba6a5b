"""Bytes of memory read and written: whole arrays, windows of arrays, and loops."""

import jax
import jax.numpy as jnp
import pytest

from dynrec_jax.compile import hlo
from dynrec_jax.compile.accessed import bytes_accessed
from dynrec_jax.compile.scopes import expected_trips

FUSED = """%rows (t: f32[1000,8], i: s32[4]) -> f32[4,8] {
  %t = f32[1000,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %t.same = f32[1000,8]{1,0} bitcast(%t)
  %g = f32[4,8]{1,0} gather(%t.same, %i)
  ROOT %n = f32[4,8]{1,0} negate(%g)
}

%all (t.1: f32[1000,8]) -> f32[1000,8] {
  %t.1 = f32[1000,8]{1,0} parameter(0)
  ROOT %n.1 = f32[1000,8]{1,0} negate(%t.1)
}

%update (t.2: f32[1000,8], u: f32[4,8], z: s32[]) -> f32[1000,8] {
  %t.2 = f32[1000,8]{1,0} parameter(0)
  %u = f32[4,8]{1,0} parameter(1)
  %z = s32[] parameter(2)
  %u.1 = f32[4,8]{1,0} negate(%u)
  ROOT %d = f32[1000,8]{1,0} dynamic-update-slice(%t.2, %u.1, %z, %z)
}

%outer (t.3: f32[1000,8], i.3: s32[4]) -> f32[4,8] {
  %t.3 = f32[1000,8]{1,0} parameter(0)
  %i.3 = s32[4]{0} parameter(1)
  ROOT %inner = f32[4,8]{1,0} fusion(%t.3, %i.3), kind=kLoop, calls=%rows
}
"""
ARGUMENTS = """  %x = f32[1000,8]{1,0} parameter(0)
  %k = s32[4]{0} parameter(1)
  %v = f32[4,8]{1,0} parameter(2)
  %c = s32[] constant(0)
"""
TABLE, ROWS, IDS = 32_000, 128, 16


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("f32[1000,8]{1,0} negate(%x)", 2 * TABLE),
        ("f32[1000,8]{1,0} add(%x, %x)", 3 * TABLE),
        ("f32[4,8]{1,0} gather(%x, %k)", 2 * ROWS),
        ("f32[1000,8]{1,0} scatter(%x, %k, %v), to_apply=%f", 2 * ROWS),
        ("f32[1000,8]{1,0} dynamic-update-slice(%x, %v, %c, %c)", 2 * ROWS),
        ("f32[1000,8]{1,0} bitcast(%x)", 0),
        ("f32[4,8]{1,0} fusion(%x, %k), kind=kLoop, calls=%rows", 2 * ROWS + IDS),
        ("f32[1000,8]{1,0} fusion(%x), kind=kLoop, calls=%all", 2 * TABLE),
        ("f32[1000,8]{1,0} fusion(%x, %v, %c), kind=kLoop, calls=%update", 3 * ROWS + 4),
        ("f32[4,8]{1,0} fusion(%x, %k), kind=kLoop, calls=%outer", 2 * ROWS + IDS),
        # Into the fast memory of a TPU: it is read, and written where nothing is counted.
        ("(f32[1000,8]{1,0:S(1)}, f32[1000,8]{1,0}, u32[]) copy-start(%x)", TABLE),
    ],
)
def test_an_instruction_touches(line: str, size: int):
    module = hlo.parse(
        f"{FUSED}\nENTRY %main (x: f32[1000,8]) -> f32[4] {{\n{ARGUMENTS}  ROOT %r = {line}\n}}\n"
    )
    assert bytes_accessed(module, expected_trips({})) == size


def test_loops_multiply_in_a_real_program():
    """Ten times a product of 64 x 64 with itself, at least 3 arrays each; XLA's own estimate counts one."""
    size = 64 * 64 * 4
    f = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, c: jnp.dot(c, c), x))
    compiled = f.lower(jnp.ones((64, 64))).compile()
    found = bytes_accessed(hlo.parse(compiled.as_text()), expected_trips({}))
    assert 10 * 2 * size <= found <= 12 * 4 * size
    assert compiled.cost_analysis()["bytes accessed"] < found
