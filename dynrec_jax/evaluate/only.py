"""Which items may be in a list: of all users' lists alike, or of each user's."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.batch import PAD
from dynrec_jax.models.features import place
from dynrec_jax.models.towers.tower import Values


@dataclasses.dataclass(frozen=True)
class Offered:
    """Items that each user is offered, and no others.

    Attributes:
      items: int32, one user's after the other.
      starts: int64[U + 1], where each user's begin in `items`.
    """

    items: np.ndarray
    starts: np.ndarray

    @property
    def most(self) -> int:
        """The most that a user is offered."""
        return int(np.diff(self.starts).max(initial=0))

    def to(self, users_B: np.ndarray) -> np.ndarray:
        """int32[B, C], what some users are offered, filled up with zeros; a user of -1 is nobody."""
        real_B = users_B >= 0
        user_B = np.where(real_B, users_B, 0)
        at_BxC = self.starts[user_B][:, None] + np.arange(max(self.most, 1))
        inside = (at_BxC < self.starts[user_B + 1][:, None]) & real_B[:, None]
        return np.where(inside, self.items[np.where(inside, at_BxC, 0)], PAD).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Only:
    """Which items may be in a list.

    Attributes:
      allowed: bool[N + 1], by item; None where all are.
      offered: each user's own; None where all are.
    """

    allowed: np.ndarray | None = None
    offered: Offered | None = None

    def place(self, mesh: Mesh) -> jax.Array | None:
        """`allowed` on the devices, bool[R, 1], rows as item tables have them."""
        if self.allowed is None:
            return None
        values = Values(self.allowed[1:, None])
        return place(values, len(self.allowed) - 1, mesh)


EVERYTHING = Only()
