"""Neighbours of items, against counting pair by pair; and the file that keeps them."""

from pathlib import Path

import numpy as np
import pytest

from dynrec_jax.data.neighbours import (
    BACK,
    FADE,
    OTHER,
    OWN,
    REACH,
    Neighbours,
    count_neighbours,
    read_neighbours,
    write_neighbours,
)
from dynrec_jax.errors import DataError

ITEMS = 12


def histories(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(1, ITEMS, rng.integers(0, 15)).tolist() for _ in range(40)
    ]  # the last item is in none


def counted(all_items: list[list[int]], most: int) -> Neighbours:
    users = np.repeat(np.arange(len(all_items)), [len(own) for own in all_items])
    return count_neighbours(users, np.concatenate(all_items).astype(np.int32), ITEMS, most)


def test_weights_are_those_of_the_formula():
    found, after = histories(0), np.zeros((ITEMS + 1, ITEMS + 1))
    for own in found:
        for a, first in enumerate(own):
            for places in range(1, REACH + 1):
                if a + places < len(own) and own[a + places] != first:
                    after[first, own[a + places]] += FADE ** (places - 1)
    events = [sum(own.count(item) for own in found) for item in range(ITEMS + 1)]
    made = counted(found, ITEMS)
    for item in range(1, ITEMS + 1):
        ids, weights = made.ids[item - 1], made.weights[item - 1]
        expected = {
            j: (after[item, j] + BACK * after[j, item]) / events[item] ** OWN / events[j] ** OTHER
            for j in range(1, ITEMS + 1)
            if after[item, j] + after[j, item]
        }
        assert set(ids[ids > 0]) == set(expected)
        for j, weight in zip(ids, weights, strict=True):
            np.testing.assert_allclose(weight, expected[j] if j else 0.0, rtol=1e-6)
        assert (np.diff(weights) <= 0).all()
    assert made.events.tolist() == events[1:]


def test_the_nearest_are_kept():
    whole, few = counted(histories(1), ITEMS), counted(histories(1), 3)
    for part, all_of_it in zip(few[:2], whole[:2], strict=True):
        np.testing.assert_array_equal(part, all_of_it[:, :3])


def test_equal_neighbours_come_by_their_number():
    made = counted([[5, 9], [5, 2], [5, 7]], 2)
    assert made.ids[4].tolist() == [2, 7]
    assert made.ids[8].tolist() == [5, 0]
    np.testing.assert_allclose(made.weights[8], [BACK / 3**OTHER, 0], rtol=1e-6)


def test_the_file_gives_them_back_and_says_when_it_is_none(tmp_path: Path):
    found, path = counted(histories(2), 4), tmp_path / "neighbours.safetensors"
    with pytest.raises(DataError, match="counts anew"):
        read_neighbours(tmp_path, len(found.ids))
    write_neighbours(tmp_path, found)
    for one, other in zip(read_neighbours(tmp_path, len(found.ids)), found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    longer = read_neighbours(tmp_path, len(found.ids), len(found.ids) + 3)
    np.testing.assert_array_equal(longer.ids[:-3], found.ids)
    assert not longer.ids[-3:].any()
    assert not longer.weights[-3:].any()
    assert longer.events.tolist() == [*found.events, 0, 0, 0]
    with pytest.raises(DataError, match="is not what was written there for 2 items"):
        read_neighbours(tmp_path, 2)
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1  # of a weight
    path.write_bytes(whole)
    with pytest.raises(DataError, match="is not what was written"):
        read_neighbours(tmp_path, len(found.ids))
    path.write_bytes(whole[:20])
    with pytest.raises(DataError, match="counts anew"):
        read_neighbours(tmp_path, len(found.ids))
