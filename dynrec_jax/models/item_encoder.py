"""The item encoder: from what is known of an item to its vector.

Items are described by rows of tables, which the step looks up first; here they become vectors of ABRA's space.
With ids alone the row is the vector.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.parallel.table import ids_of, rows_for

Array = jax.Array
ID_TABLE = "item_id"


def init_tables(key: Array, items: int, dim: int) -> dict[str, nn.LogicallyPartitioned]:
    """The row-sharded tables of N items, `{name: [R, D]}`, boxed with their logical axes.

    Rows start with length about 1, whatever D is; rows of no item are zero.
    """
    rows = rows_for(items)
    table_RxD = jax.random.normal(key, (rows, dim), jnp.float32) * dim**-0.5
    id_Rx1 = ids_of(jnp.arange(rows), rows)[:, None]
    table_RxD = jnp.where((id_Rx1 >= 1) & (id_Rx1 <= items), table_RxD, 0.0)
    return {ID_TABLE: nn.LogicallyPartitioned(table_RxD, ("items", None))}


class ItemEncoder(nn.Module):
    """Rows `[..., D]` of the id table to item vectors `[..., D]`."""

    @nn.compact
    def __call__(self, row: Array) -> Array:
        return row
