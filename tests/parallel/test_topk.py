"""The streamed top k against a stable sort of all scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.parallel import topk
from dynrec_jax.parallel.table import rows_for, rows_of
from dynrec_jax.parallel.topk import top_k

from .. import tiny

SCALE = 0.5
MANY = 70_000  # items of a table in strips
MESHES = [((1, 1, 1), 1), ((2, 2, 2), 1), ((1, 2, 2), 2), ((3, 1, 1), 1)]  # three devices cut strips apart


def inputs(items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, a table and seen items; small whole numbers, so that many scores are exactly equal."""
    rng = np.random.default_rng(seed)
    u_BxD = rng.integers(-1, 2, (5, 3)).astype(np.float32)
    table_RxD = np.full((rows_for(items), 3), 100.0, np.float32)  # rows that are no items would win
    table_RxD[rows_of(np.arange(1, items + 1), len(table_RxD))] = rng.integers(-1, 2, (items, 3))
    seen_BxM = rng.integers(0, items + 1, (5, 9)).astype(np.int32)
    return u_BxD, table_RxD, seen_BxM


def expected(
    u: np.ndarray, table: np.ndarray, seen: np.ndarray, items: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """By a stable sort: equal scores stay in the order of their index."""
    ids, scores = np.zeros((len(u), k), np.int32), np.full((len(u), k), -np.inf, np.float32)
    for b in range(len(u)):
        left = np.setdiff1d(np.arange(1, items + 1), seen[b])
        score = SCALE * table[rows_of(left, len(table))] @ u[b]
        order = np.argsort(-score, kind="stable")[:k]
        ids[b, : len(order)], scores[b, : len(order)] = left[order], score[order]
    return ids, scores


def found(
    u: np.ndarray, table: np.ndarray, seen: np.ndarray, items: int, k: int, rows: int
) -> list[np.ndarray]:
    run = jax.jit(functools.partial(top_k, k=k, items=items, scale=SCALE, rows=rows))
    return [np.asarray(x) for x in run(jnp.asarray(u), jnp.asarray(table), jnp.asarray(seen))]


@pytest.mark.parametrize("rows", [3, 16, 10_000])
@pytest.mark.parametrize("k", [1, 7, 37])
def test_lists_are_those_of_a_stable_sort(rows: int, k: int):
    u, table, seen = inputs(37)
    for one, other in zip(found(u, table, seen, 37, k, rows), expected(u, table, seen, 37, k), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("sizes", "items", "k"), [((8, 1, 1), 37, 37), ((2, 2, 2), 300, 12)])
def test_eight_devices_give_the_same_lists(sizes: tuple[int, int, int], items: int, k: int):
    u, table, seen = inputs(items)
    with jax.set_mesh(tiny.mesh(*sizes)):
        ids, scores = found(u, table, seen, items, k, rows=9)
    for one, other in zip((ids, scores), expected(u, table, seen, items, k), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("devices", [1, 8])
def test_equal_scores_rank_by_the_lowest_index_across_blocks_and_devices(devices: int):
    items = 300
    table = np.ones((rows_for(items), 3), np.float32)
    u, seen = np.ones((2, 3), np.float32), np.array([[1, 2], [0, 0]], np.int32)
    with jax.set_mesh(tiny.mesh(devices, 1, 1)):
        ids, _ = found(u, table, seen, items, k=150, rows=16)
    np.testing.assert_array_equal(ids, [np.arange(3, 153), np.arange(1, 151)])


def test_a_list_that_runs_out_ends_in_nothing():
    u, table, _ = inputs(37)
    seen = np.tile(np.arange(1, 36, dtype=np.int32), (5, 1))
    for rows in (5, 64):
        ids, scores = found(u, table, seen, 37, 6, rows)
        assert (np.sort(ids[:, :2], axis=1) == [36, 37]).all()
        assert not ids[:, 2:].any()
        assert np.isneginf(scores[:, 2:]).all()


@pytest.mark.parametrize(("sizes", "slices"), MESHES)
def test_a_table_in_strips_gives_the_same_lists(sizes: tuple[int, int, int], slices: int):
    """Many equal scores, nothing but equal scores, and fewer items than the list is long."""
    u, table, seen = inputs(MANY)
    u[0] = 0.0
    seen[1] = np.arange(9)  # the first of those that the list of equal scores would show
    u[1] = 0.0
    with jax.set_mesh(tiny.mesh(*sizes, slices=slices)):
        for items, k in ((MANY, 50), (40, 37)):
            found_ids, found_scores = found(u, table, seen, items, k, rows=10_000)
            ids, scores = expected(u, table, seen, items, k)
            np.testing.assert_array_equal(found_ids, ids)
            np.testing.assert_array_equal(found_scores, scores)
    assert ids[1].tolist() == [*range(9, 41), *[0] * 5]


@pytest.mark.parametrize("items", [40, MANY])
def test_a_score_that_is_not_a_number_comes_first(items: int):
    """So that who reads the lists sees it."""
    u, table, seen = inputs(items)
    table[rows_of(np.array([17]), len(table))] = np.nan
    seen[seen == 17] = 0
    with jax.set_mesh(tiny.mesh(4, 1, 1)):
        ids, scores = found(u, table, seen, items, 5, rows=10_000)
    assert (ids[:, 0] == 17).all()
    assert np.isnan(scores[:, 0]).all()
    assert np.isfinite(scores[:, 1:]).all()


def test_on_a_cpu_the_lists_of_many_queries_are_found_in_pieces(monkeypatch: pytest.MonkeyPatch):
    items, k = 37, 7
    u, table, seen = (np.tile(x, (7, 1))[:32] if i != 1 else x for i, x in enumerate(inputs(items)))
    monkeypatch.setattr(topk, "FEWEST", 0)
    run = functools.partial(top_k, k=k, items=items, scale=SCALE, rows=10_000)
    compiled = jax.jit(run).lower(u, table, seen).compile()
    assert compiled.as_text().count('custom_call_target="TopK"') == topk.PIECES
    for rows in (16, 10_000):
        for one, other in zip(
            found(u, table, seen, items, k, rows), expected(u, table, seen, items, k), strict=True
        ):
            np.testing.assert_array_equal(one, other)
