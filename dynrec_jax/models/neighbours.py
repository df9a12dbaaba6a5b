"""Targets that are shared with what other histories say: the softmax against a mixture of items instead of one.

Label smoothing (Szegedy et al. 2016) gives a part of the target's probability to all items alike. Here it goes to the
items that were near the user's last items in the histories that train (`data.neighbours`), by their weights, so that
rare items learn from counts what their few events do not teach. The cross-entropy against such a target,
`log Σ_i e^{s_i} - Σ_j q_j s_j`, is that against one item whose vector is the mixture `Σ_j q_j v_j`: scores are linear
in vectors.
"""

import jax
import jax.numpy as jnp

from dynrec_jax.models.towers.tower import Described
from dynrec_jax.parallel.table import lookup

Array = jax.Array
IDS, WEIGHTS = "neighbour_ids", "neighbour_weights"  # names of what the devices hold of each item
LAST = 3  # last items of a history whose neighbours count
LESS = 0.6  # what each earlier one of them counts beside the one after it


def shared_targets(
    vector_BxLxD: Array,
    described: Described,
    positions_BxL: Array,
    table_RxD: Array,
    share: float,
) -> Array:
    """Targets' vectors mixed with those of the neighbours of each position's last items, `[B, L, D]`.

    Args:
      vector_BxLxD: of the targets, as they are scored.
      described: neighbours of the item at each position and their weights, `[B, L, M]` each.
      positions_BxL: int32, how many events of its history come before each.
      table_RxD: vectors of all items, as they are scored.
      share: of the neighbours; of a position that has none, the target keeps all.
    """
    ids_BxLxM, weight_BxLxM = described[IDS], described[WEIGHTS]
    flat = lookup(table_RxD, ids_BxLxM.reshape(ids_BxLxM.shape[0], -1))
    own_BxLxD = jnp.einsum("blm,blmd->bld", weight_BxLxM, flat.reshape(*ids_BxLxM.shape, -1))
    # The weight rides along as one more element, so that both are added up alike.
    own = jnp.concatenate([own_BxLxD, weight_BxLxM.sum(axis=-1, keepdims=True)], axis=-1)
    total = own
    for back in range(1, LAST):
        earlier = jnp.pad(own, ((0, 0), (back, 0), (0, 0)))[:, : own.shape[1]]
        total = total + jnp.where((positions_BxL >= back)[..., None], LESS**back * earlier, 0.0)
    sum_BxLxD, weight_BxLx1 = total[..., :-1], total[..., -1:]
    there_BxLx1 = weight_BxLx1 > 0
    mean_BxLxD = sum_BxLxD / jnp.where(there_BxLx1, weight_BxLx1, 1.0)
    return jnp.where(there_BxLx1, (1 - share) * vector_BxLxD + share * mean_BxLxD, vector_BxLxD)
