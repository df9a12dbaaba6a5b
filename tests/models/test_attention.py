"""Attention by blocks against the plain formula over all of L × L, its gradient, and what it holds."""

from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models import attention as module
from dynrec_jax.models.attention import Direction, attention, attention_at, bounds

HEADS, FEATURES = 2, 4


def arguments(length: int) -> tuple[Any, ...]:
    """Queries, keys and values [3, H, L, E], and a reach that differs from position to position."""
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(3, HEADS, length, FEATURES)).astype(np.float32) for _ in range(3))
    return q, k, v, rng.integers(0, length, (3, length)).astype(np.int32)


def plain(q: Any, k: Any, v: Any, reach: Any, direction: Direction) -> Any:
    """The formula, with a mask written out pair by pair."""
    rows, length = reach.shape
    may = np.zeros((rows, length, length), bool)
    for b, t in np.ndindex(rows, length):
        may[b, t, max(t - reach[b, t], 0) : t + 1] = direction == "forward"
        may[b, t, t : t + reach[b, t] + 1] |= direction == "backward"
    s = jnp.einsum("bhqe,bhke->bhqk", q, k)
    return jax.nn.softmax(s, axis=-1, where=may[:, None]) @ v


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("length", [1, 8, 33])
def test_blocks_give_the_formula_and_its_gradient(length: int, direction: Direction):
    q, k, v, reach = arguments(length)
    pull = np.random.default_rng(7).normal(size=q.shape).astype(np.float32)

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        found, back = jax.vjp(lambda *x: attention(*x, jnp.asarray(reach), direction), q, k, v)
        expected, back_expected = jax.vjp(lambda *x: plain(*x, reach, direction), q, k, v)
        return (found, *back(pull)), (expected, *back_expected(pull))

    for a, b in zip(*both(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_a_long_history_in_many_blocks_and_in_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    q, k, v, reach = (jnp.asarray(x) for x in arguments(61))
    expected = plain(q, k, v, np.asarray(reach), "backward")
    np.testing.assert_allclose(attention(q, k, v, reach, "backward"), expected, rtol=1e-5, atol=2e-6)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    found = attention(*half, reach, "backward")
    assert found.dtype == jnp.bfloat16
    expected = plain(*(x.astype(jnp.float32) for x in half), np.asarray(reach), "backward")
    # 8 bits of a number: weights and means are rounded to 2^-9 of themselves.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_query_alone_gets_what_it_gets_among_all(direction: Direction):
    q, k, v, reach = arguments(20)
    at_B = np.array([0, 7, 19])
    whole = attention(*(jnp.asarray(x) for x in (q, k, v, reach)), direction)
    low, high = (np.asarray(bound)[np.arange(3), at_B] for bound in bounds(jnp.asarray(reach), direction))
    own = q[np.arange(3), :, at_B]
    found = attention_at(*(jnp.asarray(x) for x in (own, k, v, low, high)))
    np.testing.assert_allclose(found, np.asarray(whole)[np.arange(3), :, at_B], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_of_length_times_length_is_held(gradient: bool):
    length = 2_048
    x = jax.ShapeDtypeStruct((1, 1, length, FEATURES), jnp.float32)
    reach = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(q: Any, k: Any, v: Any, reach: Any) -> Any:
        return attention(q, k, v, reach, "forward").sum()

    traced = jax.make_jaxpr(jax.grad(total) if gradient else total)(x, x, x, reach)
    largest = max(int(np.prod(shape)) for shape in shapes(traced.jaxpr))
    assert largest == length * 512, "the last block of queries, over all keys"


def shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    found = {variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars}
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= shapes(inner)
    return found
