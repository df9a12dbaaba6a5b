"""Attention by blocks and by tiles against the plain formula over all of L × L, its gradient, and what it holds."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models import attention as module
from dynrec_jax.models.attention import Direction, TimeBias, attention, attention_at, bounds, time_bucket

HEADS, FEATURES, BUCKETS = 2, 4, 10
# Three rows: positions that may look anywhere, a row packed with histories and padding, and one history.
PACKED = (0.4, 0.05, 0.3)  # shares of the row; the rest is padding
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The long scheme at a length of some tens."""
    monkeypatch.setattr(module, "SHORT", 0)
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "ALIGN", 8)


def reaches(length: int, direction: Direction) -> np.ndarray:
    rng = np.random.default_rng(length)
    reach = np.zeros((3, length), np.int32)
    reach[0] = rng.integers(0, length, length)  # further than there are positions, too
    reach[2] = np.arange(length)
    at = 0
    for share in PACKED:
        size = max(1, round(share * length))
        reach[1, at : at + size] = np.arange(size)[: length - at]
        at += size
    if direction == "backward":
        reach[1:] = reach[1:, ::-1]
    return reach


def arguments(length: int, direction: Direction = "forward") -> tuple[Any, ...]:
    """Queries, keys and values [3, H, L, E], and where they may look."""
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(3, HEADS, length, FEATURES)).astype(np.float32) for _ in range(3))
    return q, k, v, reaches(length, direction)


def times_of(length: int) -> np.ndarray:
    """Gaps from a second to almost 2**31 of them, in order and not."""
    rng = np.random.default_rng(length + 1)
    steps = np.sort(2 ** rng.uniform(0, 31, (3, length))).astype(np.int64)
    steps[0] = rng.permutation(steps[0])
    return np.minimum(steps, 2**31 - 1).astype(np.int32)


def table_of(length: int) -> np.ndarray:
    return np.random.default_rng(length + 2).normal(size=(HEADS, BUCKETS)).astype(np.float32)


def bucket_of(gap: int, buckets: int) -> int:
    """The documented formula in whole numbers: sixteenths of log2, cut off."""
    gap = max(gap, 1)
    octave = gap.bit_length() - 1
    sixteenths = gap * 16 // 2**octave - 16
    return (16 * octave + sixteenths) * buckets // (32 * 16)


def plain(q: Any, k: Any, v: Any, reach: Any, direction: Direction, bias: TimeBias | None = None) -> Any:
    """The formula, with a mask and the bias written out pair by pair."""
    rows, length = reach.shape
    may = np.zeros((rows, length, length), bool)
    for b, t in np.ndindex(rows, length):
        may[b, t, max(t - reach[b, t], 0) : t + 1] = direction == "forward"
        may[b, t, t : t + reach[b, t] + 1] |= direction == "backward"
    s = jnp.einsum("bhqe,bhke->bhqk", q, k)
    if bias is not None:
        times = np.asarray(bias.times).tolist()
        bucket = np.asarray(
            [[[bucket_of(abs(one - other), BUCKETS) for other in row] for one in row] for row in times]
        )
        s = s + bias.table[:, bucket].swapaxes(0, 1)
    return jax.nn.softmax(s, axis=-1, where=may[:, None]) @ v


def agree_with_the_formula(length: int, direction: Direction, timed: bool, rtol: float = 1e-5) -> None:
    """Means and the gradients in queries, keys, values and the table, to `rtol` of the largest of each."""
    q, k, v, reach = arguments(length, direction)
    pull = np.random.default_rng(7).normal(size=q.shape).astype(np.float32)
    times, table = times_of(length), table_of(length)

    def biased(table: Any) -> TimeBias | None:
        return TimeBias(table, times) if timed else None

    @jax.jit
    def both(q: Any, k: Any, v: Any, table: Any) -> Any:
        found, back = jax.vjp(
            lambda q, k, v, table: attention(q, k, v, jnp.asarray(reach), direction, biased(table)),
            *(q, k, v, table),
        )
        expected, back_expected = jax.vjp(
            lambda q, k, v, table: plain(q, k, v, reach, direction, biased(table)), q, k, v, table
        )
        return (found, *back(pull)), (expected, *back_expected(pull))

    for a, b in zip(*both(q, k, v, table), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, float(abs(b).max())))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("length", "timed"), [(1, False), (8, False), (33, True)])
def test_blocks_give_the_formula_and_its_gradient(length: int, direction: Direction, timed: bool):
    agree_with_the_formula(length, direction, timed)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("length", "timed"), [(41, True), (48, False)])
@pytest.mark.usefixtures("tiles")
def test_tiles_give_the_formula_and_its_gradient(length: int, direction: Direction, timed: bool):
    agree_with_the_formula(length, direction, timed)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(("length", "tile"), [(512, 128), (1_100, 512)])
def test_tiles_of_their_real_size_give_the_formula(
    monkeypatch: pytest.MonkeyPatch, length: int, tile: int, timed: bool, direction: Direction
):
    monkeypatch.setattr(module, "SHORT", 0)
    monkeypatch.setattr(module, "TILE", tile)
    # Of the longer one, sides add up millions of terms of the table's gradient in float32, each in its own order.
    agree_with_the_formula(length, direction, timed, rtol=1e-5 if length <= 512 else 3e-5)


def test_tiles_waste_little_on_lengths_that_do_not_divide():
    assert module._side(8_192) == 512
    assert module._side(1_025) == 384, "three tiles, 127 positions beyond; of 512 it would be 511"
    # Those on and before the diagonal, each once.
    assert module._tiles(1_025, "forward").tolist() == [
        *([0, 0], [384, 384], [384, 0]),
        *([768, 768], [768, 384], [768, 0]),
    ]
    assert module._tiles(1_025, "backward").tolist() == [
        *([0, 0], [0, 384], [0, 768]),
        *([384, 384], [384, 768], [768, 768]),
    ]


def test_many_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    assert len(module._blocks(61, "backward")) == 8
    agree_with_the_formula(61, "backward", timed=False)


@pytest.mark.parametrize("scheme", ["blocks", "tiles"])
def test_in_bfloat16_sums_are_float32_and_no_float32_means_are_kept(
    scheme: str, request: pytest.FixtureRequest
):
    if scheme == "tiles":
        request.getfixturevalue("tiles")
    q, k, v, reach = arguments(41, "backward")
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    wide = [x.astype(jnp.float32) for x in half]
    bias = TimeBias(jnp.asarray(table_of(41)), jnp.asarray(times_of(41)))
    pull_of = jnp.asarray(np.random.default_rng(7).normal(size=q.shape), jnp.bfloat16)

    @jax.jit
    def both(half: Any, wide: Any) -> Any:
        y, back = jax.vjp(lambda *x: attention(*x, jnp.asarray(reach), "backward", bias), *half)
        expected, exact = jax.vjp(lambda *x: plain(*x, reach, "backward", bias), *wide)
        return y, back(pull_of), back, expected, exact(pull_of.astype(jnp.float32))

    found, gradients, back, expected, exact = both(half, wide)
    assert found.dtype == jnp.bfloat16
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)
    # 8 bits of a number: weights, means and gradients are rounded to 2^-9 of themselves.
    for a, b in zip((found, *gradients), (expected, *exact), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.02 * float(abs(b).max()))
    kept = [x.size for x in jax.tree.leaves(back) if x.dtype == jnp.float32]
    assert max(kept) <= q.size // FEATURES, "the normaliser is the largest float32 array that is kept"
    traced = jax.make_jaxpr(both)(half, wide)
    products = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) > 5
    assert {product.outvars[0].aval.dtype for product in products} == {jnp.dtype("float32")}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("timed", [False, True])
def test_one_query_alone_gets_what_it_gets_among_all(direction: Direction, timed: bool):
    q, k, v, reach = (jnp.asarray(x) for x in arguments(20, direction))
    at_B, times = np.array([0, 7, 19]), times_of(20)
    bias = TimeBias(jnp.asarray(table_of(20)), jnp.asarray(times)) if timed else None
    now = jnp.asarray(times[np.arange(3), at_B]) if timed else None

    @jax.jit
    def both() -> Any:
        low, high = (bound[np.arange(3), at_B] for bound in bounds(reach, direction))
        alone = attention_at(q[np.arange(3), :, at_B], k, v, low, high, bias, now)
        return alone, attention(q, k, v, reach, direction, bias)[np.arange(3), :, at_B]

    found, among_all = both()
    np.testing.assert_allclose(found, among_all, rtol=1e-5, atol=1e-6)


def test_one_query_with_a_bias_needs_its_time():
    q, k, v, reach = (jnp.asarray(x) for x in arguments(20))
    bias = TimeBias(jnp.asarray(table_of(20)), jnp.asarray(times_of(20)))
    with pytest.raises(ValueError, match="needs the time of the query"):
        attention_at(q[:, :, 0], k, v, reach[:, 0], reach[:, 0], bias)


@pytest.mark.parametrize("buckets", [1, 10, 32, 64])
def test_buckets_are_the_documented_formula(buckets: int):
    powers = 2 ** np.arange(31)
    gaps = np.unique([0, *powers, *(powers - 1), *np.geomspace(1, 2**24, 400).astype(int), 2**31 - 200])
    found = np.asarray(time_bucket(jnp.asarray(gaps, jnp.int32), buckets))
    exact = gaps < 2**24  # larger ones are rounded to 24 bits first
    assert found[exact].tolist() == [bucket_of(int(gap), buckets) for gap in gaps[exact]]
    true = buckets * np.log2(np.maximum(gaps, 1)) / 32
    below = true - found
    assert (below > -1e-6).all()
    assert (below < 1 + 0.15 * buckets / 32).all()
    assert (np.diff(found) >= 0).all()
    assert int(time_bucket(jnp.int32(2**31 - 1), buckets)) == 31 * buckets // 32
    if buckets == 32:
        assert np.asarray(time_bucket(jnp.asarray(powers, jnp.int32), 32)).tolist() == list(range(31))


def test_a_product_with_ones_is_a_lookup_and_its_gradient():
    rng = np.random.default_rng(0)
    table = jnp.asarray(table_of(0))
    bucket = jnp.asarray(rng.integers(0, BUCKETS, (3, 5, 6)), jnp.int32)
    looked_up = np.asarray(table)[:, np.asarray(bucket)].swapaxes(0, 1)
    for function in (module._multiplied, module._looked_up):
        np.testing.assert_allclose(function(table, bucket), looked_up, rtol=1e-6)
    ds = rng.normal(size=looked_up.shape).astype(np.float32)
    expected = np.zeros(table.shape)
    for b, h, q, k in np.ndindex(*ds.shape):
        expected[h, bucket[b, q, k]] += ds[b, h, q, k]
    for function in (module._ones_product, module._added):
        np.testing.assert_allclose(function(jnp.asarray(ds), bucket, BUCKETS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("short", "largest"), [(0, 512 * 512), (10_000, 2_048 * 512)])
def test_nothing_of_length_times_length_is_held(
    monkeypatch: pytest.MonkeyPatch, short: int, largest: int, gradient: bool
):
    """A tile of scores; or the last block of queries, over all keys."""
    monkeypatch.setattr(module, "SHORT", short)
    length = 2_048
    x = jax.ShapeDtypeStruct((1, 1, length, FEATURES), jnp.float32)
    reach = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(q: Any, k: Any, v: Any, reach: Any) -> Any:
        return attention(q, k, v, reach, "forward").sum()

    traced = jax.make_jaxpr(jax.grad(total) if gradient else total)(x, x, x, reach)
    results = (variable.aval for equation in equations(traced.jaxpr) for variable in equation.outvars)
    assert max(result.size for result in results) == largest


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of inner functions and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
