"""Packing: nothing is lost, nothing overlaps, and every event knows its place."""

import numpy as np
import pytest

from dynrec_jax.data.cache import Windows
from dynrec_jax.data.packing import add_rows, first_fit, pack

WIDTH = 10


def windows(lengths: np.ndarray, seed: int = 0) -> Windows:
    rng = np.random.default_rng(seed)
    shape = (len(lengths), WIDTH)
    inside = np.arange(WIDTH) < lengths[:, None]
    return Windows(*(np.where(inside, rng.integers(1, 1000, shape), 0).astype(np.int32) for _ in range(3)))


def test_first_fit_by_hand():
    row, offset, rows = first_fit(np.array([4, 0, 7, 3, 6, 10]), WIDTH)
    # Longest first: 10 alone, 7 opens a row, 6 another, 4 fits behind 6, 3 behind 7.
    assert rows == 3
    assert row[[0, 2, 3, 4, 5]].tolist() == [2, 1, 1, 2, 0]
    assert offset[[0, 2, 3, 4, 5]].tolist() == [6, 0, 7, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_windows_never_overlap_nor_overflow(seed: int):
    lengths = np.random.default_rng(seed).integers(0, WIDTH + 1, 30)
    row, offset, rows = first_fit(lengths, WIDTH)
    taken = np.zeros((rows, WIDTH), int)
    for r, o, length in zip(row, offset, lengths, strict=True):
        assert o + length <= WIDTH
        taken[r, o : o + length] += 1
    assert taken.max() == 1
    assert taken.sum() == lengths.sum()
    assert (taken[:, 0] == 1).all(), "no row is left empty"


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_holds_every_event_of_every_window_in_order(seed: int):
    lengths = np.random.default_rng(seed).integers(0, WIDTH + 1, 13)
    source = windows(lengths, seed)
    numbers = np.random.default_rng(seed).permutation(99)[:13] + 1
    batch = pack(source, lengths, numbers, 8, 4)
    assert batch.items.shape[0] % 4 == 0
    assert all(part.dtype == np.int32 and part.shape == batch.items.shape for part in batch)
    for window, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        rows, places = np.nonzero(batch.segments == number)
        assert len(places) == length
        assert len(set(rows)) <= 1
        assert (np.diff(places) == 1).all(), "a window lies in one piece"
        for name in ("items", "times", "events"):
            got, want = getattr(batch, name)[rows, places], getattr(source, name)[window, :length]
            assert got.tolist() == want.tolist()
        assert batch.positions[rows, places].tolist() == list(range(length))
        assert batch.remaining[rows, places].tolist() == list(range(length))[::-1]
    padding = batch.segments == 0
    assert padding.sum() == batch.segments.size - lengths.sum()
    for part in batch:
        assert not part[padding].any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding lies on the right"


def test_rows_are_those_asked_for_or_the_next_multiple_up():
    one = np.array([2])
    assert pack(windows(one), one, one, 8, 8).items.shape == (8, WIDTH)
    full = np.full(9, WIDTH)
    assert pack(windows(full), full, full, 8, 8).items.shape == (16, WIDTH)
    assert pack(windows(full), full, full, 12, 4).items.shape == (12, WIDTH)


def test_an_empty_batch_is_all_padding():
    none = np.zeros(4, np.int64)
    assert not any(part.any() for part in pack(windows(none), none, none + 1, 8, 8))


def test_rows_that_are_added_are_padding_behind_the_others():
    lengths = np.array([3, 2])
    batch = pack(windows(lengths), lengths, np.array([1, 2]), 2, 2)
    longer = add_rows(batch, 5)
    for part, more in zip(batch, longer, strict=True):
        assert more.shape == (5, WIDTH)
        assert more.dtype == np.int32
        np.testing.assert_array_equal(more[:2], part)
        assert not more[2:].any()
    assert add_rows(batch, 2) is batch
