"""How item tables start: about unit length, without memory beside them, zero where no item is."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from dynrec_jax.models.item_encoder import ID_TABLE, init_tables
from dynrec_jax.parallel.table import ids_of, rows_for

DIM = 16


def table(items: int, seed: int = 0) -> np.ndarray:
    made = jax.jit(lambda key: nn.meta.unbox(init_tables(key, items, DIM)))(jax.random.key(seed))
    return np.asarray(made[ID_TABLE])


@pytest.mark.parametrize("items", [3_000, 70_000])
def test_items_start_as_independent_normal_numbers_of_about_unit_length(items: int):
    made, rows = table(items), rows_for(items)
    id_R = ids_of(np.arange(rows), rows)
    real = (id_R >= 1) & (id_R <= items)
    assert not made[~real].any()
    x = made[real].astype(np.float64) * DIM**0.5
    # Means of n numbers of variance v lie within four times sqrt(v / n) but once in 16,000 tries.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) < 4 * (variance / x.size) ** 0.5
    assert np.abs(x).max() < 6
    for one, other in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[16:], x[:-16])):
        assert abs((one * other).mean()) < 4 / one.size**0.5
    assert abs((x * table(items, 1)[real] * DIM**0.5).mean()) < 4 / x.size**0.5


def test_a_large_table_takes_a_few_numbers_a_row_beside_itself():
    lowered = jax.jit(lambda key: nn.meta.unbox(init_tables(key, 200_000, DIM))).lower(jax.random.key(0))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 3 * 4 * rows_for(200_000)
