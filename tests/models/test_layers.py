"""Dropout whose bits belong to events, the norms, and which blocks there are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models.blocks import Attention, BlockSettings, Places
from dynrec_jax.models.layers import Dense, Dropout, LayerNorm, RmsNorm, hash_bits
from dynrec_jax.parallel.counters import token_counters

from .. import tiny

FEATURES = 16


def settings(**changes: Any) -> BlockSettings:
    return BlockSettings(heads=2, feedforward=4.0, dropout=0.0, dtype=jnp.float32, **changes)


def dropped(rate: float, counters: Any, x: Any, seed: int = 0) -> np.ndarray:
    return np.asarray(Dropout(rate).apply({}, x, counters, rngs={"dropout": jax.random.key(seed)}))


def counters(rows: int, length: int) -> jax.Array:
    at = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length)
    return token_counters(at // length + 1, at % length)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropout_drops_its_rate_and_keeps_the_expectation(rate: float):
    rows, length = 64, 50
    y = dropped(rate, counters(rows, length), jnp.full((rows, length, FEATURES), 3.0))
    count = y.size
    deviation = np.sqrt(rate * (1 - rate) / count)
    assert abs((y == 0).mean() - rate) < 4 * deviation
    np.testing.assert_allclose(y[y != 0], 3.0 / (1 - rate), rtol=1e-6)


def test_no_dropout_without_a_key_or_a_rate():
    x = jnp.ones((2, 3, FEATURES))
    assert Dropout(0.5).apply({}, x, counters(2, 3)) is x
    np.testing.assert_array_equal(dropped(0.0, counters(2, 3), x), x)


def test_masks_belong_to_windows_however_they_are_packed():
    windows = {1: [3, 1, 2, 5], 2: [7, 7], 3: [9, 8, 7]}
    layouts = [
        [[(1, windows[1])], [(2, windows[2])], [(3, windows[3])]],
        [[(2, windows[2]), (1, windows[1])], [], [(3, windows[3])]],
        [[(3, windows[3]), (2, windows[2])], [(1, windows[1])]],
    ]
    masks = []
    for rows in layouts:
        batch = tiny.batch(rows, 6)
        y = dropped(
            0.5, token_counters(batch.segments, batch.positions), jnp.ones((*batch.items.shape, FEATURES))
        )
        mask = {}
        for r, t in zip(*np.nonzero(batch.segments), strict=True):
            mask[int(batch.segments[r, t]), int(batch.positions[r, t])] = y[r, t].tolist()
        masks.append(mask)
    assert len(masks[0]) == 9
    assert masks[0] == masks[1] == masks[2]


def test_bits_are_independent_of_each_other():
    """Neighbours in window, place, feature and key agree on half of their bits, as coins do."""
    base = np.asarray(hash_bits(jax.random.key(0), counters(32, 32), 64))
    other_key = np.asarray(hash_bits(jax.random.key(1), counters(32, 32), 64))
    pairs = {
        "window": (base[1:], base[:-1]),
        "place": (base[:, 1:], base[:, :-1]),
        "feature": (base[..., 1:], base[..., :-1]),
        "diagonal": (base[1:, :-1], base[:-1, 1:]),
        "key": (base, other_key),
    }
    for name, (one, other) in pairs.items():
        for threshold in (2**31, 2**29):
            a, b = (one >= threshold).reshape(-1), (other >= threshold).reshape(-1)
            # The correlation of n independent pairs is within 5 / sqrt(n) all but surely.
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a)), (name, threshold)
    bits = (base.reshape(-1, 1) >> np.arange(32, dtype=np.uint32)) & 1
    assert (np.abs(bits.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(len(bits))).all()
    assert len(np.unique(base)) > 0.99 * base.size


def test_all_layers_and_steps_draw_other_bits():
    x = jnp.ones((4, 4, FEATURES))
    masks = [dropped(0.5, counters(4, 4), x, seed) for seed in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[1], masks[2])
    np.testing.assert_array_equal(masks[0], dropped(0.5, counters(4, 4), x, 0))


def test_norms_are_their_formulas():
    x = np.random.default_rng(0).normal(3.0, 2.0, (2, 3, 8)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2.0, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
    wide = x.astype(np.float64)
    rms = RmsNorm().apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(rms, wide / np.sqrt((wide**2).mean(-1, keepdims=True)) * scale, rtol=1e-5)
    norm = LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    centred = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(norm, centred * scale + bias, rtol=1e-4, atol=1e-5)


def test_attention_is_its_formula():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 4)).astype(np.float32)
    kernels = {name: rng.normal(size=(4, 2, 2)).astype(np.float32) for name in ("query", "key", "value")}
    out = rng.normal(size=(2, 2, 4)).astype(np.float32)
    params = {name: {"kernel": kernel} for name, kernel in {**kernels, "out": out}.items()}
    mask = np.array([[[True, False, False], [True, True, False], [False, True, True]]])
    at = Places(jnp.asarray([[0, 1, 1]]), jnp.asarray([[0, 1, 2]]), jnp.zeros((1, 3), jnp.uint32), "forward")
    found = Attention(settings()).apply({"params": params}, x, at)
    expected = np.zeros((3, 4))
    for h in range(2):
        q, k, v = (x[0] @ kernels[name][:, h] for name in ("query", "key", "value"))
        for t in range(3):
            looked = np.nonzero(mask[0, t])[0]
            s = k[looked] @ q[t] / np.sqrt(2.0)
            p = np.exp(s) / np.exp(s).sum()
            expected[t] += (p @ v[looked]) @ out[h]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "features"), [((6,), (2, 3)), ((2, 3), (6,))])
def test_a_linear_map_adds_up_in_float32_forward_and_backward(
    inputs: tuple[int, ...], features: tuple[int, ...]
):
    rng = np.random.default_rng(0)
    half = jnp.bfloat16
    x, g = (jnp.asarray(rng.normal(size=(4, 300, *shape)), half) for shape in (inputs, features))
    kernel = rng.normal(size=(*inputs, *features)).astype(np.float32)
    dense = Dense(features, ("embed",) * kernel.ndim, half, inputs=len(inputs))

    @jax.jit
    def run(x: Any, kernel: Any) -> Any:
        y, back = jax.vjp(lambda x, kernel: dense.apply({"params": {"kernel": kernel}}, x), x, kernel)
        return y, *back(g)

    y, dx, dk = run(x, kernel)
    assert (y.dtype, dx.dtype, dk.dtype) == (half, half, jnp.float32)
    wide_x, wide_g = (np.asarray(a, np.float64).reshape(1200, -1) for a in (x, g))
    wide_kernel = np.asarray(jnp.asarray(kernel, half), np.float64).reshape(6, 6)
    # Once rounded to 8 bits, of which half a one is 2^-8 at most; each sum has six terms.
    for found, expected in ((y, wide_x @ wide_kernel), (dx, wide_g @ wide_kernel.T)):
        found_PxF = np.asarray(found, np.float64).reshape(1200, -1)
        np.testing.assert_allclose(found_PxF, expected, rtol=1.01 * 2**-8, atol=1e-5)
    # 1,200 terms each; a sum that was ever rounded to 8 bits is some 0.1 away.
    np.testing.assert_allclose(dk.reshape(6, 6), wide_x.T @ wide_g, rtol=1e-5, atol=1e-3)


def test_attention_knows_of_time_where_it_is_told_to():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
    at = Places(jnp.asarray([[0, 1, 2]]), jnp.asarray([[0, 1, 2]]), jnp.zeros((1, 3), jnp.uint32), "forward")
    timed = dataclasses.replace(at, times=jnp.asarray([[0, 4, 100]]), asked=jnp.asarray([[0, 4, 100]]))
    module = Attention(settings(time_buckets=8))
    boxed = jax.jit(module.init)(jax.random.key(0), x, timed)["params"]["time_bias"]
    assert boxed.names == ("heads", None)
    assert boxed.value.shape == (2, 8)
    assert not boxed.value.any()
    with pytest.raises(ValueError, match="time_buckets=8: attention needs the events' times"):
        module.init(jax.random.key(0), x, at)


def test_places_are_a_tree_without_the_direction():
    at = Places(*[jnp.zeros((1, 3), jnp.int32)] * 2, jnp.zeros((1, 3), jnp.uint32), "backward")
    leaves, tree = jax.tree.flatten(at)
    assert len(leaves) == 3
    assert jax.tree.unflatten(tree, leaves).direction == "backward"
