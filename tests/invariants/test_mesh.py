"""Same gradients, losses over twenty steps, and lists on any mesh: one device, eight in several splits, slices, two
processes of four; dropout included, for each loss."""

import functools
from pathlib import Path

import numpy as np
import pytest

from .. import tiny, two_processes
from . import one_step

ALL = [(8, 1, 1), (2, 2, 2), (1, 8, 1)]
QUICK = [
    ("full", (2, 2, 2)),
    ("sampled", (8, 1, 1)),
    ("gbce", (1, 8, 1)),
    ("neighbours", (2, 2, 2)),
]
MESHES = [
    pytest.param(kind, sizes, marks=[] if (kind, sizes) in QUICK else pytest.mark.slow)
    for kind in one_step.KINDS
    for sizes in ALL
    if kind != "together" or sizes == (2, 2, 2)  # its parts have four rows
]
SLICES = ["full", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("popularity", "in_batch"))]


@functools.cache
def on_one_device(kind: str) -> dict[str, np.ndarray]:
    found = one_step.step(kind, tiny.mesh(1, 1, 1))
    # The step does something everywhere; else a comparison says nothing.
    for name in found:
        # A bias of keys adds the same to all scores of a query: attention does not see it.
        if name.startswith("before") and "['key']['bias']" not in name:
            assert np.abs(found[name] - found[name.replace("before", "after")]).max() > 1e-4
    return found


def assert_same(kind: str, found: dict[str, np.ndarray], where: str) -> None:
    """Sums of some hundred float32 numbers in another order differ by some 1e-7 of their largest part.

    Weights after the step are compared with 1e-5 absolute, gradients being about 1.
    """
    expected = on_one_device(kind)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        if name in one_step.SCALARS:
            np.testing.assert_allclose(found[name], want, rtol=1e-5, err_msg=f"{where}: {name}")
        elif name == "ids" or name.startswith("before"):
            np.testing.assert_array_equal(found[name], want, err_msg=f"{where}: {name}")
        else:
            np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-5, err_msg=f"{where}: {name}")


@pytest.mark.parametrize(("kind", "sizes"), MESHES)
def test_steps_are_the_same_on_any_mesh(kind: str, sizes: tuple[int, int, int]):
    assert_same(kind, one_step.step(kind, tiny.mesh(*sizes)), str(sizes))


@pytest.mark.parametrize("kind", SLICES)
def test_steps_are_the_same_over_slices(kind: str):
    assert_same(kind, one_step.step(kind, tiny.mesh(2, 1, 2, slices=2)), "2 slices of 2 x 1 x 2")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("sampled", "8x1x1")] + [pytest.param(kind, "2x2x2", marks=pytest.mark.slow) for kind in one_step.KINDS],
)
def test_steps_are_the_same_in_two_processes(kind: str, sizes: str, tmp_path: Path):
    out = tmp_path / "found.npz"
    two_processes.run("tests.invariants.one_step", kind, sizes, str(out))
    with np.load(out) as found:
        assert_same(kind, dict(found), f"2 processes, {sizes}")
