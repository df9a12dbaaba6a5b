"""The picture of interests: what is drawn where, and that it is a picture."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from dynrec_jax.report.interests import draw_interests

TIMES = np.arange(20) * 86_400 + 1_704_067_200


def colour_shares(pixels: np.ndarray, colour: str, rows: slice) -> float:
    """The share of some rows of a picture that has one colour."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return float(np.mean(np.abs(pixels[rows, :, :3] - wanted).max(axis=2) < 0.01))


def test_both_panels_are_drawn_in_the_same_colours(tmp_path: Path):
    planted, inferred = np.zeros((20, 10)), np.zeros((20, 10))
    planted[:, 4] = 1.0
    inferred[:, 4], inferred[:, 7] = 0.5, 0.5
    path = tmp_path / "interests.png"
    draw_interests(path, TIMES, planted, inferred, [f"topic {k}" for k in range(10)], "a user")
    pixels = image.imread(path)
    upper, lower = slice(0, len(pixels) // 2), slice(len(pixels) // 2, None)
    most = colour_shares(pixels, "#0072B2", upper), colour_shares(pixels, "#0072B2", lower)
    second = colour_shares(pixels, "#E69F00", upper), colour_shares(pixels, "#E69F00", lower)
    assert most[0] > 0.5
    assert most[1] == pytest.approx(most[0] / 2, rel=0.1)
    assert second[0] < 0.01  # the legend
    assert second[1] == pytest.approx(most[0] / 2, rel=0.1)


def test_topics_beyond_the_legend_are_drawn_together(tmp_path: Path):
    share = np.full((20, 30), 0.2 / 23)
    share[:, :7] = 0.8 / 7
    path = tmp_path / "interests.png"
    draw_interests(path, TIMES, share, share, [f"topic {k}" for k in range(30)], "a user of everything")
    grey = colour_shares(image.imread(path), "#D9D9D9", slice(None))
    assert 0.1 < grey < 0.2


def test_where_nothing_was_planted_one_panel_is_drawn(tmp_path: Path):
    path = tmp_path / "interests.png"
    draw_interests(path, TIMES, None, np.ones((20, 1)), ["jazz"], "a user")
    assert colour_shares(image.imread(path), "#0072B2", slice(None)) > 0.5


def test_fewer_topics_than_colours_will_do(tmp_path: Path):
    draw_interests(tmp_path / "a.png", TIMES[:2], np.ones((2, 1)), np.ones((2, 1)), ["jazz"], "one topic")
    assert image.imread(tmp_path / "a.png").ndim == 3


@pytest.mark.parametrize(("moments", "topics"), [(19, 10), (20, 9)])
def test_shapes_that_do_not_belong_together_are_refused(tmp_path: Path, moments: int, topics: int):
    shares = np.ones((20, 10)) / 10
    with pytest.raises(ValueError, match=r"infers.*shape \(.*expected \(20, 10\)"):
        draw_interests(tmp_path / "a.png", TIMES, shares, np.ones((moments, topics)), ["x"] * 10, "x")
    assert not (tmp_path / "a.png").exists()
