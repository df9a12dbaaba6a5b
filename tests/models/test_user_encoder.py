"""The user encoder: which way it looks, and that packing and direction are what they are said to be."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from dynrec_jax.batch import History
from dynrec_jax.models import attention as attention_module
from dynrec_jax.models.attention import Direction, Way, attention
from dynrec_jax.models.blocks import BLOCKS, BlockSettings, Places
from dynrec_jax.models.layers import Dropout
from dynrec_jax.models.model import make_bstm
from dynrec_jax.models.user_encoder import Moments, Sight, UserEncoder, moments
from dynrec_jax.parallel import rules
from dynrec_jax.train.flops import training_cost

from .. import tiny

WINDOW = [4, 9, 2, 7, 7]
ROWS, LENGTH, DIM, LAYERS = 2, 12, 8, 3


def test_the_mask_looks_one_way_within_a_window():
    batch = tiny.batch([[(2, [1, 1, 1]), (5, [1, 1])]], 6)
    equal_1x1x6x1, own_1x1x6x6 = jnp.zeros((1, 1, 6, 1)), jnp.eye(6)[None, None]

    def looked_at(direction: Direction) -> np.ndarray:
        reach = batch.positions if direction == "forward" else batch.remaining
        weights = attention(equal_1x1x6x1, equal_1x1x6x1, own_1x1x6x6, reach, Way(direction))
        return (np.asarray(weights)[0, 0] > 0).astype(int)

    forward = looked_at("forward")
    assert forward[:5].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
    ]
    assert not forward[:5, 5].any(), "padding is looked at by no event"
    assert looked_at("backward").tolist() == forward.T.tolist()


def test_moments_of_rows_with_one_history():
    at = moments(History(jnp.asarray([[5, 6, 0], [0, 0, 0]])))
    assert np.asarray(at.segments).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert np.asarray(at.positions).tolist() == [[0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("block", ["prenorm", "seed"])
def test_packed_histories_give_the_vectors_they_give_alone(block: str):
    model, params, tables = tiny.bstm(20, model__block=block, model__dropout=0.4)
    packed = tiny.batch([[(2, [3, 1]), (1, WINDOW)], []], 8)
    alone = tiny.batch([[(1, WINDOW)], [(2, [3, 1])]], 8)

    @jax.jit
    def vectors(items, segments, positions):
        rows = tables["item_id"][items]
        return model.user_vectors(params, rows, Moments(segments, positions), "forward", jax.random.key(1))

    a = np.asarray(vectors(packed.items, packed.segments, packed.positions))
    b = np.asarray(vectors(alone.items, alone.segments, alone.positions))
    np.testing.assert_allclose(a[0, 2:7], b[0, :5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a[0, :2], b[1, :2], rtol=1e-5, atol=1e-6)


def test_backward_is_forward_over_the_reversed_history_but_for_the_direction_vector():
    model, params, tables = tiny.bstm(20)
    items, reverse = jnp.asarray([WINDOW]), jnp.asarray([WINDOW[::-1]])
    segments, up = jnp.ones((1, 5), jnp.int32), jnp.arange(5, dtype=jnp.int32)[None]
    swapped = jax.tree.map(lambda x: x, params)
    swapped["user"]["direction"] = params["user"]["direction"][::-1]

    @jax.jit
    def both():
        rows, rows_reverse = tables["item_id"][items], tables["item_id"][reverse]
        backward = model.user_vectors(params, rows, Moments(segments, up[:, ::-1]), "backward")
        forward = model.user_vectors(swapped, rows_reverse, Moments(segments, up), "forward")
        plain = model.user_vectors(params, rows_reverse, Moments(segments, up), "forward")
        return backward[:, ::-1], forward, plain

    backward, forward, plain = (np.asarray(x) for x in both())
    np.testing.assert_allclose(backward, forward, rtol=1e-5, atol=1e-6)
    assert np.abs(forward - plain).max() > 1e-3, "the direction vector tells the traversals apart"


def test_the_order_of_a_history_matters():
    model, params, tables = tiny.bstm(20)
    items = jnp.asarray([[4, 9, 2, 7], [9, 4, 2, 7]])
    u = np.asarray(jax.jit(lambda: model.last_vector(params, tables["item_id"][items], History(items)))())
    assert np.abs(u[0] - u[1]).max() > 1e-3


def test_the_last_vector_is_that_of_the_last_event():
    model, params, tables = tiny.bstm(20)
    items = jnp.asarray([[4, 9, 2, 0], [4, 9, 2, 7], [0, 0, 0, 0]])

    @jax.jit
    def run():
        rows = tables["item_id"][items]
        history = History(items)
        return model.last_vector(params, rows, history), model.user_vectors(params, rows, moments(history))

    last, every = (np.asarray(x) for x in run())
    # Two routes: the last block makes one vector of each history here, and all of them there.
    # Some of the last bits: values are about 1.
    np.testing.assert_allclose(last[0], every[0, 2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(last[1], every[1, 3], rtol=0, atol=1e-6)
    assert not last[2].any(), "an empty history says nothing"


def timed(buckets: int) -> Sight:
    return Sight(time=("bias",), time_buckets=buckets)


def encoder(**changes: Any) -> UserEncoder:
    settings = {
        "max_length": LENGTH,
        "layers": LAYERS,
        "heads": 2,
        "block": "prenorm",
        "feedforward": 4.0,
        "dropout": 0.0,
        "dtype": jnp.float32,
        "sight": Sight(),
        "interests": 1,
        "remat": "none",
        "scan_layers": False,
    }
    return UserEncoder(**{**settings, **changes})


def histories(direction: Direction = "forward") -> tuple[jax.Array, Moments]:
    """Item vectors of a row of two histories and padding, and of a full row, with times."""
    batch = tiny.batch([[(1, [1] * 4), (2, [1] * 5)], [(3, [1] * LENGTH)]], LENGTH)
    rng = np.random.default_rng(0)
    positions = batch.positions if direction == "forward" else batch.remaining
    times = np.sort(rng.integers(0, 10**6, (ROWS, LENGTH)), axis=1).astype(np.int32)
    x = rng.normal(size=(ROWS, LENGTH, DIM)).astype(np.float32)
    return jnp.asarray(x), Moments(batch.segments, positions, jnp.asarray(times))


def weights(module: UserEncoder) -> Any:
    """Random ones, those that begin as zeros or ones too."""
    x, at = histories()
    shapes = jax.eval_shape(lambda: nn.meta.unbox(module.init(jax.random.key(0), x, at)))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype) for leaf in leaves]
    )


def test_an_encoder_that_knows_of_time_needs_the_times():
    x, at = histories()
    with pytest.raises(ValueError, match=r"Moments.times is None; expected int32\[B, L\]"):
        encoder(sight=timed(8)).init(jax.random.key(0), x, at._replace(times=None))


def test_the_bias_by_time_counts_gaps_in_every_block():
    module = encoder(layers=2, sight=timed(16))
    params = weights(module)
    x, at = histories()

    @jax.jit
    def run(params: Any) -> Any:
        def total(params: Any, at: Moments) -> jax.Array:
            return (module.apply({"params": params}, x, at) ** 3).sum()

        without = jax.tree_util.tree_map_with_path(
            lambda path, leaf: 0 * leaf if path[-1].key == "time_bias" else leaf, params
        )
        later, stretched = at._replace(times=at.times + 77), at._replace(times=at.times * 50)
        values = [total(params, at), total(params, later), total(params, stretched)]
        return [*values, total(without, at), total(without, stretched)], jax.grad(total)(params, at)

    (value, later, stretched, without, without_stretched), gradient = run(params)
    np.testing.assert_allclose([later, without_stretched], [value, without], rtol=1e-6)
    assert min(abs(stretched - value), abs(without - value)) > 1e-4 * abs(value)
    for block in ("block_0", "block_1"):
        assert abs(gradient[block]["attention"]["time_bias"]).max() > 1e-3


def test_with_times_backward_is_forward_over_the_reversed_history_and_its_mirrored_times():
    module = encoder(layers=2, sight=timed(16))
    params = weights(module)
    swapped = {**params, "direction": params["direction"][::-1]}
    x, at = histories("backward")
    mirrored = Moments(*(a[:, ::-1] for a in at[:2]), 10**6 - at.times[:, ::-1])

    @jax.jit
    def both() -> Any:
        backward = module.apply({"params": params}, x, at, "backward")
        return backward[:, ::-1], module.apply({"params": swapped}, x[:, ::-1], mirrored, "forward")

    np.testing.assert_allclose(*both(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_vector_read_alone_is_that_among_all_with_times_too(scan_layers: bool):
    module = encoder(sight=timed(16), scan_layers=scan_layers)
    params = weights(module)
    x, at = histories()
    read = jnp.asarray([6, 11])

    @jax.jit
    def both() -> Any:
        variables = {"params": params}
        return module.apply(variables, x, at, read_B=read)[:, 0], module.apply(variables, x, at)

    alone, every = both()
    np.testing.assert_allclose(alone, every[np.arange(ROWS), read], rtol=1e-5, atol=1e-5)


def gradient_of(module: UserEncoder, direction: Direction = "forward") -> Any:
    x, at = histories(direction)

    def total(params: Any, key: Any) -> jax.Array:
        u = module.apply({"params": params}, x, at, direction, rngs={"dropout": key})
        return (u**3).sum()

    return jax.value_and_grad(total)


def assert_trees_close(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(abs(b).max()))


def test_computing_again_changes_no_number_with_dropout_too():
    changes = {"block": "seed", "dropout": 0.3, "layers": 1}
    params, key = weights(encoder(**changes)), jax.random.key(3)
    expected = jax.jit(gradient_of(encoder(**changes)))(params, key)
    for remat in ("block", "products"):
        assert_trees_close(jax.jit(gradient_of(encoder(**changes, remat=remat)))(params, key), expected)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_kept_and_what_is_computed_again(scan_layers: bool):
    kept, products = {}, {}
    for remat in ("none", "products", "block"):
        module = encoder(remat=remat, scan_layers=scan_layers, sight=timed(8))
        params = weights(module)
        x, at = histories()

        def encode(params: Any, module: UserEncoder = module, x: Any = x, at: Any = at) -> jax.Array:
            return module.apply({"params": params}, x, at)

        back = jax.eval_shape(lambda params, encode=encode: jax.vjp(encode, params)[1], params)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(back)) - sum(
            leaf.size for leaf in jax.tree.leaves(params)
        )
        gradient = jax.make_jaxpr(gradient_of(module))(params, jax.random.key(0)).jaxpr
        products[remat] = count_products(gradient)
    activation = ROWS * LENGTH * DIM
    # Inputs of the blocks and of the last norm; and numbers of an event: where it may look, its time.
    assert kept["block"] < (LAYERS + 3) * activation
    # Of a block also query, key, value, means and what comes of them, gate and up of 3 D each, and the normaliser.
    of_block = 11 * activation + ROWS * LENGTH * 2
    assert kept["products"] == kept["block"] + LAYERS * of_block < kept["none"]
    assert products["products"] == products["none"] < products["block"]


@pytest.mark.parametrize("remat", ["none", "products", "block"])
def test_no_scan_over_blocks_computes_masks_or_ones_of_all_tiles_ahead(
    monkeypatch: pytest.MonkeyPatch, remat: str
):
    """They are the same in each block, and JAX moves what does not change out of a scan: `L × L` in all."""
    for name, value in (("SHORT", 0), ("TILE", 8), ("ALIGN", 8)):
        monkeypatch.setattr(attention_module, name, value)
    length, tiles = 128, 16 * 17 // 2
    module = encoder(max_length=length, sight=timed(8), remat=remat, scan_layers=True)
    x, numbers = jnp.zeros((1, length, DIM)), jnp.zeros((1, length), jnp.int32)
    at = Moments(numbers, numbers, numbers)

    def total(params: Any) -> jax.Array:
        return module.apply({"params": params}, x, at).sum()

    traced = jax.make_jaxpr(jax.grad(total))(weights(module))
    largest = max(variable.aval.size for e in equations(traced.jaxpr) for variable in e.outvars)
    assert largest < tiles * 8 * 8


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of inner functions and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def count_products(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == "dot_general"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += sum(times * count_products(inner) for inner in jaxprs_in_params(equation.params))
    return total


def stacked(params: Any) -> Any:
    """The unrolled encoder's parameters as the scanned one holds them."""
    first = [params[f"block_{layer}"] for layer in range(LAYERS - 1)]
    rest = {name: value for name, value in params.items() if name not in ("block_0", "block_1")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *first)}


def test_scanned_blocks_that_are_computed_again_are_the_unrolled_ones():
    unrolled = encoder(sight=timed(8))
    params, key = weights(unrolled), jax.random.key(0)
    value, gradient = jax.jit(gradient_of(unrolled, "backward"))(params, key)
    scanned = encoder(sight=timed(8), remat="block", scan_layers=True)
    found = jax.jit(gradient_of(scanned, "backward"))(stacked(params), key)
    assert_trees_close(found, (value, stacked(gradient)))


class Doubled(nn.Module):
    """Instead of a block: what comes in twice, and ones with dropout."""

    settings: BlockSettings

    @nn.compact
    def __call__(self, x: jax.Array, at: Places) -> jax.Array:
        return 2 * x + Dropout(self.settings.dropout)(jnp.ones_like(x), at.counters)


def test_each_scanned_block_draws_its_own_dropout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BLOCKS, "doubled", Doubled)
    module = encoder(block="doubled", dropout=0.5, scan_layers=True)
    x, at = histories()
    params = {name: 0 * leaf for name, leaf in weights(module).items() if name != "norm"}
    params["norm"] = {"scale": jnp.ones(DIM), "bias": jnp.zeros(DIM)}
    u = module.apply({"params": params}, 0 * x, at, rngs={"dropout": jax.random.key(0)})
    # Three draws make eight sums of 4, 2 and 1; if both scanned blocks drew the same, there would be four.
    distinct = [len(np.unique(np.round(features, 3))) for features in np.asarray(u).reshape(-1, DIM)]
    assert max(distinct) > 4


def test_in_bfloat16_gradients_are_near_those_in_float32():
    changes = {"sight": timed(8), "layers": 2, "scan_layers": True}
    exact, half = encoder(**changes), encoder(**changes, dtype=jnp.bfloat16)
    params = weights(exact)

    (_, expected), (_, found) = (
        jax.jit(gradient_of(module))(params, jax.random.key(0)) for module in (exact, half)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


def test_stacked_parameters_carry_their_names_and_count_as_unrolled_ones_do():
    model, unrolled = (
        make_bstm(tiny.config(model__layers=LAYERS, model__scan_layers=scan), 20) for scan in (True, False)
    )
    boxed, other = (jax.eval_shape(m.init, jax.random.key(0))["params"] for m in (model, unrolled))
    params = nn.meta.unbox(boxed)
    assert training_cost(model, params, 6) == training_cost(unrolled, nn.meta.unbox(other), 6)
    assert params["user"]["blocks"]["attention"]["query"]["kernel"].shape == (LAYERS - 1, 8, 2, 4)
    blocks = rules.tree_shardings(tiny.mesh(2, 2, 2), boxed)["user"]["blocks"]
    assert blocks["attention"]["query"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert blocks["attention_norm"]["scale"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("block", ["gru", "mean"])
def test_a_block_without_attention_over_events_knows_no_relative_positions(block: str):
    told, params, tables = tiny.bstm(20, model__block=block, model__positions="relative")
    untold, same, _ = tiny.bstm(20, model__block=block, model__positions="none")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same)
    history = History(jnp.asarray([[*WINDOW, 0, 0, 0]]))
    v = tables["item_id"][history.items]
    np.testing.assert_array_equal(
        told.last_vector(params, v, history), untold.last_vector(params, v, history)
    )
