"""Items that are kept out of training: which they are, and that no batch holds one."""

import numpy as np
import pytest

from dynrec_jax.batch import Batch
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.cold import cold_items, without
from dynrec_jax.data.pipeline import BatchSource, make_splits

from .. import tiny
from . import reference

SHARE = 0.5


def test_about_a_share_of_the_items_is_cold_and_the_same_ones_always():
    for share in (0.1, 0.5, 0.9):
        found = cold_items(20_000, share)
        assert found.shape == (20_001,)
        assert not found[0], "padding is no item"
        assert found[1:].mean() == pytest.approx(share, abs=0.015)  # four times its standard deviation
        assert set(np.flatnonzero(found).tolist()) == reference.cold(20_000, share)
        # Neither a larger share nor a larger catalogue lets an item in again.
        assert not (found & ~cold_items(20_000, min(share + 0.05, 0.9))).any()
        np.testing.assert_array_equal(cold_items(99, share), found[:100])
    assert not cold_items(20_000, 0.0).any()


def test_what_is_left_of_a_row_keeps_its_order():
    cold = np.array([False, True, False, True, False])
    items = np.array([[1, 2, 3, 4, 2], [1, 3, 1, 0, 0], [4, 0, 0, 0, 0], [2, 4, 1, 1, 1]])
    place, lengths = without(items, np.array([5, 3, 1, 4]), cold)
    moved = np.take_along_axis(items, place, axis=1)
    kept = [row[:length].tolist() for row, length in zip(moved, lengths, strict=True)]
    assert kept == [[2, 4, 2], [], [4], [2, 4]]


def windows_of(batch: Batch) -> dict[int, dict[str, list[int]]]:
    """Each window's events, by its number."""
    return {
        int(number): {
            name: values[batch.segments == number].tolist() for name, values in batch._asdict().items()
        }
        for number in np.unique(batch.segments[batch.segments > 0])
    }


@pytest.mark.parametrize("windows", ["last", "random"])
def test_no_batch_holds_a_cold_item_and_the_rest_is_as_it_was(windows, timed_dataset, cache_dir):
    histories = Histories(timed_dataset, cache_dir)
    cold = reference.cold(timed_dataset.items, SHARE)
    assert 2 < len(cold) < timed_dataset.items - 2

    def source(share: float) -> BatchSource:
        config = tiny.config(data__cold_items=share, data__windows=windows)
        return BatchSource(histories, make_splits(histories, config), config)

    whole, made, left_out, gone = source(0.0), source(SHARE), 0, 0
    for step in range(len(made)):
        batch, before = made[step], windows_of(whole[step])
        assert not np.isin(batch.items, list(cold)).any()
        found = windows_of(batch)
        for number, events in before.items():
            kept = [i for i, item in enumerate(events["items"]) if item not in cold]
            left_out += len(events["items"]) - len(kept)
            if not kept:
                gone += 1
                assert number not in found
                continue
            expected = {name: [events[name][i] for i in kept] for name in ("items", "times", "events")}
            expected["segments"] = [number] * len(kept)
            expected["positions"] = list(range(len(kept)))
            expected["remaining"] = list(range(len(kept)))[::-1]
            assert found[number] == expected
        assert len(found) == len(before) - gone
        gone = 0
    assert left_out > 100
