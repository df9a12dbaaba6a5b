"""Histories that might have been: parts of a window, with events left out or in another order (Xie et al. 2022).

Some windows of every batch are changed, and their targets with them; which, and how, goes by (seed, number of the draw,
place in the window), so that it is the same for any number of processes and on resume.
"""

from typing import NamedTuple

import numpy as np

from dynrec_jax.data.cache import Windows
from dynrec_jax.data.examples import splitmix

LEAST = 2  # events that are left of a window, if it had as many: with fewer there is no target
CHOICE, START, LEFT_OUT, MOVED = (np.uint64(0x61756700 + n) for n in range(4))  # apart from all other draws


class Augmentation(NamedTuple):
    """What is done to some windows.

    Attributes:
      share: of the windows that are changed.
      crop: share of a window's events, next to each other, that are left; 1 leaves all.
      drop: share of the events that are left out, each by itself.
      reorder: places that an event moves at most; 0 leaves the order.
    """

    share: float
    crop: float
    drop: float
    reorder: int

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.share > 0 and (self.crop < 1 or self.drop > 0 or self.reorder > 0)


def rearranged(windows: Windows, place_BxW: np.ndarray, lengths_B: np.ndarray) -> Windows:
    """Windows whose event at each place is that of `place`, int64[B, W], with zeros from `lengths` on."""
    inside_BxW = np.arange(place_BxW.shape[1]) < lengths_B[:, None]
    return Windows(
        *(np.where(inside_BxW, np.take_along_axis(values, place_BxW, axis=1), 0) for values in windows)
    )


def augmented(
    windows: Windows, lengths_B: np.ndarray, numbers_B: np.ndarray, seed: int, how: Augmentation
) -> tuple[Windows, np.ndarray]:
    """The windows, some of them changed, and how long each is now, int64[B].

    Items and event types move; times stay in order, so that time does not run backwards.

    Args:
      windows: B of them, of W events.
      lengths_B: int64[B], events of each.
      numbers_B: int64[B], number of each draw in the run.
      seed: of the run.
      how: what is done.
    """
    width = windows.items.shape[1]
    at_1xW = np.arange(width)[None, :]

    def draw(purpose: np.uint64, *shape: int) -> np.ndarray:
        """float64[B, …], even in [0, 1)."""
        key_B = splitmix(numbers_B.astype(np.uint64) ^ splitmix(np.uint64(seed) ^ splitmix(purpose)))
        each = splitmix(key_B[:, None] + np.arange(shape[0], dtype=np.uint64)) if shape else key_B
        return (each >> np.uint64(11)).astype(np.float64) / 2**53

    chosen_B = draw(CHOICE) < how.share
    kept_BxW = at_1xW < lengths_B[:, None]
    if how.crop < 1:
        left_B = np.maximum(np.ceil(lengths_B * how.crop), np.minimum(lengths_B, LEAST))
        first_B = np.floor(draw(START) * (lengths_B - left_B + 1))
        inside_BxW = (at_1xW >= first_B[:, None]) & (at_1xW < (first_B + left_B)[:, None])
        kept_BxW = np.where(chosen_B[:, None], kept_BxW & inside_BxW, kept_BxW)
    if how.drop > 0:
        # Those with the lowest draws stay where too few would.
        drawn_BxW = np.where(kept_BxW, draw(LEFT_OUT, width), np.inf)
        order_BxW = np.argsort(np.argsort(drawn_BxW, axis=1, kind="stable"), axis=1, kind="stable")
        stays_BxW = (drawn_BxW < 1 - how.drop) | (order_BxW < LEAST)
        kept_BxW = np.where(chosen_B[:, None], kept_BxW & stays_BxW, kept_BxW)
    lengths_B = kept_BxW.sum(axis=1)
    in_order_BxW = np.argsort(~kept_BxW, axis=1, kind="stable")
    if not how.reorder:
        return rearranged(windows, in_order_BxW, lengths_B), lengths_B
    # Sorted by place plus a draw below n + 1, no event passes another that was more than n places away.
    moved_BxW = at_1xW + np.where(chosen_B[:, None], draw(MOVED, width) * (how.reorder + 1), 0)
    inside_BxW = at_1xW < lengths_B[:, None]
    jitter_BxW = np.argsort(np.where(inside_BxW, moved_BxW, np.inf), axis=1, kind="stable")
    ordered = rearranged(windows, in_order_BxW, lengths_B)
    moved = rearranged(windows, np.take_along_axis(in_order_BxW, jitter_BxW, axis=1), lengths_B)
    return moved._replace(times=ordered.times), lengths_B
