"""The encoder in fewer bits and with fewer weights: which of its arrays change, and by how much."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dynrec_jax.batch import History
from dynrec_jax.models.blocks import BLOCKS
from dynrec_jax.models.compressed import Rounded, compressed_encoder, encoder_bytes, pruned, restored
from dynrec_jax.models.features import Items
from dynrec_jax.models.layers import Dense

from .. import described, tiny

ITEMS = 20
MODELS: dict[str, dict[str, Any]] = {
    **{block: {"model__block": block} for block in BLOCKS},
    "interests and time": {"model__interests": 2, "model__time": ("bias", "sinusoidal"), "model__heads": 4},
    "stacked layers": {"model__layers": 3, "model__scan_layers": True},
}


def names(path: Any) -> tuple[str, ...]:
    return tuple(str(key.key) for key in path if hasattr(key, "key"))


def leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """Arrays by their names; one that is rounded is one of them."""
    found = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Rounded))
    return {names(path): leaf for path, leaf in found}


def inputs(model: Any, params: Any) -> dict[tuple[str, ...], int]:
    """How many axes go into each linear map, as the modules themselves say when they are called."""
    found = {}

    def look(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        if isinstance(context.module, Dense) and context.method_name in ("__call__", "kernel"):
            found[*context.module.path, "kernel"] = context.module.inputs
        return call(*arguments, **named)

    one = jnp.ones((1, 8), jnp.int32)
    history = History(one, one, one, one[:, 0])
    with nn.intercept_methods(look):
        jax.eval_shape(lambda: model.last_vector(params, jnp.ones((1, 8, 8)), history))
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_each_output_channel_of_a_matrix_has_a_scale(kind: str):
    model, params, _ = tiny.bstm(ITEMS, **MODELS[kind])
    params = tiny.shaken(params)
    before, after = leaves(params), leaves(compressed_encoder(params, "int8"))
    goes_in = inputs(model, params)
    rounded = {path for path, leaf in after.items() if isinstance(leaf, Rounded)}
    recurrent = {path for path in before if path[-1] == "recurrent"}
    assert rounded == goes_in.keys() | recurrent
    assert bool(recurrent) == (kind == "gru")
    assert rounded or kind == "mean"
    for path, leaf in after.items():
        if path not in rounded:
            np.testing.assert_array_equal(leaf, before[path])
            continue
        matrix, stacked = np.asarray(before[path]), "blocks" in path
        axes = tuple(range(stacked, stacked + goes_in.get(path, 1)))
        largest = np.abs(matrix).max(axis=axes, keepdims=True)
        assert leaf.values.dtype == jnp.int8
        np.testing.assert_allclose(leaf.scales, largest / 127, rtol=1e-5)
        back = np.asarray(leaf.values, np.float32) * np.asarray(leaf.scales)
        assert (np.abs(back - matrix) <= np.asarray(leaf.scales) * 0.501).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_what_is_restored_reads_histories_almost_alike(kind: str):
    model, params, tables = tiny.bstm(ITEMS)
    params = tiny.shaken(params)
    items = jnp.array([[3, 8, 1, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12]])
    read = jax.jit(
        lambda params: model.last_vector(restored(params), tables["item_id"][items], History(items))
    )
    small = compressed_encoder(params, kind)
    exact, found = read(params), read(small)
    assert 0 < np.abs(exact - found).max() < 0.03 * np.abs(exact).max()
    assert encoder_bytes(small) < encoder_bytes(params) * (0.75 if kind == "bfloat16" else 0.6)
    assert compressed_encoder(params, "float32") is not None
    np.testing.assert_array_equal(read(compressed_encoder(params, "float32")), exact)


@pytest.mark.parametrize("kind", MODELS)
def test_the_smallest_weights_of_each_matrix_are_set_to_zero(kind: str):
    model, params, _ = tiny.bstm(ITEMS, **MODELS[kind])
    params = tiny.shaken(params)
    before, after = leaves(params), leaves(pruned(params, 0.3))
    changed = inputs(model, params).keys() | {path for path in before if path[-1] == "recurrent"}
    for path, leaf in after.items():
        if path not in changed:
            np.testing.assert_array_equal(leaf, before[path])
            continue
        layers = zip(before[path], leaf, strict=True) if "blocks" in path else [(before[path], leaf)]
        for old, new in layers:
            gone = np.asarray(new) == 0
            assert gone.sum() == round(0.3 * gone.size)
            np.testing.assert_array_equal(new[~gone], old[~gone])
            assert np.abs(old[gone]).max() < np.abs(old[~gone]).min()


def test_of_an_ensemble_both_encoders_change_and_no_item_encoder_does():
    c = tiny.config(item__fusion="ensemble", item__attributes=("a",))
    model = Items(ITEMS, towers=(described.attribute_tower(ITEMS),)).model(c)
    params = tiny.shaken(nn.meta.unbox(model.init(jax.random.key(0)))["params"])
    for after in (pruned(params, 0.5), compressed_encoder(params, "int8")):
        before, after = leaves(params), leaves(after)
        changed = {
            path for path, leaf in after.items() if isinstance(leaf, Rounded) or (leaf != before[path]).any()
        }
        assert {path[:2] for path in changed} == {("id", "user"), ("text", "user")}
        assert any(path[:2] == ("text", "item") for path in before)
