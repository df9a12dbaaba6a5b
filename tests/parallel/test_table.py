"""Where rows lie, and their lookup."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.parallel.table import STRIPED_FROM, STRIPS, ids_of, in_rows, lookup, rows_for, rows_of

LARGE = rows_for(70_000)


@pytest.mark.parametrize(
    ("items", "rows"),
    [(1, 256), (255, 256), (256, 512), (3416, 3584), (65_279, 65_280), (65_280, 65_536), (70_000, 73_728)],
)
def test_a_table_has_room_for_padding_and_all_items(items: int, rows: int):
    assert rows_for(items) == rows


@pytest.mark.parametrize("rows", [512, LARGE])
def test_every_item_has_a_row_of_its_own(rows: int):
    ids = np.arange(rows)
    row = rows_of(ids, rows)
    assert sorted(row.tolist()) == ids.tolist()
    np.testing.assert_array_equal(ids_of(row, rows), ids)
    np.testing.assert_array_equal(rows_of(jnp.asarray(ids), rows), row)
    assert row[0] == 0


@pytest.mark.parametrize("rows", [512, LARGE])
def test_values_of_items_lie_in_their_rows(rows: int):
    values = np.arange(100, 400)
    found = in_rows(values, rows)
    assert [found[rows_of(item, rows)] for item in (0, 1, 299)] == [100, 101, 399]
    assert (found != 0).sum() == 300


def test_neighbours_of_a_large_table_have_different_owners():
    """By the definition: over any power of two of devices, the owner goes by the id modulo the devices."""
    for devices in (2, 8, 256, STRIPS):
        owner = rows_of(np.arange(LARGE), LARGE) // (LARGE // devices)
        by_id = owner.reshape(-1, devices)
        assert (by_id == by_id[0]).all()
        assert sorted(by_id[0].tolist()) == list(range(devices))


def test_rows_of_one_strip_ascend_with_the_items():
    strip = ids_of(np.arange(LARGE), LARGE).reshape(STRIPS, -1)
    assert (np.diff(strip, axis=1) == STRIPS).all()


def test_lookup_gives_the_rows_of_items():
    rng = np.random.default_rng(0)
    for rows in (12, LARGE):
        table = rng.normal(size=(rows, 3)).astype(np.float32)
        ids = rng.integers(0, rows, (5, 7))
        in_order = table[rows_of(np.arange(rows), rows)] if rows >= STRIPED_FROM else table
        np.testing.assert_array_equal(lookup(jnp.asarray(table), jnp.asarray(ids)), in_order[ids])
