"""What scoring writes, as tables with the ids of the source."""

import numpy as np
import pyarrow as pa

from dynrec_jax.data.arrow import to_arrow
from dynrec_jax.evaluate.recommender import Lists

SCORES = pa.list_(pa.float32())


def of_lists(owner: str, owners: pa.Array, lists: Lists, items: pa.Array) -> pa.Table:
    """Columns `owner` (string), `item_ids` (list of string, best first), `scores` (list of float).

    Places that could not be filled are left out of the lists.

    Args:
      owner: `user_id`, or `item_id` where the lists are of items.
      owners: ids of the U that have a list.
      lists: `[U, k]`.
      items: ids of all items, by index from 1.
    """
    real = lists.ids > 0
    offsets = to_arrow(np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32))
    ids = items.take(to_arrow(lists.ids[real] - 1)).cast(pa.string())
    columns = [
        owners.cast(pa.string()),
        pa.ListArray.from_arrays(offsets, ids),
        pa.ListArray.from_arrays(offsets, to_arrow(lists.scores[real])),
    ]
    kinds = zip((owner, "item_ids", "scores"), (pa.string(), pa.list_(pa.string()), SCORES), strict=True)
    return pa.Table.from_arrays(columns, schema=pa.schema(list(kinds)))


def of_vectors(owner: str, owners: pa.Array, vectors: np.ndarray) -> pa.Table:
    """Columns `owner` (string) and `vector` (list of float), of vectors `float32[U, D]`."""
    number, width = vectors.shape
    offsets = to_arrow((np.arange(number + 1) * width).astype(np.int32))
    flat = to_arrow(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    schema = pa.schema([(owner, pa.string()), ("vector", SCORES)])
    return pa.Table.from_arrays(
        [owners.cast(pa.string()), pa.ListArray.from_arrays(offsets, flat)], schema=schema
    )
