"""How item tables start, and how an item's towers become its vector: by hand, and with some of them missing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dynrec_jax.models.item_encoder import ItemEncoder, init_tables
from dynrec_jax.models.model import make_bstm
from dynrec_jax.models.towers.ids import ID_TABLE, INDEX, SEEN
from dynrec_jax.negatives import Negatives, sampling
from dynrec_jax.parallel.rows import lazy_adam, rowwise_adagrad
from dynrec_jax.parallel.table import ids_of, rows_for
from dynrec_jax.train import step
from dynrec_jax.train.optimizer import make_optimizer
from dynrec_jax.train.state import abstract_state
from dynrec_jax.train.step import CompiledStep, Inputs, StepSettings

from .. import described, tiny

DIM = 16


def table(items: int, seed: int = 0) -> np.ndarray:
    made = jax.jit(lambda key: nn.meta.unbox(init_tables(key, items, DIM)))(jax.random.key(seed))
    return np.asarray(made[ID_TABLE])


@pytest.mark.parametrize("items", [3_000, 70_000])
def test_items_start_as_independent_normal_numbers_of_about_unit_length(items: int):
    made, rows = table(items), rows_for(items)
    id_R = ids_of(np.arange(rows), rows)
    real = (id_R >= 1) & (id_R <= items)
    assert not made[~real].any()
    x = made[real].astype(np.float64) * DIM**0.5
    # Means of n numbers of variance v lie within four times sqrt(v / n) but once in 16,000 tries.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) < 4 * (variance / x.size) ** 0.5
    assert np.abs(x).max() < 6
    for one, other in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[16:], x[:-16])):
        assert abs((one * other).mean()) < 4 / one.size**0.5
    assert abs((x * table(items, 1)[real] * DIM**0.5).mean()) < 4 / x.size**0.5


def test_a_large_table_takes_a_few_numbers_a_row_beside_itself():
    lowered = jax.jit(lambda key: nn.meta.unbox(init_tables(key, 200_000, DIM))).lower(jax.random.key(0))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 3 * 4 * rows_for(200_000)


# ---------------------------------------------------------------------------------------------- towers together

ITEMS, D = 12, 4
TOWERS = (described.attribute_tower(ITEMS), described.vector_tower(ITEMS))
KNOWS = {  # by hand: which items have an id's row, attributes, vectors
    "id": [1, 2, 4, 5, 9],
    "attributes_a": [i for i in range(1, 13) if i % 2],
    "vector0_v": [i for i in range(1, 13) if i % 5],
}
EVERYTHING = np.arange(ITEMS + 1)


def encoder(ids: bool = True, id_dropout: float = 0.0, towers: Any = TOWERS) -> ItemEncoder:
    made = tuple((tower.name, tower.make) for tower in towers)
    return ItemEncoder(made, ids, D, jnp.float32, id_dropout, unseen=True)


def describe(index: np.ndarray, ids: bool = True) -> dict[str, Any]:
    """What a step looks up of items by their numbers; 0 is padding, whose row is zeros."""
    rng = np.random.default_rng(2)
    table = rng.normal(size=(ITEMS + 1, D)).astype(np.float32)
    table[[i for i in range(ITEMS + 1) if i not in KNOWS["id"]]] = 0
    found: dict[str, Any] = {INDEX: index[..., None].astype(np.int32)}
    for tower in TOWERS:
        for name, values in tower.values.items():
            whole = np.concatenate([np.zeros((1, values.width), values.kind), values.rows(np.arange(ITEMS))])
            found[name] = whole[index]
    return {**found, ID_TABLE: table[index]} if ids else found


@functools.cache
def weights(ids: bool = True) -> Any:
    """Random ones, for as they start gates say nothing and the shared vector is zero."""
    shapes = nn.meta.unbox(jax.eval_shape(encoder(ids).init, jax.random.key(0), describe(EVERYTHING)))
    leaves, tree = jax.tree.flatten(shapes["params"])
    rng = np.random.default_rng(3)
    return jax.tree.unflatten(tree, [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: Any, params: Any, found: Any, key: Any) -> Any:
    return module.apply({"params": params}, found, key)


def apply(module: ItemEncoder, params: Any, found: Any, key: Any = None) -> np.ndarray:
    return np.asarray(_apply(module, params, found, key))


def alone(name: str, params: Any, found: Any) -> np.ndarray:
    """A tower's vectors, by its own module."""
    if name == "id":
        return np.asarray(found[ID_TABLE])
    make = next(tower.make for tower in TOWERS if tower.name == name)
    return np.asarray(make(D, jnp.float32).apply({"params": params[name]}, found)[0])


def by_hand(params: Any, found: Any, item: int, names: list[str]) -> np.ndarray:
    """Of one item: sum over its towers of K · softmax_K(gate) · vector, element by element, in float64."""
    v = {name: alone(name, params, found)[item].astype(np.float64) for name in names}
    gates = {name: params[f"{name}_gate"] for name in names}
    logits = np.stack([v[n] * D**0.5 @ gates[n]["kernel"] + gates[n]["bias"] for n in names])
    share = np.exp(logits) / np.exp(logits).sum(axis=0)
    return len(names) * (share * np.stack(list(v.values()))).sum(axis=0)


@pytest.mark.parametrize("ids", [True, False])
def test_the_gate_by_hand(ids: bool):
    """Items miss any of the towers, also all of them: these share a vector, and padding has none."""
    params, found = weights(ids), describe(EVERYTHING, ids)
    v = apply(encoder(ids), params, found)
    seen = set()
    for item in range(1, ITEMS + 1):
        names = [name for name, known in KNOWS.items() if item in known and (ids or name != "id")]
        seen.add(len(names))
        expected = by_hand(params, found, item, names) if names else params["unknown"]
        np.testing.assert_allclose(v[item], expected, rtol=1e-4, atol=1e-5, err_msg=str((item, names)))
    assert seen >= ({1, 2, 3} if ids else {1, 2})
    assert not v[0].any()


def test_nothing_known_gets_the_shared_vector_and_finite_gradients():
    params, found = weights(), describe(np.array([0, 3, 12, 6]))
    found = {
        name: np.where(np.arange(4)[:, None] == 3, 0, x) if name != INDEX else x for name, x in found.items()
    }
    assert not any(found[name][3].any() for name in found if name != INDEX)
    module = encoder()
    v = apply(module, params, found)
    np.testing.assert_array_equal(v[3], params["unknown"])

    def total(params: Any, row: Any) -> Any:
        given = {**found, ID_TABLE: row}
        return jnp.sum(jnp.sin(module.apply({"params": params}, given)[jnp.array([0, 3])]))

    of_params, of_row = jax.jit(jax.grad(total, (0, 1)))(params, found[ID_TABLE])
    for path, gradient in jax.tree_util.tree_leaves_with_path((of_params, of_row)):
        assert np.isfinite(gradient).all(), path
    np.testing.assert_allclose(of_params.pop("unknown"), np.cos(params["unknown"]), rtol=1e-5)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((of_params, of_row)))


def test_a_single_tower_needs_no_gate():
    module = encoder(ids=False, towers=TOWERS[1:])
    params = {name: weights()[name] for name in ("vector0_v", "unknown")}
    found = describe(EVERYTHING, ids=False)
    v = apply(module, params, found)
    for item in range(1, ITEMS + 1):
        known = item in KNOWS["vector0_v"]
        expected = alone("vector0_v", params, found)[item] if known else params["unknown"]
        np.testing.assert_allclose(v[item], expected, rtol=1e-6)
    assert not v[0].any()


def test_id_dropout_takes_the_same_items_wherever_they_are_met():
    """In a history, as a row of the catalogue, in another part of the batch: by key and item alone."""
    params, module, key = weights(), encoder(id_dropout=0.5), jax.random.key(8)
    catalogue = apply(module, params, describe(EVERYTHING), key)
    places = np.array([[4, 1, 0, 9], [2, 4, 5, 1]])
    np.testing.assert_allclose(apply(module, params, describe(places), key), catalogue[places], atol=1e-6)
    without = {**describe(EVERYTHING), ID_TABLE: np.zeros((ITEMS + 1, D), np.float32)}
    whole, bare = (apply(module, params, found) for found in (describe(EVERYTHING), without))
    for item in range(ITEMS + 1):
        either = [np.allclose(catalogue[item], each[item], atol=1e-6) for each in (whole, bare)]
        assert any(either), item
    # Without a key nothing is dropped; with others, other items are.
    dropped = [
        (np.abs(apply(module, params, describe(EVERYTHING), jax.random.key(k)) - whole) > 1e-6).any(axis=1)
        for k in range(4)
    ]
    assert {tuple(row) for row in np.array(dropped)[:, KNOWS["id"]].tolist()} != {
        tuple(dropped[0][KNOWS["id"]])
    }


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_id_dropout_takes_about_the_right_share(share: float):
    index = np.arange(1, 20_001)
    found = {INDEX: index[:, None].astype(np.int32), ID_TABLE: np.ones((len(index), D), np.float32)}
    module = ItemEncoder((), True, D, jnp.float32, share, unseen=True)
    v = apply(module, {"unknown": np.zeros(D, np.float32)}, found, jax.random.key(1))
    gone = ~v.any(axis=1)
    assert abs(gone.mean() - share) < 4 * (share * (1 - share) / len(index)) ** 0.5
    # Neighbours are drawn apart.
    both = (gone[1:] & gone[:-1]).mean()
    assert abs(both - share**2) < 5 * (share**2 / len(index)) ** 0.5


def test_ids_alone_are_their_rows_and_have_no_weights():
    module = ItemEncoder(dim=D, id_dropout=0.5)
    found = {ID_TABLE: jnp.asarray(describe(EVERYTHING)[ID_TABLE])}
    assert module.init(jax.random.key(0), found) == {}
    np.testing.assert_array_equal(module.apply({}, found, jax.random.key(1)), found[ID_TABLE])
    model = make_bstm(tiny.config(), ITEMS)
    assert model.rows_are_vectors
    assert "item" not in jax.eval_shape(model.init, jax.random.key(0))["params"]


# ------------------------------------------------------------------------- rows of items that training has not seen

UNSEEN = [2, 7, 11]
CASES = {
    "sampled by adam, aligned": {
        "loss__kind": "sampled",
        "loss__alignment": 0.5,
        "train__row_optimizer": "adam",
    },
}
MORE = {
    "full, aligned": {"loss__alignment": 0.5},
    "full": {},
    "full, normalised": {"model__normalise": True},
    "sampled by adagrad": {"loss__kind": "sampled"},
    "ensemble": {"item__fusion": "ensemble"},
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_rows_of_unseen_items_stay_exactly_zero(case: str):
    """They are drawn as negatives, and are rows of the catalogue, but no history has them."""
    keys: dict[str, Any] = {"item__fusion": "both", "item__vectors": ("v",), "item__id_dropout": 0.3}
    c = tiny.config(model__backward_weight=0.0, train__warmup=0.0, **{**keys, **{**CASES, **MORE}[case]})
    model, mesh, tx = make_bstm(c, ITEMS, TOWERS), tiny.mesh(1, 1, 1), make_optimizer(c)
    assert not model.rows_are_vectors
    rows = lazy_adam() if c.train.row_optimizer == "adam" else rowwise_adagrad()
    template, shardings = abstract_state(model, tx, rows, mesh)
    state = described.state(template, UNSEEN)
    settings = StepSettings(seed=1, accumulation=1, clip_norm=0.0, sampling=sampling(c, ITEMS))
    schedule = optax.constant_schedule(0.1)
    run = CompiledStep(mesh, shardings, model=model, tx=tx, row_tx=rows, schedule=schedule, settings=settings)
    features = {name: jnp.asarray(np.zeros((rows_for(ITEMS), x.width), x.kind)).at[1 : ITEMS + 1].set(
        x.rows(np.arange(ITEMS))) for tower in TOWERS for name, x in tower.values.items()}  # fmt: skip
    features[SEEN] = jnp.ones((rows_for(ITEMS), 1), jnp.int32).at[jnp.array(UNSEEN)].set(0)
    windows = [[3, 1, 8, 8], [5, 4, 5], [9, 10, 12, 6, 1], [12, 3]]
    batch = tiny.batch([[(n, window)] for n, window in enumerate(windows, 1)] + [[]] * 4, 9)
    drawn = Negatives(jnp.array([2, 7, 3, 11], jnp.int32), jnp.zeros(4))
    before = np.asarray(state.tables[ID_TABLE]).copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "draw_negatives", lambda *_: drawn)
        for _ in range(4):
            state, metrics = run(state, Inputs(batch, features=features))
            assert np.isfinite(float(metrics["loss"]))
            assert np.isfinite(float(metrics["gradient_norm"]))
    table = np.asarray(state.tables[ID_TABLE])
    assert not table[UNSEEN].any()
    assert not table[0].any()
    trained = sorted({item for window in windows for item in window})
    assert (np.abs(table - before)[trained].max(axis=1) > 1e-4).all()
