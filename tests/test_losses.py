"""The losses against dense references in float64, and what sampling is worth."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax import losses
from dynrec_jax.parallel.stream import Blocks
from dynrec_jax.parallel.table import rows_for

ITEMS, DIM, SCALE = 23, 5, 0.8
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
    """As `dense_full`, over the target and those negatives that are not the target."""
    loss, dq, dv = 0.0, np.zeros(x["query"].shape), np.zeros(x["table"].shape)
    table = x["table"].astype(np.float64)
    for b, t in zip(*np.nonzero(x["valid"]), strict=True):
        u, target = x["query"][b, t].astype(np.float64), x["target"][b, t]
        kept = ids != target
        rows = np.concatenate([[target], ids[kept]])
        p = softmax(SCALE * table[rows] @ u - np.concatenate([[0.0], log_expected[kept]]))
        loss -= np.log(p[0])
        p[0] -= 1.0
        dq[b, t] = SCALE * p @ table[rows]
        np.add.at(dv, rows, SCALE * np.outer(p, u))
    return loss, dq, dv


def test_positions_with_a_target_come_first_and_in_order():
    x = inputs()
    at = gathered(x, jnp.asarray(x["query"]), jnp.asarray(x["table"]))
    count = int(x["valid"].sum())
    assert int(at.number) == count
    np.testing.assert_array_equal(at.query[:count], x["query"][x["valid"]])
    np.testing.assert_array_equal(at.target[:count], x["target"][x["valid"]])
    np.testing.assert_array_equal(at.vector[:count], x["table"][x["target"][x["valid"]]])
    np.testing.assert_array_equal(at.weight, np.arange(x["valid"].size) < count)


def test_the_full_softmax_is_the_dense_cross_entropy():
    x = inputs()

    def loss(query: Any, table: Any) -> Any:
        return losses.full_softmax(gathered(x, query, table), table, BLOCKS, jnp.dtype("float32"))

    value, (dq, dv) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x["query"], x["table"])
    expected, expected_dq, expected_dv = dense_full(x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dq, expected_dq, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(dv, expected_dv, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("logq", [True, False])
def test_the_sampled_softmax_is_the_dense_one_with_accidental_hits_left_out(logq: bool):
    x = inputs()
    rng = np.random.default_rng(1)
    ids = np.concatenate([x["target"][x["valid"]][:4], rng.integers(1, ITEMS + 1, 9)]).astype(np.int32)
    log_expected = rng.normal(size=13).astype(np.float32) if logq else np.zeros(13, np.float32)
    drawn = losses.Negatives(jnp.asarray(ids), jnp.asarray(log_expected))
    assert any((ids == t).any() for t in x["target"][x["valid"]]), "there must be hits to leave out"

    def loss(query: Any, table: Any) -> Any:
        at = gathered(x, query, table)
        return losses.sampled_softmax(at, table[drawn.ids], drawn, BLOCKS, jnp.dtype("float32"))

    value, (dq, dv) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x["query"], x["table"])
    expected, expected_dq, expected_dv = dense_sampled(x, ids, log_expected)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dq, expected_dq, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(dv, expected_dv, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_many_negatives_approach_the_full_softmax(sampler: str):
    """The corrected loss converges with 1/√K, whatever the sampler; without correction it does not."""
    x = inputs(seed=4)
    running = running_counts(np.arange(1, ITEMS + 1)) if sampler == "popularity" else None
    full = dense_full(x)[0]

    def loss(number: int, logq: bool) -> float:
        drawn = losses.draw_negatives(jax.random.key(0), number, ITEMS, running, logq)
        table = jnp.asarray(x["table"])
        at = gathered(x, jnp.asarray(x["query"]), table)
        return float(losses.sampled_softmax(at, table[drawn.ids], drawn, BLOCKS, jnp.dtype("float32")))

    assert abs(loss(40_000, True) - full) < 0.01 * full
    assert abs(loss(40_000, False) - full) > full


def test_the_partition_sum_over_negatives_is_unbiased():
    """Three items, two draws, target 1: all nine pairs of draws, each as likely as it is."""
    score, q = np.array([0.3, -0.5, 1.1]), np.array([0.2, 0.5, 0.3])
    expected_sum = 0.0
    for first in range(3):
        for second in range(3):
            drawn = [k for k in (first, second) if k != 0]  # the target is left out where it is drawn
            expected_sum += q[first] * q[second] * sum(np.exp(score[k]) / (2 * q[k]) for k in drawn)
    assert expected_sum == pytest.approx(np.exp(score[1]) + np.exp(score[2]))

    # The same numbers, pair by pair, through the loss: a 1-D model whose items score `score`.
    at = losses.Positions(
        jnp.ones((1, 1)), jnp.full((1, 1), score[0]), jnp.array([1]), jnp.ones(1), jnp.int32(1)
    )
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


def running_counts(counts: np.ndarray) -> jax.Array:
    """Running counts by row, as the loop makes them: row 0 has none."""
    running_R = np.full(rows_for(len(counts)), counts.sum())
    running_R[0] = 0
    running_R[1 : len(counts) + 1] = np.cumsum(counts)
    return jnp.asarray(running_R, jnp.int32)


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_negatives_are_drawn_as_often_as_they_say(sampler: str):
    counts = np.array([500, 1, 3_500, 15_000, 1_000, 30_000]) if sampler == "popularity" else np.ones(6, int)
    number = 60_000
    running = running_counts(counts) if sampler == "popularity" else None
    drawn = losses.draw_negatives(jax.random.key(7), number, 6, running, True)
    ids = np.asarray(drawn.ids)
    assert ids.min() >= 1
    assert ids.max() <= 6
    expected = number * counts / counts.sum()
    found = np.bincount(ids, minlength=7)[1:]
    # Five standard deviations of a binomial, and a few for counts near zero.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected) + 3).all(), (found, expected)
    np.testing.assert_allclose(np.exp(drawn.log_expected), expected[ids - 1], rtol=1e-6)


def test_without_correction_nothing_is_corrected_and_the_draws_are_the_same():
    with_logq = losses.draw_negatives(jax.random.key(1), 50, ITEMS, None, True)
    without = losses.draw_negatives(jax.random.key(1), 50, ITEMS, None, False)
    np.testing.assert_array_equal(with_logq.ids, without.ids)
    assert not np.asarray(without.log_expected).any()


def test_every_item_of_a_large_catalogue_has_its_exact_place():
    """A million items, most with one event of a billion: float32 shares would give half of them no room at all."""
    items = 1_000_000
    counts = np.ones(items, np.int64)
    counts[0] = 2**30 - items + 1
    running = running_counts(counts)
    # The first place of item 2, and the only ones of the last two items.
    places = jnp.asarray([2**30 - items + 1, 2**30 - 2, 2**30 - 1])
    found = jnp.searchsorted(running, places, side="right")
    np.testing.assert_array_equal(found, [2, items - 1, items])
    drawn = losses.draw_negatives(jax.random.key(0), 1000, items, running, True)
    expected = 1000 * counts[np.asarray(drawn.ids) - 1] / 2**30
    np.testing.assert_allclose(np.exp(drawn.log_expected), expected, rtol=1e-5)
