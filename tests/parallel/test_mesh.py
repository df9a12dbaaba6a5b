"""The mesh over the eight simulated devices."""

import pytest

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("asked", "made"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, -1), (1, 8, 1)), ((4, 1, 2), (4, 1, 2))],
)
def test_one_size_may_be_what_is_left(asked: tuple[int, int, int], made: tuple[int, int, int]):
    mesh = make_mesh(*asked)
    assert dict(mesh.shape) == dict(zip(("data", "table", "tensor"), made, strict=True))
    assert mesh.size == 8


def test_the_default_takes_all_devices_for_data():
    assert dict(make_mesh().shape) == {"data": 8, "table": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (8, 2, 1), (16, 1, 1), (2, 2, 1)])
def test_sizes_that_do_not_make_the_devices_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1), (-1, 0, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(ConfigError, match="at most one -1"):
        make_mesh(*sizes)
