"""What an exchange must hold, counted by hand, and Zipf ids by their formula."""

import numpy as np
import pytest

from dynrec_jax.parallel import capacity
from dynrec_jax.parallel.exchange import Exchange

ROWS = 16  # four owners of four rows each; 16 stands for none


def test_needs_are_counted_without_repetition():
    asked = np.array([[0, 0, 1, 4], [1, 2, 3, 16], [15, 15, 15, 15], [12, 13, 1, 16]])
    # Device 1 asks owner 0 for three rows; owner 0 is asked for 0 to 3.
    assert capacity.most(asked, ROWS, (4,)) == [3, 4]
    # First hop: device 0 sends 0, 1 and 4 to the device that stands for owners 0 and 1, device 1 sends three.
    # Second hop: from devices 0 and 2, which the first one's requests end at, 0 and 1 go to owner 0 and 15 to owner 3;
    # from devices 1 and 3, rows 1, 2, 3 go to owner 0, and 12, 13 to owner 3.
    assert capacity.most(asked, ROWS, (2, 2)) == [3, 3, 4]


def test_nothing_asked_needs_room_for_one():
    assert capacity.most(np.full((4, 3), ROWS), ROWS, (4,)) == [1, 1]


def test_a_little_room_is_left_and_no_more_than_is_ever_asked():
    assert capacity.chosen([[10, 20], [11, 50]], (4,), asked=100) == Exchange((4,), (12,), 52)
    assert capacity.chosen([[10, 20]], (4,), asked=10) == Exchange((4,), (10,), 24)


def test_rounds_go_by_what_is_short():
    exchange = Exchange((2, 2), (4, 8), 16)
    assert capacity.rounds([4, 8, 16], exchange) == 1
    assert capacity.rounds([4, 17, 16], exchange) == 3
    assert capacity.rounds([4, 8, 17], exchange) == 2


@pytest.mark.parametrize(
    ("devices", "torus", "hops"),
    [
        (1, True, (1,)),
        (8, True, (8,)),
        (16, True, (4, 4)),
        (32, True, (8, 4)),
        (256, True, (16, 16)),
        (256, False, (256,)),
        (17, True, (17,)),
    ],
)
def test_hops_are_nearly_square_on_a_torus(devices: int, torus: bool, hops: tuple[int, ...]):
    assert capacity.hops(devices, torus) == hops


def test_zipf_ids_follow_their_law():
    drawn = capacity.zipf(np.random.default_rng(0), 1000, (100, 1000))
    assert drawn.shape == (100, 1000)
    assert drawn.min() == 1
    assert drawn.max() <= 1000
    harmonic = (1 / np.arange(1, 1001)).sum()
    for item in (1, 2, 3, 10):
        share = 1 / (item * harmonic)
        deviation = np.sqrt(share * (1 - share) / drawn.size)
        assert abs((drawn == item).mean() - share) < 4 * deviation
    tail = (1 / np.arange(501, 1001)).sum() / harmonic
    assert abs((drawn > 500).mean() - tail) < 4 * np.sqrt(tail * (1 - tail) / drawn.size)
