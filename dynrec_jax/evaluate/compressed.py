"""Lists by a compressed model: the item table and the user encoder in fewer bits, and what is best ranked again.

The compressed table only offers candidates. Their exact vectors, which lie on the disk, score them again, so that what
is served is what was trained but for items that were not offered. Histories are read by exact vectors from the disk,
too. Where the mixture of the catalogue refines the query (`model.hops`), it is that of the compressed table.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dynrec_jax.batch import History
from dynrec_jax.errors import ConfigError
from dynrec_jax.evaluate.exact import ExactRows
from dynrec_jax.evaluate.recommender import ListMaker, Made, NonFiniteScores, Recommender
from dynrec_jax.models.compressed import compressed_encoder, pruned, restored
from dynrec_jax.models.neighbours import Near, Raised, last_items
from dynrec_jax.parallel.compressed import KINDS, Compressed, compressed
from dynrec_jax.parallel.mesh import own_rows, place_rows
from dynrec_jax.parallel.processes import Processes
from dynrec_jax.parallel.rules import constrain

OFFERED = 2  # candidates for each place of a list
FEWEST_MORE = 32  # candidates beyond a short list, at least


@dataclasses.dataclass(frozen=True)
class Compression:
    """How a model is compressed; raises ConfigError where it cannot be so.

    Attributes:
      table: what ranks the catalogue, one of `parallel.compressed.KINDS`.
      encoder: the user encoder's matrices, one of them.
      prune: share of each of these matrices' weights that is set to 0, less than 1.
    """

    table: str = "float32"
    encoder: str = "float32"
    prune: float = 0.0

    def __post_init__(self) -> None:
        for name in ("table", "encoder"):
            if getattr(self, name) not in KINDS:
                raise ConfigError(f"--{name}={getattr(self, name)}: expected one of {', '.join(KINDS)}")
        if not 0.0 <= self.prune < 1.0:
            raise ConfigError(f"--prune={self.prune}: expected a share of the weights, from 0 to less than 1")

    @property
    def any(self) -> bool:
        """Whether anything is compressed at all."""
        return self != Compression()

    @property
    def name(self) -> str:
        """What differs from the model as it was trained, for a file's name: "table_int8_prune_0.3"."""
        own, plain = dataclasses.asdict(self), dataclasses.asdict(Compression())
        return "_".join(f"{key}_{value}" for key, value in own.items() if value != plain[key])


def check_processes(compression: Compression, processes: Processes) -> None:
    """Raises ConfigError where several processes would rank a compressed table: each has but a part of the rows."""
    if processes.count > 1 and compression.table != "float32":
        raise ConfigError(
            f"--table={compression.table}: is ranked by one process, and this is one of several; start one"
        )


def candidates(k: int, items: int) -> int:
    """How many items a compressed table offers for a list of `k`."""
    return min(max(OFFERED * k, k + FEWEST_MORE), items)


class CompressedRecommender(Recommender):
    """As `Recommender`, by a compressed model."""

    def __init__(
        self,
        *settings: Any,
        compression: Compression,
        folder: Path,
        offered: int | None = None,
        **more: Any,
    ):
        """`folder` is for exact vectors on the disk, `offered` other than `candidates`; the rest is `Recommender`'s.

        Raises:
          ConfigError: there are several processes, and the table is compressed.
        """
        super().__init__(*settings, **more)
        check_processes(compression, self._processes)
        self.compression = compression
        self._folder = folder
        self._offered = candidates(self.k, self._model.abra.items) if offered is None else offered
        self._compressed = jax.jit(self._in_fewer_bits, static_argnums=1)
        self._read_rows = jax.jit(self._vectors_of_rows)
        self._offer = jax.jit(self._candidates)
        self._rerank = jax.jit(self._reranked)

    def prepare(
        self, params: Any, tables: Any, vectors: tuple[jax.Array, jax.Array] | None = None
    ) -> ListMaker:
        """See `Recommender`. `tables` may be deleted afterwards, where the table is compressed."""
        vectors_RxD, table_RxD = self.vectors(params, tables) if vectors is None else vectors
        near, c, allowed_Rx1 = self.near, self.compression, self._only.place(self.mesh)
        with jax.set_mesh(self.mesh):
            if not bool(self._finite(table_RxD)):
                raise NonFiniteScores("item vectors are not finite")
            weights = compressed_encoder(pruned(params, c.prune) if c.prune else params, c.encoder)
            small = None if c.table == "float32" else self._compressed(table_RxD, c.table)
        if small is None:

            def batch(history: History, seen_BxM: jax.Array, offered_BxC: jax.Array | None = None) -> Any:
                read = self._encode(weights, vectors_RxD, history)
                return self._rank(read, table_RxD, seen_BxM, near, allowed_Rx1, offered_BxC)

            return functools.partial(self.run, batch)
        if self._only.offered is not None:
            raise ConfigError(
                "what each user is offered is ranked by the whole table; leave out its compression"
            )
        return self._offering(weights, ExactRows(vectors_RxD, self._folder), small, near, allowed_Rx1)

    def _offering(
        self,
        weights: Any,
        exact: ExactRows,
        small: Compressed,
        near: Near | None,
        allowed_Rx1: jax.Array | None,
    ) -> ListMaker:
        """Lists by a compressed table and the exact vectors on the disk; no other table is held."""

        def batch(history: History, seen_BxM: jax.Array) -> Any:
            v_BxLxD = place_rows(self.mesh, exact.rows(own_rows(history.items)))
            read = self._read_rows(weights, v_BxLxD, history)
            q_BxD, found, finite = self._offer(read, small, seen_BxM, near, allowed_Rx1)
            return functools.partial(best, q_BxD, found, finite)

        def best(q_BxD: jax.Array, found: Raised, finite: jax.Array) -> Made:
            # The next batch is on its way to the devices by now.
            v_BxCxD = place_rows(self.mesh, exact.rows(own_rows(found.ids)))
            with jax.set_mesh(self.mesh):
                made: Made = self._rerank(q_BxD, found, v_BxCxD, finite)
            return made

        return functools.partial(self.run, batch)

    def _in_fewer_bits(self, table_RxD: jax.Array, kind: str) -> Compressed:
        return jax.tree.map(
            lambda x: constrain(x, "items", *(None,) * (x.ndim - 1)), compressed(table_RxD, kind)
        )

    def _user_vectors(self, params: Any, vectors_RxD: Any, history: History) -> tuple[jax.Array, jax.Array]:
        return super()._user_vectors(restored(params), vectors_RxD, history)

    def _vectors_of_rows(self, weights: Any, v_BxLxD: Any, history: History) -> tuple[jax.Array, jax.Array]:
        u_BxD = constrain(self._model.last_vector(restored(weights), v_BxLxD, history), "batch", None)
        return u_BxD, constrain(last_items(history.items), "batch", None)

    def _candidates(
        self, read: Any, small: Compressed, seen_BxM: Any, near: Near | None, allowed_Rx1: Any
    ) -> tuple[jax.Array, Raised, jax.Array]:
        u_BxD, last_BxT = read
        q_BxD = self._model.abra.query(u_BxD, small)
        more = self.raised(near, last_BxT)
        found = self._model.abra.candidates(q_BxD, small, seen_BxM, self._offered, more, allowed_Rx1)
        found = jax.tree.map(lambda x: constrain(x, "batch", None), found)
        return constrain(q_BxD, "batch", None), found, jnp.isfinite(q_BxD).all()

    def _reranked(self, q_BxD: Any, found: Raised, v_BxCxD: Any, finite: Any) -> Made:
        ids, scores = self._model.abra.reranked(q_BxD, found, self._model.ready(v_BxCxD), self.k)
        finite &= ~jnp.isnan(scores).any()
        return constrain(ids, "batch", None), constrain(scores, "batch", None), finite
