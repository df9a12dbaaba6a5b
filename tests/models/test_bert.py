"""BERT against PyTorch's outputs, and what it promises of padding, freezing, recomputing, dropout and meshes."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from dynrec_jax.models.bert import ACTIVATION, Bert, SelfAttention, from_pretrained, frozen_mask, pool
from dynrec_jax.models.bert_config import ACTIVATIONS
from dynrec_jax.parallel import rules
from dynrec_jax.parallel.counters import token_counters

from .. import tiny

GOLDEN = Path(__file__).parent / "golden"
LAYERS = 2
PRODUCTS = {"query", "key", "value", "out", "up", "down"}


@pytest.fixture(scope="module")
def outputs() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "tiny_outputs.safetensors")


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return loaded()[1]


@functools.cache
def loaded() -> tuple[Bert, Any]:
    return from_pretrained(GOLDEN / "tiny")


def bert(**changes: Any) -> Bert:
    return dataclasses.replace(loaded()[0], **changes)


@functools.cache
def compiled(module: Bert) -> Callable[..., jax.Array]:
    return jax.jit(module.apply)


def is_key_bias(path: Any) -> bool:
    """A bias of the keys adds the same to all scores of a query, which the softmax takes off again: no gradient."""
    return jax.tree_util.keystr(path, simple=True, separator="/").endswith("key/bias")


def with_act(name: str) -> Bert:
    module = bert()
    return dataclasses.replace(module, config=dataclasses.replace(module.config, hidden_act=name))


def random_text(seed: int, texts: int = 8, length: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, texts)
    return rng.integers(0, 60, (texts, length)).astype(np.int32), np.arange(length)[None] < lengths[:, None]


@pytest.mark.parametrize("case", ["gelu/plain", "gelu/typed", "gelu_new/plain", "relu/plain"])
def test_the_hidden_states_are_those_of_pytorch(case, outputs, variables):
    act, types = case.split("/")
    more = [outputs["types"]] if types == "typed" else []
    found = compiled(with_act(act))(variables, outputs["ids"], outputs["mask"], *more)
    real = outputs["mask"] == 1
    assert found.shape == (3, 9, 16)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found)[real], outputs[case][real], rtol=0, atol=1e-5)


def test_the_activations_differ_so_that_a_wrong_one_would_show(outputs):
    for one, other in (("gelu", "gelu_new"), ("gelu", "relu")):
        assert np.abs(outputs[f"{one}/plain"] - outputs[f"{other}/plain"]).max() > 1e-4
    assert ACTIVATION["gelu_pytorch_tanh"] is ACTIVATION["gelu_new"]
    assert set(ACTIVATION) == set(ACTIVATIONS)


def test_padding_never_reaches_a_real_token(variables):
    ids, mask = random_text(0)
    base = np.asarray(compiled(bert())(variables, ids, mask))
    other_ids = np.where(mask, ids, (ids + 17) % 60)
    np.testing.assert_array_equal(np.asarray(compiled(bert())(variables, other_ids, mask))[mask], base[mask])
    wide = np.pad(ids, ((0, 0), (0, 5)), constant_values=3)
    wider = np.asarray(compiled(bert())(variables, wide, np.pad(mask, ((0, 0), (0, 5)))))
    np.testing.assert_allclose(wider[:, :7][mask], base[mask], rtol=0, atol=2e-6)
    # A real token reaches all others: the attention looks both ways.
    row = int(mask.sum(1).argmax())
    ids[row, 1] = (ids[row, 1] + 1) % 60
    moved = np.abs(np.asarray(compiled(bert())(variables, ids, mask)) - base).max(-1)
    assert (moved[row][mask[row]] > 1e-4).all()
    assert not np.delete(moved, row, 0).any()


def test_a_text_of_padding_alone_is_finite_and_its_vector_zero(variables):
    ids, mask = np.zeros((8, 7), np.int32), np.zeros((8, 7), bool)
    found = compiled(bert())(variables, ids, mask)
    assert np.isfinite(found).all()
    for how in ("cls", "mean"):
        np.testing.assert_array_equal(pool(found, jnp.asarray(mask), how), np.zeros((8, 16)))


def loss(module: Bert, params: Any, ids: Any, mask: Any) -> jax.Array:
    rngs = {"dropout": jax.random.key(5)} if module.dropout else {}
    y = module.apply({"params": params}, ids, mask, rngs=rngs).astype(jnp.float32)
    return (jnp.where(mask[..., None], y, 0.0) * jnp.sin(jnp.arange(16.0)).reshape(1, 1, 16)).sum()


@functools.cache
def step(module: Bert) -> Callable[..., Any]:
    """From (params, ids, mask) to the loss and its gradient."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, module)))


def products(module: Bert, params: Any, ids: Any, mask: Any) -> int:
    return str(jax.make_jaxpr(jax.grad(lambda p: loss(module, p, ids, mask)))(params)).count("dot_general")


def test_what_is_frozen_gets_no_gradient_and_the_rest_does(variables):
    ids, mask = random_text(1)
    params = variables["params"]
    values, counted = [], []
    for below in range(LAYERS + 1):
        module = bert(frozen_below=below)
        value, gradient = step(module)(params, ids, mask)
        values.append(float(value))
        counted.append(products(module, params, ids, mask))
        for (path, g), fixed in zip(
            jax.tree.leaves_with_path(gradient), jax.tree.leaves(frozen_mask(params, below)), strict=True
        ):
            assert not (fixed and np.any(g)), path
            assert fixed or is_key_bias(path) or np.abs(g).max() > 1e-3, path
        assert {name: set(jax.tree.leaves(part)) for name, part in frozen_mask(params, below).items()} == {
            name: {(int(name[6:]) if name.startswith("layer_") else 0) < below} for name in params
        }
    # Three programs, each of which may add up in its own order: the last bits depend on the CPU.
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    # Each layer that is left out of the gradient takes its products with it.
    assert counted[0] > counted[1] > counted[2]


def test_what_is_frozen_drops_nothing(variables):
    ids, mask = random_text(6)
    module = bert(frozen_below=LAYERS, dropout=0.5)
    found = compiled(module)(variables, ids, mask, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(found, compiled(bert())(variables, ids, mask), rtol=0, atol=2e-6)


@pytest.mark.parametrize("below", [-1, 3])
def test_no_more_than_all_layers_can_be_frozen(below, variables):
    ids, mask = random_text(1)
    with pytest.raises(ValueError, match=f"frozen_below={below}: expected 0 to 2"):
        bert(frozen_below=below).apply(variables, ids, mask)


def test_bfloat16_is_close_and_its_gradient_too(variables):
    ids, mask = random_text(3)
    exact, rough = bert(), bert(dtype=jnp.bfloat16)
    y, y16 = compiled(exact)(variables, ids, mask), compiled(rough)(variables, ids, mask)
    assert y16.dtype == jnp.bfloat16
    # Seven bits of fraction: 2**-8 of a number, some ten times over two layers.
    assert (
        np.abs(np.asarray(y16, np.float32) - np.asarray(y))[mask].mean()
        < 0.02 * np.abs(np.asarray(y))[mask].mean()
    )
    g, g16 = (step(module)(variables["params"], ids, mask)[1] for module in (exact, rough))
    for (path, a), b in zip(jax.tree.leaves_with_path(g), jax.tree.leaves(g16), strict=True):
        assert b.dtype == jnp.float32
        if not is_key_bias(path):
            assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a), jax.tree_util.keystr(path)


def test_every_parameter_has_names_that_the_rules_know(variables):
    ids, mask = random_text(0)
    made = jax.eval_shape(bert().init, jax.random.key(0), ids, mask)["params"]
    boxes = jax.tree.leaves_with_path(made, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(boxes) == len(jax.tree.leaves(made))
    for path, box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim
        assert len(rules.spec(*box.names)) == box.value.ndim
        # Matrices of products, and they alone, are kernels: weight decay goes by that name.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_product = name.split("/")[-2:-1] != [] and name.split("/")[-2] in PRODUCTS
        assert name.endswith("/kernel") == (is_product and not name.endswith("/bias")), name
        if name.endswith("/kernel"):
            assert set(rules.spec(*box.names)) >= {"fsdp", "tensor"}
        if "/" not in name:  # the tables of the embeddings
            assert tuple(rules.spec(*box.names)) == (None, "fsdp")
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), nn.meta.unbox(made))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), variables["params"])


def test_the_same_numbers_and_gradients_on_a_mesh_with_recomputed_layers(variables):
    ids, mask = random_text(4)
    expected = step(bert(dropout=0.2))(variables["params"], ids, mask)
    module = bert(dropout=0.2, remat=True)
    text = str(jax.make_jaxpr(functools.partial(loss, module))(variables["params"], ids, mask))
    assert text.count("remat") == LAYERS
    mesh = tiny.mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(module.init, jax.random.key(0), ids, mask)["params"]
        params = jax.device_put(variables["params"], rules.tree_shardings(mesh, boxed))
        placed = jax.device_put((ids, mask), rules.sharding(mesh, "batch", None))
        found = step(module)(params, *placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


def test_dropout_goes_by_the_texts_own_numbers(variables):
    ids, mask = random_text(6)
    number_N = np.arange(10, 18)
    # Without conftest's quick compilation, which rounds other shapes in other ways.
    quick = "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    well = functools.partial(
        jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True} if quick else None
    )
    apply = well(bert(dropout=0.3).apply)

    def run(order: Any, pad: int = 0) -> np.ndarray:
        wide = ((0, 0), (0, pad))
        counters = token_counters(jnp.asarray(number_N[order])[:, None], jnp.arange(7 + pad)[None])
        text = np.pad(ids[order], wide), np.pad(mask[order], wide)
        y = apply(variables, *text, counters=counters, rngs={"dropout": jax.random.key(0)})
        return np.asarray(y)[:, :7]

    base, order = run(np.arange(8)), np.array([3, 1, 4, 0, 2, 7, 6, 5])
    np.testing.assert_allclose(run(order)[mask[order]], base[order][mask[order]], rtol=0, atol=2e-6)
    np.testing.assert_allclose(run(np.arange(8), pad=3)[mask], base[mask], rtol=0, atol=2e-6)
    without = np.asarray(well(bert().apply)(variables, ids, mask))
    assert (np.abs(base - without)[mask] > 1e-3).mean() > 0.9
    # By default rows have numbers: two of the same words drop different things.
    same = apply(variables, ids[[0, 0]], mask[[0, 0]], rngs={"dropout": jax.random.key(0)})
    assert np.abs(same[0] - same[1])[mask[0]].max() > 1e-2
    np.testing.assert_array_equal(apply(variables, ids, mask), without)


def test_attention_drops_its_rate():
    """With the same value everywhere, a mean over dropped weights is their sum: `kept / (1 - rate)` on average."""
    attention = SelfAttention(heads=4, dtype=jnp.float32, dropout=0.5)
    texts, length, dim = 64, 16, 16
    x, mask = jnp.ones((texts, length, dim)), jnp.ones((texts, length), bool)
    counters = token_counters(jnp.arange(texts)[:, None], jnp.arange(length)[None])
    flat = {"kernel": jnp.zeros((dim, 4, 4)), "bias": jnp.ones((4, 4))}
    # Each head's four features, which are equal, become their mean.
    mean = jnp.repeat(jnp.eye(4), 4, axis=1).reshape(4, 1, dim) * jnp.full((1, 4, 1), 0.25)
    params = {"query": flat, "key": flat, "value": flat, "out": {"kernel": mean, "bias": jnp.zeros(dim)}}
    run = jax.jit(lambda key: attention.apply({"params": params}, x, mask, counters, rngs={"dropout": key}))
    kept = (
        np.asarray(run(jax.random.key(1)))[..., ::4].ravel() / 2 * length
    )  # of 16 weights, how many are left
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert abs(kept.mean() - 8) < 4 * 2 / math.sqrt(kept.size)
    assert abs(kept.var() - 4) < 4 * 4 * math.sqrt(2 / kept.size)


def test_pooling_by_hand():
    hidden = jnp.asarray([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 7.0], [np.nan, 0.0], [0.0, 0.0]]])
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(pool(hidden, mask, "mean"), [[2.0, 4.0], [5.0, 7.0]])
    np.testing.assert_array_equal(pool(hidden, mask, "cls"), [[1.0, 2.0], [5.0, 7.0]])
    assert pool(hidden.astype(jnp.bfloat16), mask, "mean").dtype == jnp.float32
    with pytest.raises(ValueError, match="pooling 'max': expected 'cls' or 'mean'"):
        pool(hidden, mask, "max")


def test_an_unknown_token_shows_and_a_long_text_is_refused(variables):
    ids, mask = random_text(0)
    ids[1, 0] = 60
    found = np.asarray(compiled(bert())(variables, ids, mask))
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, 0)).all()
    with pytest.raises(ValueError, match="texts of 21 tokens: the model has 20 positions"):
        compiled(bert())(variables, np.zeros((1, 21), np.int32), np.ones((1, 21), bool))
