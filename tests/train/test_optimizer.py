"""The learning rate at its corners, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.train.optimizer import decay_mask, make_optimizer, make_row_optimizer, make_schedule

from .. import tiny


def test_the_rate_rises_then_follows_a_cosine_down_to_its_share():
    schedule = make_schedule(
        tiny.config(train__steps=100, train__warmup=0.2, train__learning_rate=0.01, train__final_rate=0.1)
    )
    assert float(schedule(0)) == 0.0
    np.testing.assert_allclose(schedule(10), 0.005, rtol=1e-6)
    np.testing.assert_allclose(schedule(20), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(60), (0.01 + 0.001) / 2, rtol=1e-5)  # half way down the cosine
    np.testing.assert_allclose(schedule(100), 0.001, rtol=1e-5)
    np.testing.assert_allclose(schedule(150), 0.001, rtol=1e-5)


def test_warmup_and_decay_are_shares_of_the_steps():
    short = make_schedule(tiny.config(train__steps=50, train__warmup=0.1))
    long = make_schedule(tiny.config(train__steps=5000, train__warmup=0.1))
    for share in (0.02, 0.06, 0.1, 0.5, 0.9):
        np.testing.assert_allclose(short(round(50 * share)), long(round(5000 * share)), rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_without_warmup_the_peak_comes_first(steps: int):
    schedule = make_schedule(tiny.config(train__steps=steps, train__warmup=0.0, train__learning_rate=0.02))
    np.testing.assert_allclose(schedule(0), 0.02, rtol=1e-6)


def test_only_matrices_of_the_encoder_decay():
    for block in ("prenorm", "seed"):
        _, params, tables = tiny.bstm(20, model__block=block)
        mask = decay_mask({"params": params, "tables": tables})
        decaying = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, decays in jax.tree_util.tree_leaves_with_path(mask)
            if decays
        }
        feedforward = {"prenorm": ("gate", "up", "down"), "seed": ("up", "down")}[block]
        matrices = [f"attention/{name}" for name in ("query", "key", "value", "out")] + list(feedforward)
        assert decaying == {f"params/user/block_0/{name}/kernel" for name in matrices}


def test_the_same_matrices_decay_where_blocks_are_stacked():
    _, params, _ = tiny.bstm(20, model__layers=3, model__scan_layers=True)
    found = jax.tree_util.tree_leaves_with_path(decay_mask({"params": params}))
    names = [(jax.tree_util.keystr(path, simple=True, separator="/"), decays) for path, decays in found]
    assert all(decays == name.endswith("/kernel") for name, decays in names)
    assert sum(decays for _, decays in names) == 14, "seven of the stack, seven of the last block"


def test_decay_pulls_matrices_to_zero_without_a_gradient():
    c = tiny.config(train__weight_decay=0.5, train__warmup=0.0, train__learning_rate=0.1)
    tx = make_optimizer(c)
    tree = {
        "params": {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)},
        "tables": {"item_id": jnp.ones((3, 2))},
    }
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    np.testing.assert_allclose(updates["params"]["kernel"], -0.05, rtol=1e-6)  # rate × decay × 1
    assert not np.asarray(updates["params"]["scale"]).any()
    assert not np.asarray(updates["tables"]["item_id"]).any()


def test_the_config_names_the_row_optimizer():
    table = jnp.ones((4, 2))
    adagrad = make_row_optimizer(tiny.config(train__row_optimizer="adagrad"))
    assert adagrad.init(table).shape == (4,)
    adam = make_row_optimizer(tiny.config(train__row_optimizer="adam", train__beta2=0.5))
    ids, gradient = jnp.array([2]), jnp.array([[3.0, -1.0]])
    _, state = adam.update(table, adam.init(table), ids, gradient, jnp.float32(0.1))
    np.testing.assert_allclose(state.square[2], 0.5 * np.array([9.0, 1.0]), rtol=1e-6)
