"""The ensemble: a model of ids and one of what else is known of the items, side by side, their scores summed.

Published as stronger than joint fusion on small catalogues (EnsRec, arXiv 2512.17820).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dynrec_jax.batch import Batch, History
from dynrec_jax.models.abra import Abra, Recommendation
from dynrec_jax.models.bstm import Bstm, Rows
from dynrec_jax.models.text_encoder import Text, TextEncoder
from dynrec_jax.models.towers.tower import Described
from dynrec_jax.models.user_encoder import Moments, Sight
from dynrec_jax.negatives import Negatives

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Two models side by side, one of ids and one of the towers, each with its own loss; their scores are summed.

    Everything is there twice, under "id" and "text"; a user's and an item's vectors are those of both, one after the
    other, so that one product is the sum of both scores: what is served is what was trained. The methods are `Bstm`'s.
    """

    id: Bstm
    content: Bstm

    @property
    def parts(self) -> dict[str, Bstm]:
        """The models by the name of their weights."""
        return {"id": self.id, "text": self.content}

    @property
    def abra(self) -> Abra:
        """The attention over the summed scores: each part has brought its vectors to unit length itself."""
        return dataclasses.replace(self.id.abra, normalise=False)

    @property
    def sampled(self) -> bool:
        """See `Bstm`."""
        return self.id.sampled

    @property
    def max_length(self) -> int:
        """See `Bstm`."""
        return self.id.max_length

    ids = True

    @property
    def sight(self) -> Sight:
        """See `Bstm`."""
        return self.id.sight

    @property
    def normalises(self) -> bool:
        """See `Bstm`."""
        return self.id.normalises

    @property
    def shrinkage(self) -> float:
        """See `Bstm`."""
        return self.id.shrinkage

    rows_are_vectors = False

    @property
    def shapes(self) -> tuple[tuple[str, int, str], ...]:
        """See `Bstm`."""
        return self.content.shapes

    @property
    def text(self) -> TextEncoder | None:
        """See `Bstm`."""
        return self.content.text

    def init(self, key: Array, bert: Any = None) -> dict[str, Any]:
        """See `Bstm`."""
        first, second = jax.random.split(key)
        own, content = self.id.init(first), self.content.init(second, bert)
        return {
            "params": {"id": own["params"], "text": content["params"]},
            "tables": own["tables"],
        }

    def encode(
        self, params: Any, text: Text, key: Array | None = None, parts: Sequence[int] | None = None
    ) -> Array:
        """See `Bstm`."""
        return self.content.encode(params["text"], text, key, parts)

    def loss(
        self, params: Any, rows: Rows, batch: Batch, negatives: Negatives | None, key: Array
    ) -> tuple[Array, Array]:
        """The sum of both losses. Neither has a gradient from the other; what clips gradients is the norm of all."""
        totals = [
            part.loss(params[name], rows, batch, negatives, jax.random.fold_in(key, number))
            for number, (name, part) in enumerate(self.parts.items())
        ]
        return totals[0][0] + totals[1][0], totals[0][1]

    def catalogue(self, params: Any, described: Described) -> Array:
        """See `Bstm`; `[R, 2 D]`."""
        return jnp.concatenate([p.catalogue(params[name], described) for name, p in self.parts.items()], -1)

    def ready(self, v: Array) -> Array:
        """See `Bstm`."""
        return jnp.concatenate(
            [p.ready(x) for p, x in zip(self.parts.values(), self._halves(v), strict=True)], -1
        )

    def user_vectors(self, params: Any, v_BxLxD: Array, at: Moments) -> Array:
        """See `Bstm`; `[B, L, 2 D]`."""
        halves = zip(self.parts.items(), self._halves(v_BxLxD), strict=True)
        return jnp.concatenate(
            [p.abra.unit(p.user_vectors(params[name], v, at)) for (name, p), v in halves], -1
        )

    def last_vector(self, params: Any, v_BxLxD: Array, history: History) -> Array:
        """See `Bstm`; `[B, 2 D]`."""
        halves = zip(self.parts.items(), self._halves(v_BxLxD), strict=True)
        vectors = [p.abra.unit(p.last_vector(params[name], v, history)) for (name, p), v in halves]
        return jnp.concatenate(vectors, -1)

    def recommend(
        self, params: Any, v_BxLxD: Array, history: History, table_RxD: Array, seen_BxM: Array, k: int
    ) -> Recommendation:
        """See `Bstm`."""
        return self.abra.recommend(self.last_vector(params, v_BxLxD, history), table_RxD, seen_BxM, k)

    @staticmethod
    def _halves(v: Array) -> list[Array]:
        return jnp.split(v, 2, axis=-1)
