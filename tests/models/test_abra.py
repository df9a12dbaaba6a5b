"""ABRA against attention written out by hand for three items."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models.abra import Abra
from dynrec_jax.parallel.table import rows_for

from .. import tiny

V_3x2 = np.array([[1.0, 0.0], [0.5, -1.0], [-2.0, 1.5]])
U_2x2 = np.array([[0.4, 1.0], [-1.2, 0.3]])
TABLE = np.full((rows_for(3), 2), 9.0, np.float32)
TABLE[1:4] = V_3x2


def abra(**changes: object) -> Abra:
    settings = {"dim": 2, "items": 3, "temperature": 0.7, "normalise": False, "hops": 0}
    return Abra(**{**settings, "block_items": 8, "block_positions": 4, **changes})


def attention(u: np.ndarray, v: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and mixture, by the formula with d_u = d_v = 2."""
    s = u @ v.T / (temperature * np.sqrt(2 + 2))
    a = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
    return s, a @ v


def answer(model: Abra, u: np.ndarray = U_2x2, seen: list[list[int]] | None = None, k: int = 3):
    seen_BxM = jnp.asarray(seen or [[0], [0]], jnp.int32)
    run = jax.jit(lambda u, v: model.recommend(u, model.unit(v), seen_BxM, k))
    return jax.tree.map(np.asarray, run(u.astype(np.float32), TABLE))


def by_item(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores in the order of the items."""
    return np.take_along_axis(scores, np.argsort(ids, axis=1), axis=1)


def test_scores_are_scaled_products_and_the_mixture_their_softmax():
    scores, mixture = attention(U_2x2, V_3x2, 0.7)
    found = answer(abra())
    np.testing.assert_array_equal(found.ids, np.argsort(-scores, axis=1) + 1)
    np.testing.assert_allclose(by_item(found.ids, found.scores), scores, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.mixture, mixture, rtol=1e-5)


@pytest.mark.parametrize(("dim", "temperature", "scale"), [(2, 1.0, 0.5), (8, 0.1, 2.5), (32, 0.5, 0.25)])
def test_the_scale_is_one_over_temperature_times_the_root_of_both_dimensions(
    dim: int, temperature: float, scale: float
):
    assert abra(dim=dim, temperature=temperature).scale == pytest.approx(scale)


@pytest.mark.parametrize("hops", [1, 3])
def test_each_hop_asks_again_with_the_mixture_added(hops: int):
    u = U_2x2
    for _ in range(hops):
        u = u + attention(u, V_3x2, 0.7)[1]
    scores, mixture = attention(u, V_3x2, 0.7)
    found = answer(abra(hops=hops))
    np.testing.assert_allclose(by_item(found.ids, found.scores), scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.mixture, mixture, rtol=1e-5, atol=1e-6)


def test_normalised_both_sides_have_unit_length_at_every_hop():
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    u, v = unit(U_2x2), unit(V_3x2)
    u = unit(u + attention(u, v, 0.1)[1])
    scores, _ = attention(u, v, 0.1)
    found = answer(abra(normalise=True, hops=1, temperature=0.1))
    np.testing.assert_allclose(by_item(found.ids, found.scores), scores, rtol=1e-5, atol=1e-5)


def test_seen_items_leave_the_list_but_not_the_attention():
    found, whole = answer(abra(), seen=[[2, 0], [1, 3]]), answer(abra())
    assert set(found.ids[0]) == {0, 1, 3}
    assert found.ids[1].tolist() == [2, 0, 0]
    np.testing.assert_array_equal(found.mixture, whole.mixture)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 1)])
def test_two_queries_on_more_devices_give_the_same_answer(sizes: tuple[int, int, int]):
    table = np.full((rows_for(300), 2), 9.0, np.float32)
    table[1:301] = np.random.default_rng(0).normal(size=(300, 2))
    table = table[:504]  # divides by eight and by three
    model = abra(items=300, hops=1)
    run = jax.jit(lambda u, v: model.recommend(u, v, jnp.zeros((2, 1), jnp.int32), 5))
    alone = run(U_2x2.astype(np.float32), table)
    with jax.set_mesh(tiny.mesh(*sizes)):
        found = run(U_2x2.astype(np.float32), table)
    np.testing.assert_array_equal(found.ids, alone.ids)
    np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-5)
    np.testing.assert_allclose(found.mixture, alone.mixture, rtol=1e-5)


def test_unit_leaves_zero_at_zero():
    assert not np.asarray(abra(normalise=True).unit(jnp.zeros((1, 2)))).any()
