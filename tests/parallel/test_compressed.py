"""Tables in fewer bits: what is kept of a row, and that they rank and mix as the same numbers in float32 would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.parallel.blocks import Blocks
from dynrec_jax.parallel.compressed import Compressed, compressed
from dynrec_jax.parallel.mixture import mixture
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import rows_for, rows_of
from dynrec_jax.parallel.topk import top_k

from .. import tiny

SCALE, DIM = 0.5, 4
MANY = 70_000  # items of a table in strips


def test_an_int8_row_has_127_steps_to_its_largest_number():
    table = np.array([[0, 0, 0, 0], [1.27, -0.5, 0.004, 0.006], [-254, 2, 3.1, -0.9]], np.float32)
    made = compressed(jnp.asarray(table), "int8")
    assert made.values.dtype == jnp.int8
    assert made.values.tolist() == [[0, 0, 0, 0], [127, -50, 0, 1], [-127, 1, 2, 0]]
    np.testing.assert_allclose(made.scales, [0, 0.01, 2], rtol=1e-6)
    assert made.shape == table.shape
    assert made.bytes == 12 + 3 * 4


def test_an_element_is_off_by_half_a_step_at_most():
    table = np.random.default_rng(0).normal(0, 1, (300, 16)).astype(np.float32)
    made = compressed(jnp.asarray(table), "int8")
    off = np.abs(np.asarray(made.values, np.float32) * np.asarray(made.scales)[:, None] - table)
    assert (off <= np.asarray(made.scales)[:, None] * 0.5001).all()
    assert off.max() > 0


def test_bfloat16_keeps_eight_bits_of_a_number():
    made = compressed(jnp.array([[1.0, 1 + 2**-7, 1 + 2**-9, 0.0]]), "bfloat16")
    assert made.scales is None
    kept = jax.lax.bitcast_convert_type(made.values, jnp.bfloat16)
    assert kept.astype(jnp.float32).tolist() == [[1.0, 1 + 2**-7, 1.0, 0.0]]
    assert made.bytes == 4 * 2


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="'int4' compresses no table; expected one of bfloat16, int8"):
        compressed(jnp.zeros((2, 2)), "int4")


def whole_numbers(items: int, kind: str) -> tuple[Compressed, np.ndarray]:
    """A table that loses nothing, and the same in float32; many scores are equal, and rows of no item would win."""
    rng = np.random.default_rng(0)
    values = np.full((rows_for(items), DIM), 100, np.int8)
    rows = rows_of(np.arange(1, items + 1), len(values))
    values[rows] = rng.integers(-2, 3, (items, DIM))
    if kind == "bfloat16":
        return compressed(jnp.asarray(values, jnp.float32), kind), values.astype(np.float32)
    scales = 2.0 ** rng.integers(-2, 3, len(values)).astype(np.float32)
    return Compressed(jnp.asarray(values), jnp.asarray(scales)), values * scales[:, None]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("sizes", "slices", "items", "rows"),
    [((1, 1, 1), 1, 37, 5), ((2, 2, 2), 1, 300, 9), ((1, 2, 2), 2, 300, 9), ((3, 1, 1), 1, MANY, 10_000)],
)
def test_lists_are_of_the_same_numbers(
    kind: str, sizes: tuple[int, int, int], slices: int, items: int, rows: int
):
    rng = np.random.default_rng(1)
    small, table = whole_numbers(items, kind)
    u = rng.integers(-1, 2, (6, DIM)).astype(np.float32)
    seen = rng.integers(0, items + 1, (6, 9)).astype(np.int32)
    mesh = tiny.mesh(*sizes, slices=slices)
    with jax.set_mesh(mesh):
        small = jax.tree.map(
            lambda x: jax.device_put(x, sharding(mesh, "items", *(None,) * (x.ndim - 1))), small
        )
        run = jax.jit(functools.partial(top_k, k=12, items=items, scale=SCALE, rows=rows))
        ids, scores = (np.asarray(x) for x in run(u, small, seen))
    for b in range(len(u)):
        left = np.setdiff1d(np.arange(1, items + 1), seen[b])
        score = SCALE * table[rows_of(left, len(table))] @ u[b]
        order = np.argsort(-score, kind="stable")[:12]
        np.testing.assert_array_equal(ids[b], left[order])
        np.testing.assert_array_equal(scores[b], score[order])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_mixture_is_that_of_the_same_numbers(kind: str, sizes: tuple[int, int, int]):
    small, table = whole_numbers(40, kind)
    u = np.random.default_rng(2).normal(0, 0.5, (8, DIM)).astype(np.float32)
    with jax.set_mesh(tiny.mesh(*sizes)):
        found = jax.jit(lambda u, small: mixture(u, small, Blocks(40, SCALE, rows=16, positions=4)))(u, small)
    score = SCALE * u @ table[1:41].T
    share = np.exp(score - score.max(axis=1, keepdims=True))
    expected = share @ table[1:41] / share.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_no_copy_in_float32_is_made_of_it(kind: str):
    """What XLA sets aside does not grow with the catalogue, of rows in their order and in strips."""
    dim, used = 16, {}
    for items in (10_000, 20_000, 100_000, 200_000):
        table = jax.ShapeDtypeStruct((rows_for(items), dim), jnp.float32)
        small = jax.eval_shape(lambda x: compressed(x, kind), table)
        run = jax.jit(functools.partial(top_k, k=10, items=items, scale=SCALE, rows=512))
        u, seen = jax.ShapeDtypeStruct((8, dim), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.int32)
        used[items] = run.lower(u, small, seen).compile().memory_analysis().temp_size_in_bytes
    blocks = 4 * 512 * dim * 4
    assert abs(used[20_000] - used[10_000]) < 2**12
    assert abs(used[200_000] - used[100_000]) < 2**12
    assert max(used.values()) < blocks < 10_000 * dim * 4
