"""What other histories say, beside what the model has learned of them: items that were near the user's last ones.

A table of D numbers an item generalises, and cannot hold which items follow which where few did; counts
(`data.neighbours`) hold just that. They come in three times, each by a setting of its own:

- In the loss, `shared_targets`: the softmax is against a mixture of items instead of one. Label smoothing (Szegedy et
  al. 2016) gives a part of the target's probability to all items alike; here it goes to the neighbours, by their
  weights. The cross-entropy against such a target, `log Σ_i e^{s_i} - Σ_j q_j s_j`, is that against one item whose
  vector is the mixture `Σ_j q_j v_j`: scores are linear in vectors.
- In what is served, `raised`: the neighbours' scores are raised by `weight · log(1 + h_i / FEW)`, h being what their
  counts add up to. It is the interpolation of a model with a memory that language models know (kNN-LM, Khandelwal et
  al. 2020), of scores instead of probabilities, so that nothing needs the softmax's sum.
- In what is served, `shrunk`: vectors of items that were seen a few times are drawn to those of their neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.batch import PAD
from dynrec_jax.models.towers.tower import Described
from dynrec_jax.parallel.table import lookup, lookup_by_row

Array = jax.Array
IDS, WEIGHTS = "neighbour_ids", "neighbour_weights"  # names of what the devices hold of each item
LAST = 3  # last items of a history whose neighbours count
LESS = 0.8  # what each earlier one of them counts beside the one after it
TAUGHT = 24  # neighbours of each, the nearest, whose vectors are looked up: in the loss, of each position
FEW = 0.1  # what counts add up to where they begin to tell: about as much as one neighbour of the last item alone


class Near(NamedTuple):
    """Neighbours of all items, rows as the item tables'.

    Attributes:
      ids: int32[R, M]; 0 where an item has no more.
      weights: float32[R, M]; 0 there.
      events: int32[R, 1], of the item itself.
    """

    ids: Array
    weights: Array
    events: Array


class Raised(NamedTuple):
    """Items whose scores are raised.

    Attributes:
      ids: int32[B, C], each of a row once; 0 names none.
      by: float32[B, C], what is added; never less than 0.
    """

    ids: Array
    by: Array


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


def last_items(items_BxL: Array) -> Array:
    """The last items of histories, newest first, int32[B, LAST]; 0 where a history has fewer."""
    length_Bx1 = (items_BxL != PAD).sum(axis=1, dtype=jnp.int32)[:, None]
    place_BxT = length_Bx1 - 1 - jnp.arange(LAST)[None, :]
    found_BxT = jnp.take_along_axis(items_BxL, jnp.maximum(place_BxT, 0), axis=1)
    return jnp.where(place_BxT >= 0, found_BxT, PAD)


def raised(near: Near, last_BxT: Array, weight: float) -> Raised:
    """The neighbours of some users' last items, and by how much they are raised.

    Args:
      near: of all items.
      last_BxT: as `last_items` gives them.
      weight: of the counts beside the model's scores.
    """
    ids_BxC = lookup(near.ids, last_BxT).reshape(last_BxT.shape[0], -1)
    fading_T = LESS ** jnp.arange(last_BxT.shape[1], dtype=jnp.float32)
    weight_BxTxM = lookup(near.weights, last_BxT) * fading_T[None, :, None]
    weight_BxC = jnp.where(last_BxT[..., None] != PAD, weight_BxTxM, 0.0).reshape(ids_BxC.shape)
    same_BxCxC = ids_BxC[:, :, None] == ids_BxC[:, None, :]
    total_BxC = jnp.where(same_BxCxC, weight_BxC[:, None, :], 0.0).sum(axis=-1)
    first_BxC = jnp.argmax(same_BxCxC, axis=-1) == jnp.arange(ids_BxC.shape[1])[None, :]
    there_BxC = first_BxC & (total_BxC > 0)
    return Raised(jnp.where(there_BxC, ids_BxC, PAD), weight * jnp.log1p(total_BxC / FEW))


def raised_by_each(near: Near, last_BxT: Array, ids_B: Array, weight: float) -> Array:
    """What each of some users' last items adds to the score of one item, float32[B, T]; they sum to what `raised` says.

    The logarithm of what the counts add up to is parted as the counts are: the path integral of its gradient, from no
    counts to all of them, has this closed form (Aumann & Shapley 1974).

    Args:
      near: of all items.
      last_BxT: as `last_items` gives them.
      ids_B: int32, the item of each user.
      weight: of the counts beside the model's scores.
    """
    ids_BxTxM, weight_BxTxM = (lookup(x, last_BxT) for x in (near.ids, near.weights))
    fading_T = LESS ** jnp.arange(last_BxT.shape[1], dtype=jnp.float32)
    named = (ids_BxTxM == ids_B[:, None, None]) & (ids_B != PAD)[:, None, None] & (last_BxT != PAD)[..., None]
    count_BxT = jnp.where(named, weight_BxTxM, 0.0).sum(axis=-1) * fading_T[None, :]
    total_Bx1 = count_BxT.sum(axis=1, keepdims=True)
    part_BxT = count_BxT / jnp.where(total_Bx1 > 0, total_Bx1, 1.0)
    return weight * jnp.log1p(total_Bx1 / FEW) * part_BxT


def shrunk(vectors_RxD: Array, near: Near, events: float) -> Array:
    """Item vectors, each drawn to the mean of its neighbours' by how few events it had, `[R, D]`.

    `v_i ← (n_i v_i + κ m_i) / (n_i + κ)`, m_i being the mean of i's nearest `TAUGHT` neighbours by their weights: what
    is best for many means of which each was measured a few times (empirical Bayes; Efron & Morris 1975), where the
    prior's mean is the neighbours'. An item without neighbours keeps its vector.

    Args:
      vectors_RxD: of all items.
      near: of all items.
      events: κ, how many events of an item its neighbours count as much as.
    """

    def add(sum_RxD: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
        ids_R, weight_R = each
        return sum_RxD + weight_R[:, None] * lookup_by_row(vectors_RxD, ids_R), None

    # One neighbour of all items at a time: all at once would be as many tables.
    ids_MxR, weight_MxR = near.ids[:, :TAUGHT].T, near.weights[:, :TAUGHT].T
    sum_RxD, _ = jax.lax.scan(add, jnp.zeros_like(vectors_RxD), (ids_MxR, weight_MxR))
    weight_Rx1 = weight_MxR.sum(axis=0)[:, None]
    there_Rx1 = weight_Rx1 > 0
    mean_RxD = sum_RxD / jnp.where(there_Rx1, weight_Rx1, 1.0)
    share_Rx1 = events / (near.events + events)
    return jnp.where(there_Rx1, vectors_RxD + share_Rx1 * (mean_RxD - vectors_RxD), vectors_RxD)
