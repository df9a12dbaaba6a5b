"""The streamed softmax against a dense reference in float64, by several blocks, on one device and on eight."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from dynrec_jax.parallel.blocks import Blocks
from dynrec_jax.parallel.mesh import row_pieces
from dynrec_jax.parallel.mixture import mixture
from dynrec_jax.parallel.stream import logsumexp_sum
from dynrec_jax.parallel.table import rows_for, rows_of

from .. import tiny

DIM, POSITIONS, COUNT, SCALE = 6, 21, 17, 0.7
BLOCKS = [(8, 4), (16, 21), (24, 1000), (1000, 5)]  # catalogue rows, positions
NUMBER = np.array([COUNT], np.int32)
# Sizes of the mesh, slices, items. 37 items: most devices hold none; 70,000: the table lies in strips.
MESHES = [
    ((8, 1, 1), 1, 37),
    ((2, 2, 2), 1, 203),
    ((1, 8, 1), 1, 203),
    ((1, 1, 8), 1, 203),
    ((2, 2, 1), 2, 203),
    ((1, 2, 2), 2, 70_000),
]


def inputs(
    items: int, seed: int = 0, positions: int = POSITIONS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions, weights, the table, and a direction for gradients; what must not count is large."""
    rng = np.random.default_rng(seed)
    u_PxD = 2 * rng.normal(size=(positions, DIM)).astype(np.float32)
    weight_P = rng.uniform(0.5, 2.0, positions).astype(np.float32)
    weight_P[3] = 0.0
    weight_P[COUNT:] = 0.0
    table_RxD = 50 * rng.normal(size=(rows_for(items), DIM)).astype(np.float32)
    table_RxD[rows_of(np.arange(1, items + 1), len(table_RxD))] /= 50
    return u_PxD, weight_P, table_RxD, rng.normal(size=(positions, DIM)).astype(np.float32)


def dense(u_PxD: np.ndarray, table_RxD: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The items' vectors, log-sum-exp and softmax of every position, in float64."""
    v_NxD = table_RxD[rows_of(np.arange(1, items + 1), len(table_RxD))].astype(np.float64)
    s_PxN = SCALE * u_PxD.astype(np.float64) @ v_NxD.T
    z_P = np.log(np.exp(s_PxN).sum(axis=1))
    return v_NxD, z_P, np.exp(s_PxN - z_P[:, None])


def dense_logsumexp(
    u_PxD: np.ndarray, weight_P: np.ndarray, table_RxD: np.ndarray, items: int
) -> tuple[Any, ...]:
    """The value and its gradients, by their formulas."""
    v_NxD, z_P, p_PxN = dense(u_PxD, table_RxD, items)
    p_PxN = p_PxN * weight_P[:, None]
    dv_RxD = np.zeros(table_RxD.shape)
    dv_RxD[rows_of(np.arange(1, items + 1), len(table_RxD))] = SCALE * p_PxN.T @ u_PxD
    return weight_P @ z_P, SCALE * p_PxN @ v_NxD, dv_RxD


def dense_mixture(u_PxD: np.ndarray, g_PxD: np.ndarray, table_RxD: np.ndarray, items: int) -> tuple[Any, ...]:
    """`Σ g·r` and its gradients, by their formulas."""
    v_NxD, _, p_PxN = dense(u_PxD, table_RxD, items)
    r_PxD = p_PxN @ v_NxD
    along_PxN = g_PxD @ v_NxD.T
    ds_PxN = SCALE * p_PxN * (along_PxN - (g_PxD * r_PxD).sum(axis=1, keepdims=True))
    dv_RxD = np.zeros(table_RxD.shape)
    dv_RxD[rows_of(np.arange(1, items + 1), len(table_RxD))] = ds_PxN.T @ u_PxD + p_PxN.T @ g_PxD
    return (g_PxD * r_PxD).sum(), ds_PxN @ v_NxD, dv_RxD


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-5, atol=2e-5)


def logsumexp_gradients(blocks: Blocks) -> Callable[..., Any]:
    return jax.jit(
        jax.value_and_grad(lambda u, weight, table: logsumexp_sum(u, weight, NUMBER, table, blocks), (0, 2))
    )


def mixture_gradients(blocks: Blocks) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(lambda u, g, table: jnp.sum(g * mixture(u, table, blocks)), (0, 2)))


@pytest.mark.parametrize(("rows", "positions"), BLOCKS)
def test_logsumexp_and_its_gradients_are_the_dense_ones(rows: int, positions: int):
    u, weight, table, _ = inputs(37)
    value, (du, dv) = logsumexp_gradients(Blocks(37, SCALE, rows, positions))(u, weight, table)
    expected, expected_du, expected_dv = dense_logsumexp(u, weight, table, 37)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    close(du, expected_du)
    close(dv, expected_dv)
    assert not np.asarray(dv)[[0, *range(38, len(dv))]].any(), "rows that are no items get no gradient at all"


@pytest.mark.parametrize(("rows", "positions"), BLOCKS[:3])
def test_the_value_alone_is_the_value_with_gradients(rows: int, positions: int):
    u, weight, table, _ = inputs(37)
    blocks = Blocks(37, SCALE, rows, positions)
    value = jax.jit(lambda: logsumexp_sum(u, weight, NUMBER, table, blocks))()
    np.testing.assert_allclose(value, dense_logsumexp(u, weight, table, 37)[0], rtol=1e-6)


def test_blocks_behind_the_last_position_are_not_computed():
    u, weight, table, _ = inputs(37)
    weight[8:] = 1.0  # would count, were it looked at
    u[8:] = np.nan
    run = jax.jit(
        jax.value_and_grad(lambda u: logsumexp_sum(u, weight, jnp.array([8]), table, Blocks(37, SCALE, 8, 4)))
    )
    value, du = run(u)
    np.testing.assert_allclose(value, dense_logsumexp(u[:8], weight[:8], table, 37)[0], rtol=1e-6)
    assert not np.asarray(du)[8:].any()


@pytest.mark.parametrize(("rows", "positions"), [BLOCKS[0], BLOCKS[2], BLOCKS[3]])
def test_the_mixture_and_its_gradients_are_the_dense_ones(rows: int, positions: int):
    u, _, table, g = inputs(37)
    value, (du, dv) = mixture_gradients(Blocks(37, SCALE, rows, positions))(u, g, table)
    expected, expected_du, expected_dv = dense_mixture(u, g, table, 37)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    close(du, expected_du)
    close(dv, expected_dv)


def test_a_table_in_strips_gives_the_dense_numbers():
    """Rows that are no items lie at the end of many strips."""
    u, weight, table, g = inputs(70_000)
    blocks = Blocks(70_000, SCALE, 30_000, 8)
    value, (du, dv) = logsumexp_gradients(blocks)(u, weight, table)
    expected, expected_du, expected_dv = dense_logsumexp(u, weight, table, 70_000)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    close(du, expected_du)
    close(dv, expected_dv)
    mixed = jax.jit(lambda u, table: jnp.sum(g * mixture(u, table, blocks)))(u, table)
    np.testing.assert_allclose(mixed, dense_mixture(u, g, table, 70_000)[0], rtol=1e-5)


@pytest.mark.parametrize(("sizes", "slices", "items"), MESHES)
def test_eight_devices_give_the_dense_numbers(sizes: tuple[int, int, int], slices: int, items: int):
    """Each device has positions of its own, some none; three blocks of the largest part, and none behind it."""
    mesh = tiny.mesh(*sizes, slices=slices)
    devices = row_pieces(mesh)
    u, weight, table, g = inputs(items, positions=48)
    each = 48 // devices
    count = np.minimum(np.random.default_rng(1).integers(0, each + 1, devices), each - each // 3)
    count[-1] = each - each // 3
    real = np.arange(48) % each < np.repeat(count, each)
    weight = np.where(real, np.random.default_rng(2).uniform(0.5, 2.0, 48), 0).astype(np.float32)
    blocks = Blocks(items, SCALE, 24 if items < 1000 else 10_000, 2 * devices)

    @jax.jit
    def run(u: Any, table: Any) -> Any:
        sums = jax.value_and_grad(lambda u, table: logsumexp_sum(u, weight, count, table, blocks), (0, 1))
        mixed = jax.value_and_grad(
            lambda u, table: jnp.sum(g * real[:, None] * mixture(u, table, blocks, count)), (0, 1)
        )
        return sums(u, table), mixed(u, table)

    with jax.set_mesh(mesh):
        results = run(u, table)
    expectations = (
        dense_logsumexp(u, weight, table, items),
        dense_mixture(u, g * real[:, None], table, items),
    )
    for (value, (du, dv)), (expected, expected_du, expected_dv) in zip(results, expectations, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        close(du, expected_du)
        close(dv, expected_dv)


def test_scores_far_from_zero_neither_overflow_nor_vanish():
    u, weight, table, _ = inputs(37)
    u = u * 200
    value, (du, _) = logsumexp_gradients(Blocks(37, SCALE, 8, 4))(u, weight, table)
    s_PxN = SCALE * u.astype(np.float64) @ table[1:38].astype(np.float64).T
    top_P = s_PxN.max(axis=1)
    assert top_P.max() > 500
    expected = weight @ (top_P + np.log(np.exp(s_PxN - top_P[:, None]).sum(axis=1)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(np.asarray(du)).all()


def test_products_in_bfloat16_round_what_is_multiplied_and_nothing_else():
    """The value is that of rounded vectors, exactly; probabilities are rounded on their way into gradients."""
    u, weight, table, _ = inputs(37)
    blocks = Blocks(37, SCALE, 8, 4, jnp.dtype("bfloat16"))
    value, (du, dv) = logsumexp_gradients(blocks)(u, weight, table)
    rounded_u, rounded_table = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (u, table))
    expected, expected_du, expected_dv = dense_logsumexp(rounded_u, weight, rounded_table, 37)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for found, dense_gradient in ((du, expected_du), (dv, expected_dv)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, dense_gradient, rtol=0, atol=0.01 * np.abs(dense_gradient).max())
        assert (np.asarray(found) != np.asarray(found.astype(jnp.bfloat16), np.float32)).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpu_holds_no_second_table(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """By its compiler, which needs no TPU: neither precision keeps rounded rows, 104 MiB, beside the table's 208."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    chip = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]
    ).devices[0]
    items = 210_000  # of less, the chip's own 128 MiB could hold the gradient
    blocks = Blocks(items, SCALE, 4096, 256, jnp.dtype(dtype))
    shapes = ((2048, 256), (2048,), (rows_for(items), 256))
    here = SingleDeviceSharding(chip)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here) for shape in shapes]
    run = jax.jit(
        jax.value_and_grad(
            lambda u, weight, table: logsumexp_sum(u, weight, jnp.array([2048]), table, blocks), (0, 2)
        )
    )
    used = run.lower(*arguments).compile().memory_analysis()
    # Scratch that fits into the chip's own memory is not counted as temporary, but in the peak it is.
    beside = used.peak_memory_in_bytes - used.argument_size_in_bytes - used.output_size_in_bytes
    assert beside < 20 * 2**20


@pytest.mark.parametrize("which", ["logsumexp", "mixture"])
def test_memory_does_not_hold_positions_times_catalogue(which: str):
    def temporary_bytes(positions: int, items: int) -> int:
        blocks = Blocks(items, SCALE, 128, 64)
        make = logsumexp_gradients if which == "logsumexp" else mixture_gradients
        second = (positions,) if which == "logsumexp" else (positions, DIM)
        shapes = ((positions, DIM), second, (rows_for(items), DIM))
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return make(blocks).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(1024, 4095), temporary_bytes(4096, 16383)
    assert small > 0
    # Four times of each: 4 times the memory where it grows with P + N, 16 times where it grows with P × N.
    assert large < 4.5 * small
    assert large < 4 * 4096 * 16383 / 16
