"""The losses against dense references in float64, and what sampling is worth."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax import losses
from dynrec_jax.parallel.blocks import Blocks
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import rows_for

from . import tiny

ITEMS, DIM, SCALE = 23, 5, 0.8
FLOAT = jnp.dtype("float32")
MESHES = [
    ((2, 2, 2), 1),
    ((1, 1, 8), 1),
    ((2, 2, 1), 2),
    ((1, 2, 2), 2),
    pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
    pytest.param((1, 8, 1), 1, marks=pytest.mark.slow),
]
BLOCKS = Blocks(ITEMS, SCALE, 8, 4)


def inputs(seed: int = 0, rows: int = 2, length: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    valid = rng.random((rows, length)) < 0.7
    return {
        "query": rng.normal(size=(rows, length, DIM)).astype(np.float32),
        "target": rng.integers(1, ITEMS + 1, (rows, length)).astype(np.int32),
        "valid": valid,
        "table": rng.normal(size=(rows_for(ITEMS), DIM)).astype(np.float32),
    }


def gathered(x: dict[str, np.ndarray], query: Any, table: Any) -> losses.Positions:
    return losses.gather_positions(
        query, table[x["target"]], jnp.asarray(x["target"]), jnp.asarray(x["valid"])
    )


def softmax(s: np.ndarray) -> np.ndarray:
    return np.exp(s) / np.exp(s).sum()


def dense_full(x: dict[str, np.ndarray]) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and its gradients to queries and table, one position at a time."""
    loss, dq, dv = 0.0, np.zeros(x["query"].shape), np.zeros(x["table"].shape)
    v = x["table"][1 : ITEMS + 1].astype(np.float64)
    for b, t in zip(*np.nonzero(x["valid"]), strict=True):
        u, target = x["query"][b, t].astype(np.float64), x["target"][b, t]
        p = softmax(SCALE * v @ u)
        loss -= np.log(p[target - 1])
        p[target - 1] -= 1.0
        dq[b, t] = SCALE * p @ v
        dv[1 : ITEMS + 1] += SCALE * np.outer(p, u)
    return loss, dq, dv


def dense_sampled(
    x: dict[str, np.ndarray], ids: np.ndarray, log_expected: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """As `dense_full`, over the target and those negatives that are neither the target nor padding."""
    loss, dq, dv = 0.0, np.zeros(x["query"].shape), np.zeros(x["table"].shape)
    table = x["table"].astype(np.float64)
    for b, t in zip(*np.nonzero(x["valid"]), strict=True):
        u, target = x["query"][b, t].astype(np.float64), x["target"][b, t]
        kept = (ids != target) & (ids != 0)
        rows = np.concatenate([[target], ids[kept]])
        p = softmax(SCALE * table[rows] @ u - np.concatenate([[0.0], log_expected[kept]]))
        loss -= np.log(p[0])
        p[0] -= 1.0
        dq[b, t] = SCALE * p @ table[rows]
        np.add.at(dv, rows, SCALE * np.outer(p, u))
    return loss, dq, dv


def dense_gbce(
    x: dict[str, np.ndarray], ids: np.ndarray, beta: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """As `dense_sampled`, by the formula of gBCE."""
    loss, dq, dv = 0.0, np.zeros(x["query"].shape), np.zeros(x["table"].shape)
    table = x["table"].astype(np.float64)
    for b, t in zip(*np.nonzero(x["valid"]), strict=True):
        u, target = x["query"][b, t].astype(np.float64), x["target"][b, t]
        rows = np.concatenate([[target], ids[(ids != target) & (ids != 0)]])
        sigma = 1 / (1 + np.exp(-SCALE * table[rows] @ u))
        loss -= (beta * np.log(sigma[0]) + np.log(1 - sigma[1:]).sum()) / (len(ids) + 1)
        ds = np.concatenate([[-beta * (1 - sigma[0])], sigma[1:]]) / (len(ids) + 1)
        dq[b, t] = SCALE * ds @ table[rows]
        np.add.at(dv, rows, SCALE * np.outer(ds, u))
    return loss, dq, dv


def test_positions_with_a_target_come_first_and_in_order():
    x = inputs()
    at = gathered(x, jnp.asarray(x["query"]), jnp.asarray(x["table"]))
    count = int(x["valid"].sum())
    assert at.number.tolist() == [count]
    np.testing.assert_array_equal(at.query[:count], x["query"][x["valid"]])
    np.testing.assert_array_equal(at.target[:count], x["target"][x["valid"]])
    np.testing.assert_array_equal(at.vector[:count], x["table"][x["target"][x["valid"]]])
    np.testing.assert_array_equal(at.weight, np.arange(x["valid"].size) < count)


def test_the_full_softmax_is_the_dense_cross_entropy():
    x = inputs()

    def loss(query: Any, table: Any) -> Any:
        return losses.full_softmax(gathered(x, query, table), table, BLOCKS, FLOAT)

    value, (dq, dv) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x["query"], x["table"])
    expected, expected_dq, expected_dv = dense_full(x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dq, expected_dq, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(dv, expected_dv, rtol=1e-5, atol=2e-6)


def some_negatives(x: dict[str, np.ndarray], logq: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logs of expected counts: some are targets, one is twice there, and two are padding."""
    rng = np.random.default_rng(1)
    ids = np.concatenate([x["target"][x["valid"]][:4], rng.integers(1, ITEMS + 1, 7), [0, 0]]).astype(
        np.int32
    )
    ids[5] = ids[6]
    log_expected = rng.normal(size=13) if logq else np.zeros(13)
    return ids, np.where(ids == 0, 0, log_expected).astype(np.float32)


@pytest.mark.parametrize("logq", [True, False])
def test_the_sampled_softmax_is_the_dense_one_with_hits_and_padding_left_out(logq: bool):
    x = inputs()
    ids, log_expected = some_negatives(x, logq)
    x["table"][0] = 9.0  # would count, were padding scored

    def loss(query: Any, table: Any) -> Any:
        at = gathered(x, query, table)
        drawn = losses.Negatives(jnp.asarray(ids), jnp.asarray(log_expected))
        return losses.sampled_softmax(at, table[ids], drawn, BLOCKS, FLOAT)

    value, (dq, dv) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x["query"], x["table"])
    expected, expected_dq, expected_dv = dense_sampled(x, ids, log_expected)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dq, expected_dq, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(dv, expected_dv, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    # α = 13/22; β = α (t (1 - 1/α) + 1/α) = 1 - t (1 - α): 1, 1 - 0.75 · 9/22, and α.
    ("calibration", "beta"),
    [(0.0, 1.0), (0.75, 1 - 0.75 * 9 / 22), (1.0, 13 / 22)],
)
def test_gbce_is_its_formula(calibration: float, beta: float):
    x = inputs()
    ids, log_expected = some_negatives(x, True)  # what was expected plays no part

    def loss(query: Any, table: Any) -> Any:
        at = gathered(x, query, table)
        drawn = losses.Negatives(jnp.asarray(ids), jnp.asarray(log_expected))
        return losses.generalised_bce(at, table[ids], drawn, BLOCKS, FLOAT, calibration)

    value, (dq, dv) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x["query"], x["table"])
    expected, expected_dq, expected_dv = dense_gbce(x, ids, beta)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dq, expected_dq, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dv, expected_dv, rtol=1e-5, atol=1e-6)


def one_position(score: float) -> losses.Positions:
    """Of a 1-D model whose items score what their vectors say."""
    return losses.Positions(
        jnp.ones((1, 1)), jnp.full((1, 1), score), jnp.array([1]), jnp.ones(1), jnp.array([1])
    )


def test_gbce_by_hand_and_far_from_zero():
    """Target 0.5, negatives 1 and -2, N = 5, t = 0.5: α = 1/2, β = 3/4."""
    drawn = losses.Negatives(jnp.array([2, 3]), jnp.zeros(2))
    run = jax.jit(lambda at, v: losses.generalised_bce(at, v, drawn, Blocks(5, 1.0, 8, 4), FLOAT, 0.5))
    # log σ(0.5) = -0.4740770, log(1 - σ(1)) = -1.3132617, log(1 - σ(-2)) = -0.1269280
    by_hand = (0.75 * 0.4740770 + 1.3132617 + 0.1269280) / 3
    found = run(one_position(0.5), jnp.array([[1.0], [-2.0]]))
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)
    far = run(one_position(-500.0), jnp.array([[700.0], [-900.0]]))
    np.testing.assert_allclose(far, (0.75 * 500 + 700) / 3, rtol=1e-6)


def test_the_partition_sum_over_negatives_is_unbiased():
    """Three items, two draws, target 1: all nine pairs of draws, each as likely as it is."""
    score, q = np.array([0.3, -0.5, 1.1]), np.array([0.2, 0.5, 0.3])
    expected_sum = 0.0
    for first in range(3):
        for second in range(3):
            drawn = [k for k in (first, second) if k != 0]  # the target is left out where it is drawn
            expected_sum += q[first] * q[second] * sum(np.exp(score[k]) / (2 * q[k]) for k in drawn)
    assert expected_sum == pytest.approx(np.exp(score[1]) + np.exp(score[2]))

    # The same numbers, pair by pair, through the loss.
    at = one_position(score[0])
    run = jax.jit(
        lambda ids, table, log_expected: losses.sampled_softmax(
            at, table, losses.Negatives(ids, log_expected), Blocks(3, 1.0, 8, 4), jnp.dtype("float32")
        )
    )
    through_loss = 0.0
    for first in range(3):
        for second in range(3):
            pair = np.array([first, second])
            table, log_expected = score[pair, None].astype(np.float32), np.log(2 * q[pair]).astype(np.float32)
            loss = float(run(pair + 1, table, log_expected))
            through_loss += q[first] * q[second] * (np.exp(loss + score[0]) - np.exp(score[0]))
    assert through_loss == pytest.approx(expected_sum, rel=1e-5)


@pytest.mark.parametrize(("sizes", "slices"), MESHES)
def test_any_mesh_gives_the_dense_numbers(sizes: tuple[int, int, int], slices: int):
    """Loss and gradients of queries, target vectors, negatives and table, all three losses."""
    x = inputs(rows=16)
    x["valid"][5:9] = False  # some devices have nothing to do
    ids, log_expected = some_negatives(x, True)

    def loss(query: Any, table: Any, which: str) -> Any:
        at = gathered(x, query, table)
        if which == "full":
            return losses.full_softmax(at, table, BLOCKS, FLOAT)
        drawn = losses.Negatives(jnp.asarray(ids), jnp.asarray(log_expected))
        if which == "gbce":
            return losses.generalised_bce(at, table[ids], drawn, BLOCKS, FLOAT, 1.0)
        return losses.sampled_softmax(at, table[ids], drawn, BLOCKS, FLOAT)

    dense = {
        "full": dense_full(x),
        "sampled": dense_sampled(x, ids, log_expected),
        "gbce": dense_gbce(x, ids, 13 / 22),
    }

    @jax.jit
    def run(query: Any, table: Any) -> Any:
        gradients = jax.value_and_grad(loss, (0, 1))
        return [gradients(query, table, which) for which in dense]

    with jax.set_mesh(tiny.mesh(*sizes, slices=slices)):
        found = run(x["query"], x["table"])
    for (value, (dq, dv)), (expected, expected_dq, expected_dv) in zip(found, dense.values(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(dq, expected_dq, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(dv, expected_dv, rtol=1e-5, atol=1e-5)


def collectives(text: str) -> dict[str, int]:
    """Elements of the largest result of each kind of collective in a compiled program."""
    largest: dict[str, int] = {}
    for result, kind in re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text
    ):
        for shape in re.findall(r"\[([\d,]*)\]", result):
            size = math.prod(int(n) for n in shape.split(",") if n)
            largest[kind] = max(largest.get(kind, 0), size)
    return largest


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_positions_stay_where_they_are(kind: str):
    """128 positions on each of eight devices; what travels is a block of 64, or sums over the negatives."""
    mesh = tiny.mesh(4, 2, 1)
    rows, length, dim, few = 64, 16, 24, 64
    blocks = Blocks(200, SCALE, 16, few)

    def loss(query: Any, vector: Any, table: Any, target: Any, valid: Any) -> Any:
        at = losses.gather_positions(query, vector, target, valid)
        if kind == "full":
            return losses.full_softmax(at, table, blocks, FLOAT)
        drawn = losses.Negatives(jnp.arange(1, few + 1), jnp.zeros(few))
        return losses.sampled_softmax(at, table[:few], drawn, blocks, FLOAT)

    vectors, ids = (rows, length, dim), (rows, length)
    shapes = [(vectors, "float32")] * 2 + [((256, dim), "float32"), (ids, "int32"), (ids, "bool")]
    batch = sharding(mesh, "batch", None, None)
    where = [batch, batch, sharding(mesh, "items", None), *[sharding(mesh, "batch", None)] * 2]
    arguments = [jax.ShapeDtypeStruct(*s, sharding=w) for s, w in zip(shapes, where, strict=True)]
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), out_shardings=(None, tuple(where[:3])))
        found = collectives(run.lower(*arguments).compile().as_text())
    assert found, "there must be collectives to be measured"
    assert max(found.values()) <= few * dim < rows * length * dim / 8, found
