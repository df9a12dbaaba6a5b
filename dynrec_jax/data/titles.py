"""What items are called."""

from collections.abc import Sequence

import pyarrow as pa

from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.kinds import TEXT


def title_column(dataset: Dataset) -> str | None:
    """The items' column of titles: the first of text whose name has "title" in it, or else "name"."""
    texts = [name for name, kind in dataset.item_column_kinds.items() if kind == TEXT]
    return next((name for word in ("title", "name") for name in texts if word in name.lower()), None)


def titles(dataset: Dataset, items: Sequence[int]) -> list[str | None]:
    """Titles of some items by their indices; None of those that have none."""
    column = title_column(dataset)
    if column is None:
        return [None] * len(items)
    chosen = pa.array([item - 1 if 0 < item <= dataset.items else None for item in items], pa.int64())
    return [value or None for value in dataset.items_table().column(column).take(chosen).to_pylist()]
