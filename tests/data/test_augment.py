"""Augmented windows: parts of what was there, the same whoever draws them, in the order that was asked for."""

import numpy as np
import pytest

from dynrec_jax.data.augment import Augmentation, augmented
from dynrec_jax.data.cache import Windows

ROWS, WIDTH = 4_000, 12
LENGTHS = np.arange(ROWS) % (WIDTH + 1)
NUMBERS = np.arange(ROWS) + 10_000
NOTHING = Augmentation(share=1.0, crop=1.0, drop=0.0, reorder=0)


def windows() -> Windows:
    """Item p + 1 of event type p + 101 at time 10 p at place p."""
    place = np.arange(WIDTH)[None, :]
    inside = place < LENGTHS[:, None]
    return Windows(
        *(np.where(inside, values, 0).astype(np.int32) for values in (place + 1, place * 10, place + 101))
    )


def events(how: Augmentation, seed: int = 0) -> list[list[int]]:
    """What is left of each window, by its items."""
    made, lengths = augmented(windows(), LENGTHS, NUMBERS, seed, how)
    for row, length in enumerate(lengths):
        assert made.items[row, :length].all()
        for values in made:
            assert not values[row, length:].any()
        np.testing.assert_array_equal(made.events[row, :length], made.items[row, :length] + 100)
    return [made.items[row, :length].tolist() for row, length in enumerate(lengths)]


WAYS = {
    "crop": NOTHING._replace(crop=0.5),
    "drop": NOTHING._replace(drop=0.3),
    "reorder": NOTHING._replace(reorder=2),
    "all": NOTHING._replace(share=0.5, crop=0.7, drop=0.2, reorder=1),
}


def test_nothing_changes_nothing():
    whole = [list(range(1, length + 1)) for length in LENGTHS]
    assert events(NOTHING) == events(WAYS["all"]._replace(share=0.0)) == whole
    assert not NOTHING.changes
    assert not WAYS["all"]._replace(share=0.0).changes
    assert all(how.changes for how in WAYS.values())


@pytest.mark.parametrize("name", WAYS)
def test_two_events_are_left_of_those_who_have_them(name: str):
    for length, left in zip(LENGTHS, events(WAYS[name]), strict=True):
        assert min(length, 2) <= len(left) <= length


@pytest.mark.parametrize("name", WAYS)
def test_what_a_draw_becomes_depends_on_seed_and_number_alone(name: str):
    how = WAYS[name]
    made, lengths = augmented(windows(), LENGTHS, NUMBERS, 0, how)
    order = np.random.default_rng(0).permutation(ROWS)[:100]
    part = Windows(*(values[order] for values in windows()))
    other, other_lengths = augmented(part, LENGTHS[order], NUMBERS[order], 0, how)
    np.testing.assert_array_equal(other_lengths, lengths[order])
    for one, two in zip(made, other, strict=True):
        np.testing.assert_array_equal(two, one[order])
    assert events(how, seed=1) != events(how)
    again, _ = augmented(windows(), LENGTHS, NUMBERS + 1, 0, how)
    assert (again.items != made.items).any()


def test_a_crop_is_one_piece_of_the_given_share_anywhere():
    firsts = []
    for length, left in zip(LENGTHS, events(WAYS["crop"]), strict=True):
        assert len(left) == max(-(-length // 2), min(length, 2))
        assert left == list(range(left[0], left[0] + len(left))) if left else length == 0
        if length == 12:
            firsts.append(left[0])
    counts = np.bincount(firsts)[1:]  # 7 places for 6 of 12
    assert len(counts) == 7
    assert counts.min() > 0.6 * counts.mean()


def test_events_are_left_out_by_themselves_in_their_share():
    left = [left for length, left in zip(LENGTHS, events(WAYS["drop"]), strict=True) if length == 12]
    assert all(row == sorted(row) for row in left)
    share = np.mean([[place + 1 in row for place in range(WIDTH)] for row in left], axis=0)
    np.testing.assert_allclose(share, 0.7, atol=0.12)  # of 307 windows: four deviations of 0.026
    np.testing.assert_allclose(share.mean(), 0.7, atol=0.03)


def test_events_move_so_many_places_and_times_stay_in_order():
    made, lengths = augmented(windows(), LENGTHS, NUMBERS, 0, WAYS["reorder"])
    assert lengths.tolist() == LENGTHS.tolist()
    np.testing.assert_array_equal(made.times, windows().times)
    passed = set()
    for row in made.items:
        items = row[row > 0]
        assert sorted(items) == list(range(1, len(items) + 1))
        passed |= {int(a - b) for n, a in enumerate(items) for b in items[n + 1 :] if a > b}
    assert passed == {1, 2}


def test_a_share_of_the_windows_is_changed():
    whole = [list(range(1, length + 1)) for length in LENGTHS]
    long = LENGTHS == 12
    changed = np.array(
        [a != b for a, b in zip(events(NOTHING._replace(share=0.3, crop=0.5)), whole, strict=True)]
    )
    np.testing.assert_allclose(changed[long].mean(), 0.3, atol=0.11)
