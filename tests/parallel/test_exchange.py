"""Rows asked of their owners, and gradients brought home: as plain indexing, whatever is asked and fits at once."""

from pathlib import Path

import numpy as np
import pytest

from dynrec_jax.parallel.exchange import Exchange

from .. import tiny, two_processes
from . import exchange_cases as cases

# Devices (data, fsdp, tensor), slices, and what goes at once: one row and up, in one hop and in two.
SIZES = [
    ((8, 1, 1), 1, Exchange((8,), (1,), 1)),
    ((1, 8, 1), 1, Exchange((8,), (5,), 64)),
    ((2, 2, 2), 1, Exchange((2, 4), (1, 1), 1)),
    ((1, 1, 8), 1, Exchange((4, 2), (3, 2), 5)),
    ((2, 2, 1), 2, Exchange((4,), (2,), 3)),
    ((1, 1, 2), 4, Exchange((2,), (40,), 64)),
    ((1, 1, 1), 8, Exchange((1,), (3,), 2)),
    ((1, 1, 1), 1, None),
]


def assert_right(found: dict[str, np.ndarray], kind: str, where: str) -> None:
    for name, want in cases.expected(cases.case(kind)).items():
        np.testing.assert_allclose(
            found[name], want, rtol=1e-6, atol=1e-6, err_msg=f"{where}, {kind}: {name}"
        )


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(("sizes", "slices", "exchange"), SIZES)
def test_rows_and_gradients_are_those_of_plain_indexing(
    sizes: tuple[int, int, int], slices: int, exchange: Exchange | None, kind: str
):
    found = cases.found(cases.case(kind), tiny.mesh(*sizes, slices=slices), exchange)
    assert_right(found, kind, f"{sizes} in {slices} slices")


def test_rows_of_a_striped_table_are_found_where_they_lie():
    """Owners go by the id modulo the devices there, in each of two slices."""
    assert_right(cases.found(cases.case("striped"), tiny.mesh(8, 1, 1), SIZES[0][2]), "striped", "8 devices")
    found = cases.found(cases.case("striped"), tiny.mesh(2, 2, 1, slices=2), SIZES[4][2])
    assert_right(found, "striped", "2 slices")


def test_replicas_of_a_table_stay_the_same_bit_for_bit():
    mesh = tiny.mesh(2, 1, 1, slices=4)
    x = cases.case("zipf")
    made = cases.made_on(x, mesh, Exchange((2,), (2,), 3))
    for array in (made["table"], made["seen"]):
        pieces: dict[int, set[bytes]] = {}
        for shard in array.addressable_shards:
            pieces.setdefault(shard.index[0].start or 0, set()).add(np.asarray(shard.data).tobytes())
        assert len(pieces) == 2
        assert all(len(replicas) == 1 for replicas in pieces.values())
    assert (np.asarray(made["table"]) != x.table).any()


def test_rows_and_gradients_are_the_same_in_two_processes(tmp_path: Path):
    out = tmp_path / "found.npz"
    two_processes.run("tests.parallel.exchange_cases", str(out))
    with np.load(out) as file:
        for kind in cases.KINDS:
            found = {name.split("/")[1]: file[name] for name in file.files if name.startswith(kind)}
            assert_right(found, kind, "2 processes")
