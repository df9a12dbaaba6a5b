"""Negatives: as likely as they say, and the same on any mesh and in any packing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax import losses
from dynrec_jax.batch import Batch
from dynrec_jax.negatives import Negatives, Sampling, draw_negatives, running_counts
from dynrec_jax.parallel.blocks import Blocks
from dynrec_jax.parallel.table import ids_of, rows_for

from . import tiny

MESHES = [((2, 2, 2), 1), ((1, 2, 2), 2)]
MANY = 70_000  # items of a table in strips


def counts_of(*counts: int) -> np.ndarray:
    """Counts by item, padding first."""
    return np.array([0, *counts], np.int64)


def drawn(
    sampler: str,
    number: int,
    items: int,
    counts: np.ndarray | None = None,
    batch: Batch | None = None,
    logq: bool = True,
    uniform: int = 0,
    seed: int = 7,
) -> Negatives:
    running = None if counts is None else jnp.asarray(running_counts(counts, rows_for(items)))
    settings = Sampling(sampler, items, number, uniform, logq)
    run = jax.jit(lambda key, batch, running: draw_negatives(key, batch, running, settings))
    found = run(jax.random.key(seed), BATCH if batch is None else batch, running)
    return Negatives(*(np.asarray(x) for x in found))


WINDOWS = [[3, 8, 8, 1], [5, 2], [6], [4, 4, 4, 3, 2, 1, 1]]
BATCH = tiny.batch([[(n, window)] for n, window in enumerate(WINDOWS, 1)] + [[]] * 4, 9)
PACKED = tiny.batch([[(4, WINDOWS[3]), (2, WINDOWS[1])], [(1, WINDOWS[0]), (3, WINDOWS[2])]] + [[]] * 6, 9)
EVENTS = sorted(item for window in WINDOWS for item in window)
COUNTS = counts_of(5, 1, 2, 7, 1, 1, 2, 3)  # of the items 1 .. 8: 22 in all


def test_running_counts_follow_the_rows_of_the_table():
    counts = np.random.default_rng(0).integers(0, 9, MANY + 1)
    rows = rows_for(MANY)
    found = np.diff(running_counts(counts, rows), prepend=0)
    id_R = ids_of(np.arange(rows), rows)
    real = (id_R >= 1) & (id_R <= MANY)
    np.testing.assert_array_equal(found[real], np.maximum(counts[id_R[real]], 1))
    assert not found[~real].any()


def test_counts_of_billions_fit():
    counts = counts_of(3 * 2**31, 0, 2**31)
    running = running_counts(counts, 256)
    assert running.dtype == np.int32
    np.testing.assert_allclose(np.diff(running[:4]) / running[-1], [0.75, 0, 0.25], atol=1e-8)
    assert running[2] > running[1], "an item without events can be drawn too"


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_negatives_are_drawn_as_often_as_they_say(sampler: str):
    counts = np.array([500, 1, 3_500, 15_000, 1_000, 30_000]) if sampler == "popularity" else np.ones(6, int)
    number = 60_000
    found = drawn(sampler, number, 6, counts_of(*counts) if sampler == "popularity" else None)
    assert found.ids.min() >= 1
    assert found.ids.max() <= 6
    expected = number * counts / counts.sum()
    often = np.bincount(found.ids, minlength=7)[1:]
    # Five standard deviations of a binomial, and a few for counts near zero.
    assert (np.abs(often - expected) < 5 * np.sqrt(expected) + 3).all(), (often, expected)
    np.testing.assert_allclose(np.exp(found.log_expected), expected[found.ids - 1], rtol=1e-5)


def test_every_item_of_a_large_catalogue_has_its_exact_place():
    """A million items, most with one event of a billion: float32 shares would give half of them no room at all."""
    items = 1_000_000
    counts = np.ones(items + 1, np.int64)
    counts[0], counts[77] = 0, 2**30 - items
    found = drawn("popularity", 300_000, items, counts)
    rare = found.ids[found.ids != 77]
    assert 200 < len(rare) < 370, "300,000 draws of 2^30, of which 999,999 are of rare items: 279"
    assert len(np.unique(rare)) > 0.99 * len(rare)
    np.testing.assert_allclose(np.exp(found.log_expected[found.ids != 77]), 300_000 / 2**30, rtol=1e-5)


def test_events_of_the_batch_are_drawn_once_each_and_all_alike():
    often: Any = 0
    settings = Sampling("in_batch", 8, 5, 0, False)
    run = jax.jit(jax.vmap(lambda key: draw_negatives(key, BATCH, None, settings).ids))
    for ids in np.asarray(run(jax.random.split(jax.random.key(0), 4_000))):
        assert (np.bincount(ids, minlength=9) <= np.bincount(EVENTS, minlength=9)).all()
        often = often + np.bincount(ids, minlength=9)
    expected = 4_000 * 5 * np.bincount(EVENTS, minlength=9) / len(EVENTS)
    assert (np.abs(often - expected) <= 5 * np.sqrt(expected)).all(), (often, expected)


def test_a_batch_with_too_few_events_leaves_padding():
    found = drawn("in_batch", 20, 8, COUNTS)
    assert sorted(found.ids[:14].tolist()) == EVENTS
    assert not found.ids[14:].any()
    assert not found.log_expected[14:].any()
    np.testing.assert_allclose(np.exp(found.log_expected[:14]), 14 * COUNTS[found.ids[:14]] / 22, rtol=1e-6)


def test_both_sources_count_in_what_is_expected_of_a_mixture():
    """Yang et al. 2020: 4 uniform draws of 8 items and 6 events of the batch."""
    found = drawn("mixed", 10, 8, COUNTS, uniform=4)
    events = drawn("in_batch", 14, 8, logq=False).ids
    assert set(found.ids[4:]) <= set(events)
    assert (found.ids >= 1).all()
    np.testing.assert_allclose(np.exp(found.log_expected), 4 / 8 + 6 * COUNTS[found.ids] / 22, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["uniform", "popularity", "in_batch", "mixed"])
def test_without_correction_nothing_is_corrected_and_the_draws_are_the_same(sampler: str):
    with_logq = drawn(sampler, 10, 8, COUNTS, uniform=4)
    counts = COUNTS if sampler == "popularity" else None
    without = drawn(sampler, 10, 8, counts, logq=False, uniform=4)
    np.testing.assert_array_equal(with_logq.ids, without.ids)
    assert with_logq.log_expected.any()
    assert not without.log_expected.any()


@pytest.mark.parametrize("sampler", ["in_batch", "mixed"])
def test_packing_changes_no_draw(sampler: str):
    one, other = (drawn(sampler, 9, 8, COUNTS, batch, uniform=3) for batch in (BATCH, PACKED))
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.log_expected, other.log_expected)
    assert (one.ids != drawn(sampler, 9, 8, COUNTS, uniform=3, seed=8).ids).any(), "another key draws others"


@pytest.mark.parametrize(("sizes", "slices"), MESHES)
def test_any_mesh_draws_the_same(sizes: tuple[int, int, int], slices: int):
    """Of a small table, where most devices have no item, and of one in strips."""
    many = np.random.default_rng(0).integers(0, 9, MANY + 1)
    for sampler, items, counts in (("mixed", 8, COUNTS), ("popularity", MANY, many)):
        alone = drawn(sampler, 40, items, counts, uniform=3)
        with jax.set_mesh(tiny.mesh(*sizes, slices=slices)):
            found = drawn(sampler, 40, items, counts, uniform=3)
        np.testing.assert_array_equal(found.ids, alone.ids)
        np.testing.assert_array_equal(found.log_expected, alone.log_expected)


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_many_negatives_approach_the_full_softmax(sampler: str):
    """The corrected loss converges with 1/√K, whatever the sampler; without correction it does not."""
    items, blocks = 23, Blocks(23, 0.8, 8, 4)
    rng = np.random.default_rng(4)
    counts = counts_of(*range(1, items + 1)) if sampler == "popularity" else None
    u, target = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(1, items + 1, 9).astype(np.int32)
    table = rng.normal(size=(rows_for(items), 5)).astype(np.float32)
    at = losses.Positions(u, table[target], target, jnp.ones(9), jnp.array([9]))
    run = jax.jit(lambda v, drawn: losses.sampled_softmax(at, v, drawn, blocks, jnp.dtype("float32")))

    def loss(number: int, logq: bool) -> float:
        found = drawn(sampler, number, items, counts, logq=logq)
        return float(run(table[found.ids], found))

    s = 0.8 * u.astype(np.float64) @ table[1 : items + 1].T
    full = float((np.log(np.exp(s).sum(axis=1)) - s[np.arange(9), target - 1]).sum())
    assert abs(loss(40_000, True) - full) < 0.01 * full
    assert abs(loss(40_000, False) - full) > full
