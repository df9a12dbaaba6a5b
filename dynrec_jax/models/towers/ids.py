"""The tower of an item's id: a row of a trained table. A row of zeros is an item that training has not seen."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.models.towers.tower import Described
from dynrec_jax.parallel.counters import mix

Array = jax.Array
ID_TABLE = "item_id"
INDEX = "index"  # of the item, int32[..., 1]: what id dropout draws by
SEEN = "seen"  # whether training sees the item, int32[..., 1]


class IdTower(nn.Module):
    """The id's row, and whether there is one.

    Attributes:
      dropout: share of the items that are taken for unseen where a key is given: the same ones wherever a step meets
        them, in histories, as targets and in the catalogue.
    """

    dropout: float

    @nn.compact
    def __call__(self, described: Described, key: Array | None = None) -> tuple[Array, Array]:
        row = described[ID_TABLE]
        present = jnp.any(row != 0, axis=-1, keepdims=True)
        if key is not None and self.dropout:
            first, *_, last = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
            bits = mix(mix(described[INDEX].astype(jnp.uint32) ^ first) + last)
            present = present & (bits >= jnp.uint32(round(self.dropout * 2**32)))
        return jnp.where(present, row, 0.0), present
