"""Attention by blocks and by tiles against the plain formula over all of L × L, its gradient, and what it holds."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models import attention as module
from dynrec_jax.models.attention import Direction, Way, attention, attention_at, bounds
from dynrec_jax.models.bias import Bias, distance_bias_of, time_bias_of

HEADS, FEATURES, BUCKETS, DISTANCES = 2, 4, 10, 7
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


def table_of(length: int, columns: int = BUCKETS) -> np.ndarray:
    return np.random.default_rng(length + 2).normal(size=(HEADS, columns)).astype(np.float32)


def bias_of(length: int, kind: str, tables: Any = None) -> Bias | None:
    """By "time", by "distance", or by "both"; queries ask later than their own time, and some earlier."""
    if kind == "none":
        return None
    time, distance = (table_of(length), table_of(length, DISTANCES)) if tables is None else tables
    times = times_of(length)
    asked = np.minimum(np.roll(times, -1, axis=1), 2**31 - 1)
    return Bias(
        *((time, asked, times) if kind in ("time", "both") else (None, None, None)),
        distance if kind in ("distance", "both") else None,
    )


def bucket_of(gap: int, buckets: int) -> int:
    """The documented formula in whole numbers: sixteenths of log2, cut off."""
    gap = min(gap, 2**31 - 2) + 1
    octave = gap.bit_length() - 1
    sixteenths = gap * 16 // 2**octave - 16
    return (16 * octave + sixteenths) * buckets // (32 * 16)


def plain(q: Any, k: Any, v: Any, reach: Any, way: Way, bias: Bias | None = None) -> Any:
    """The formula, with a mask and the bias written out pair by pair."""
    rows, length = reach.shape
    may = np.zeros((rows, length, length), bool)
    for b, t in np.ndindex(rows, length):
        may[b, t, max(t - reach[b, t], 0) : t + 1] = way.direction == "forward"
        may[b, t, t : t + reach[b, t] + 1] |= way.direction == "backward"
    s = jnp.einsum("bhqe,bhke->bhqk", q, k)
    if bias is not None and bias.time is not None:
        pairs = zip(np.asarray(bias.asked).tolist(), np.asarray(bias.times).tolist(), strict=True)
        bucket = [
            [[bucket_of(abs(one - other), BUCKETS) for other in row] for one in asked] for asked, row in pairs
        ]
        s = s + bias.time[:, np.asarray(bucket)].swapaxes(0, 1)
    if bias is not None and bias.distance is not None:
        at = np.arange(length)
        s = s + bias.distance[:, np.minimum(abs(at[:, None] - at), DISTANCES - 1)][None]
    if not way.pointwise:
        return jax.nn.softmax(s, axis=-1, where=may[:, None]) @ v
    return (s * jax.nn.sigmoid(s) * may[:, None]) @ v / may.sum(axis=-1)[:, None, :, None]


def agree_with_the_formula(length: int, way: Way, kind: str, rtol: float = 1e-5) -> None:
    """Means and the gradients in queries, keys, values and the tables, to `rtol` of the largest of each."""
    q, k, v, reach = arguments(length, way.direction)
    reach = np.minimum(reach, way.window - 1) if way.window else reach
    pull = np.random.default_rng(7).normal(size=q.shape).astype(np.float32)
    tables = table_of(length), table_of(length, DISTANCES)

    @jax.jit
    def both(q: Any, k: Any, v: Any, tables: Any) -> Any:
        found, back = jax.vjp(
            lambda q, k, v, tables: attention(
                q, k, v, jnp.asarray(reach), way, bias_of(length, kind, tables)
            ),
            *(q, k, v, tables),
        )
        expected, back_expected = jax.vjp(
            lambda q, k, v, tables: plain(q, k, v, reach, way, bias_of(length, kind, tables)), q, k, v, tables
        )
        return (found, *back(pull)), (expected, *back_expected(pull))

    for a, b in zip(*map(jax.tree.leaves, both(q, k, v, tables)), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, float(abs(b).max())))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("length", "kind", "window", "pointwise"),
    [
        (1, "none", 0, False),
        (8, "none", 0, False),
        (33, "both", 0, False),
        (33, "time", 5, False),
        (40, "distance", 11, True),
    ],
)
def test_blocks_give_the_formula_and_its_gradient(
    length: int, kind: str, window: int, pointwise: bool, direction: Direction
):
    agree_with_the_formula(length, Way(direction, window, pointwise), kind)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("length", "kind", "window", "pointwise"),
    [(41, "both", 0, False), (48, "none", 0, False), (48, "both", 18, True), (61, "distance", 9, False)],
)
@pytest.mark.usefixtures("tiles")
def test_tiles_give_the_formula_and_its_gradient(
    length: int, kind: str, window: int, pointwise: bool, direction: Direction
):
    agree_with_the_formula(length, Way(direction, window, pointwise), kind)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("kind", "window"), [("none", 0), ("both", 0), ("both", 200)])
@pytest.mark.parametrize(("length", "tile"), [(512, 128), (1_100, 512)])
def test_tiles_of_their_real_size_give_the_formula(
    monkeypatch: pytest.MonkeyPatch, length: int, tile: int, kind: str, window: int, direction: Direction
):
    monkeypatch.setattr(module, "SHORT", 0)
    monkeypatch.setattr(module, "TILE", tile)
    # Of the longer one, sides add up millions of terms of the table's gradient in float32, each in its own order.
    agree_with_the_formula(length, Way(direction, window), kind, rtol=1e-5 if length <= 512 else 3e-5)


def test_a_window_leaves_out_the_blocks_and_tiles_that_it_does_not_reach():
    assert [start.tolist() for start in module._tiles(2_048, Way("forward", 513))] == [
        *([0, 0], [512, 512], [512, 0]),
        *([1_024, 1_024], [1_024, 512]),
        *([1_536, 1_536], [1_536, 1_024]),
    ]
    assert len(module._tiles(2_048, Way("forward", 514))) == 9, "one position more reaches one tile more"
    assert len(module._tiles(2_048, Way("backward", 1))) == 4
    keys = [(block.keys.start, block.keys.size) for block in module._blocks(64, Way("forward", 5))]
    assert keys == [(0, 16), (12, 20), (28, 20), (44, 20)]
    keys = [(block.keys.start, block.keys.size) for block in module._blocks(64, Way("backward", 5))]
    assert keys == [(0, 20), (16, 20), (32, 20), (48, 16)]


def test_tiles_waste_little_on_lengths_that_do_not_divide():
    assert module._side(8_192) == 512
    assert module._side(1_025) == 384, "three tiles, 127 positions beyond; of 512 it would be 511"
    # Those on and before the diagonal, each once.
    assert module._tiles(1_025, Way("forward")).tolist() == [
        *([0, 0], [384, 384], [384, 0]),
        *([768, 768], [768, 384], [768, 0]),
    ]
    assert module._tiles(1_025, Way("backward")).tolist() == [
        *([0, 0], [0, 384], [0, 768]),
        *([384, 384], [384, 768], [768, 768]),
    ]


def test_many_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    assert len(module._blocks(61, Way("backward"))) == 8
    agree_with_the_formula(61, Way("backward"), "none")


@pytest.mark.parametrize("scheme", ["blocks", "tiles"])
def test_in_bfloat16_sums_are_float32_and_no_float32_means_are_kept(
    scheme: str, request: pytest.FixtureRequest
):
    if scheme == "tiles":
        request.getfixturevalue("tiles")
    q, k, v, reach = arguments(41, "backward")
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    wide = [x.astype(jnp.float32) for x in half]
    bias, way = bias_of(41, "both"), Way("backward")
    pull_of = jnp.asarray(np.random.default_rng(7).normal(size=q.shape), jnp.bfloat16)

    @jax.jit
    def both(half: Any, wide: Any) -> Any:
        y, back = jax.vjp(lambda *x: attention(*x, jnp.asarray(reach), way, bias), *half)
        expected, exact = jax.vjp(lambda *x: plain(*x, reach, way, bias), *wide)
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
@pytest.mark.parametrize(("kind", "pointwise"), [("none", False), ("both", False), ("both", True)])
def test_one_query_alone_gets_what_it_gets_among_all(direction: Direction, kind: str, pointwise: bool):
    q, k, v, reach = (jnp.asarray(x) for x in arguments(20, direction))
    at_B, row_B, key_1xL = np.array([0, 7, 19]), np.arange(3), np.arange(20)[None]
    bias = bias_of(20, kind)

    @jax.jit
    def both() -> Any:
        low, high = (bound[row_B, at_B][:, None] for bound in bounds(reach, direction))
        added = None
        if bias is not None:
            added = time_bias_of(bias, bias.asked[row_B, at_B], bias.times)
            added += distance_bias_of(bias, jnp.abs(at_B[:, None] - key_1xL))
        inside = (low <= key_1xL) & (key_1xL <= high)
        alone = attention_at(q[row_B, :, at_B], k, v, inside, added, pointwise)
        way = Way(direction, pointwise=pointwise)
        return alone, attention(q, k, v, reach, way, bias)[row_B, :, at_B]

    found, among_all = both()
    np.testing.assert_allclose(found, among_all, rtol=1e-5, atol=1e-6)


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
        return attention(q, k, v, reach, Way("forward")).sum()

    traced = jax.make_jaxpr(jax.grad(total) if gradient else total)(x, x, x, reach)
    results = (variable.aval for equation in equations(traced.jaxpr) for variable in equation.outvars)
    assert max(result.size for result in results) == largest


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of inner functions and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
