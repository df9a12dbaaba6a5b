"""Windows of different lengths in rows of one length, so that little of a batch is padding.

A batch of 128 from MovieLens-1M at L = 200 fills 54 % of its positions when each row holds one window, and 86 % packed.
"""

import numpy as np

from dynrec_jax.batch import Batch
from dynrec_jax.data.cache import Windows


def first_fit(lengths_B: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Puts windows into rows of `width`, longest first, each into the first row with room.

    Returns:
      row int64[B] and offset int64[B] of each window, and how many rows are used. Empty windows go nowhere.
    """
    row_B = np.zeros(len(lengths_B), np.int64)
    offset_B = np.zeros(len(lengths_B), np.int64)
    used_R = np.zeros(max(len(lengths_B), 1), np.int64)
    rows = 0
    for window in np.argsort(-lengths_B, kind="stable"):
        length = lengths_B[window]
        if length == 0:
            break
        row = int(np.argmax(used_R + length <= width))
        row_B[window], offset_B[window] = row, used_R[row]
        used_R[row] += length
        rows = max(rows, row + 1)
    return row_B, offset_B, rows


def pack(windows: Windows, lengths_B: np.ndarray, numbers_B: np.ndarray, rows: int, multiple: int) -> Batch:
    """A batch of `rows` rows, or of the next `multiple` up where they do not hold all windows.

    Args:
      windows: B of them.
      lengths_B: events of each.
      numbers_B: what `segments` calls them.
      rows: as many as the batches of a run usually have.
      multiple: what the number of rows divides by.
    """
    width = windows.items.shape[1]
    row_B, offset_B, needed = first_fit(lengths_B, width)
    rows = max(rows, -(-needed // multiple) * multiple)
    at_W = np.arange(width)
    inside = at_W[None, :] < lengths_B[:, None]
    place = (row_B[:, None] * width + offset_B[:, None] + at_W[None, :])[inside]

    def spread(values: np.ndarray) -> np.ndarray:
        flat = np.zeros(rows * width, np.int32)
        flat[place] = np.broadcast_to(values, inside.shape)[inside]
        return flat.reshape(rows, width)

    return Batch(
        items=spread(windows.items),
        times=spread(windows.times),
        events=spread(windows.events),
        segments=spread(numbers_B[:, None]),
        positions=spread(at_W[None, :]),
        remaining=spread(lengths_B[:, None] - 1 - at_W[None, :]),
    )


def add_rows(batch: Batch, rows: int) -> Batch:
    """The batch with empty rows up to `rows`."""
    short = rows - batch.items.shape[0]
    return batch if short <= 0 else Batch(*(np.pad(values, ((0, short), (0, 0))) for values in batch))
