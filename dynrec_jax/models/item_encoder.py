"""The item encoder: from what is known of an item to its vector.

Items are described by rows of tables, which the step looks up first; here they become vectors of ABRA's space.
With ids alone the row is the vector.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.models.layers import hash_bits
from dynrec_jax.parallel.table import STRIPED_FROM, ids_of, rows_for

Array = jax.Array
ID_TABLE = "item_id"


def init_tables(key: Array, items: int, dim: int) -> dict[str, nn.LogicallyPartitioned]:
    """The row-sharded tables of N items, `{name: [R, D]}`, boxed with their logical axes.

    Rows start with length about 1, whatever D is; rows of no item are zero.
    """
    rows = rows_for(items)
    normal_RxD = (
        jax.random.normal(key, (rows, dim)) if rows < STRIPED_FROM else _hashed_normal(key, rows, dim)
    )
    table_RxD = normal_RxD * dim**-0.5
    id_Rx1 = ids_of(jnp.arange(rows), rows)[:, None]
    table_RxD = jnp.where((id_Rx1 >= 1) & (id_Rx1 <= items), table_RxD, 0.0)
    return {ID_TABLE: nn.LogicallyPartitioned(table_RxD, ("items", None))}


def _hashed_normal(key: Array, rows: int, dim: int) -> Array:
    """Standard normal numbers [R, D] from a hash of (key, row, column).

    JAX's own generator holds several arrays of the result's size on its way; this one holds none.
    """
    bits_RxD = hash_bits(key, jnp.arange(rows, dtype=jnp.uint32)[None, :], dim)[0]
    # The middles of 2^23 steps between -1 and 1, so that neither end is reached.
    middle_RxD = (bits_RxD >> 9).astype(jnp.float32) * 2.0**-22 + (2.0**-23 - 1.0)
    return jax.lax.erf_inv(middle_RxD) * 2**0.5


class ItemEncoder(nn.Module):
    """Rows `[..., D]` of the id table to item vectors `[..., D]`."""

    @nn.compact
    def __call__(self, row: Array) -> Array:
        return row
