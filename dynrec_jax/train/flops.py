"""What a model must compute, and what share of the devices' peak a run makes of it.

Counted are the matrix products that the training loss needs on real positions, forward and backward (twice the
forward's). Padding, lookups, norms and what is computed a second time to save memory are not: those are what the
share is there to show.
"""

from typing import Any, NamedTuple

import jax

from dynrec_jax.models.ensemble import Ensemble
from dynrec_jax.models.model import Model

PASSES = 3  # one forward; backward, a product becomes two: with respect to each of its sides


class Cost(NamedTuple):
    """Floating-point operations of a training step, forward and backward; a multiply-add is two.

    Attributes:
      target: of each position that has a target.
      pair: of each event that such a position attends to, itself included.
    """

    target: float
    pair: float

    def of(self, targets: float, attended: float) -> float:
        """Of so many positions that attend to so many events in all."""
        return self.target * targets + self.pair * attended


def training_cost(model: Model, params: Any, negatives: int) -> Cost | None:
    """The cost by the model's settings; `negatives` are a sampled loss's. `params` may be shapes alone.

    None where items are more than their ids: what describes them costs by the item, and not by the position.
    """
    if isinstance(model, Ensemble) or model.towers.item.towers:
        return None
    dim, items = model.abra.dim, model.abra.items
    scored = 1 + negatives if model.sampled else items
    scores = 2 * dim * scored
    hops = model.abra.hops * 4 * dim * items  # the catalogue's scores, and their mixture
    traversals = bool(model.forward_weight) + bool(model.backward_weight)
    target = 2 * _kernel_weights(params["user"]) + scores + hops
    pair = model.towers.user.layers * 4 * dim  # query · key, and weight · value
    return Cost(float(PASSES * traversals * target), float(PASSES * traversals * pair))


def _kernel_weights(params: Any) -> int:
    """Weights that each position is multiplied by: matrices, and no embeddings, which are looked up."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if getattr(path[-1], "key", None) == "kernel"
    )


class Utilisation(NamedTuple):
    """What turns counts and seconds into a share of the peak.

    Attributes:
      cost: of the model.
      peak: floating-point operations a second of all devices together.
    """

    cost: Cost
    peak: float

    def share(self, targets: float, attended: float, seconds: float) -> float | None:
        """The share of the peak, from 0 to 1, that was made use of.

        None where it would be more than all: the peak was then measured while the machine was busy with other work.
        """
        share = self.cost.of(targets, attended) / (seconds * self.peak)
        return share if share <= 1 else None
