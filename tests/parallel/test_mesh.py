"""The mesh over the eight simulated devices."""

import dataclasses

import pytest

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.mesh import _slices, check_model, make_mesh, table_devices


@pytest.mark.parametrize(
    ("asked", "made"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, -1), (1, 8, 1)), ((4, 1, 2), (4, 1, 2))],
)
def test_one_size_may_be_what_is_left(asked: tuple[int, int, int], made: tuple[int, int, int]):
    mesh = make_mesh(*asked)
    assert dict(mesh.shape) == {"slice": 1, **dict(zip(("data", "fsdp", "tensor"), made, strict=True))}
    assert mesh.size == 8


def test_the_default_takes_all_devices_for_data():
    assert dict(make_mesh().shape) == {"slice": 1, "data": 8, "fsdp": 1, "tensor": 1}


def test_tables_lie_in_each_slice_or_over_all():
    each = make_mesh(-1, 1, 2, slices=2)
    assert dict(each.shape) == {"slice": 2, "data": 2, "fsdp": 1, "tensor": 2}
    assert table_devices(each) == 4
    over_all = make_mesh(-1, 1, 2, slices=2, tables="all")
    assert dict(over_all.shape) == {"slice": 1, "data": 4, "fsdp": 1, "tensor": 2}
    assert table_devices(over_all) == 8
    # Either way the first half of the devices is the first slice.
    for mesh in (each, over_all):
        assert [device.id for device in mesh.devices.reshape(-1)] == list(range(8))


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_devices_that_know_their_slices_are_grouped_by_them():
    chips = [Chip(i, i % 2) for i in range(4)]
    assert _slices(chips, 0) == [[chips[0], chips[2]], [chips[1], chips[3]]]
    with pytest.raises(ConfigError, match="slices: 4, and the devices lie in 2"):
        _slices(chips, 4)
    with pytest.raises(ConfigError, match="slices of 2, 1 devices; expected slices of one size"):
        _slices(chips[:3], 0)


def test_slices_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(ConfigError, match="8 devices do not divide into 3 slices"):
        make_mesh(slices=3)
    with pytest.raises(ConfigError, match="does not make 4 devices of each of 2 slices"):
        make_mesh(8, 1, 1, slices=2)


@pytest.mark.parametrize(
    ("rows", "dim", "heads", "hidden", "told"),
    [
        (12, 8, 2, 6, "item tables of 12 rows do not divide over 8 devices; use a power of two up to 4"),
        (16, 8, 1, 6, "mesh.tensor: 2 does not divide model.heads=1"),
        (16, 7, 2, 6, "mesh.fsdp: 2 does not divide model.dim=7"),
        (16, 8, 2, 15, "mesh.tensor: 2 does not divide the 15 hidden units"),
    ],
)
def test_a_model_that_does_not_divide_over_the_mesh_is_refused(
    rows: int, dim: int, heads: int, hidden: int, told: str
):
    check_model(make_mesh(2, 2, 2), 16, 8, 2, 6)
    with pytest.raises(ConfigError, match=told):
        check_model(make_mesh(2, 2, 2), rows, dim, heads, hidden)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (8, 2, 1), (16, 1, 1), (2, 2, 1)])
def test_sizes_that_do_not_make_the_devices_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1), (-1, 0, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(ConfigError, match="at most one -1"):
        make_mesh(*sizes)
