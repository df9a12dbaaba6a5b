"""Lists of recommendations for many users: the one path that evaluation and scoring share.

A user's list depends on the groups and batches it is computed in only through rounding, and both sides cut groups
and batches the same way: so evaluation's metrics equal those recomputed from scored files.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.data.cache import Histories, Windows
from dynrec_jax.errors import NonFiniteError
from dynrec_jax.models.bstm import Bstm
from dynrec_jax.models.item_encoder import ID_TABLE
from dynrec_jax.parallel.table import lookup
from dynrec_jax.parallel.topk import top_k

GROUP_USERS = 4096  # users of a group at most: one output file, one unit of restarting


class HistorySource(Protocol):
    """What lists are made from: `Histories`, or anything that can cut windows."""

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> Windows:
        """The last `size` events before event number `end` of each user."""
        ...

    def seen(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
        """The items of `windows` alone."""
        ...


class Lists(NamedTuple):
    """Lists of U users.

    Attributes:
      ids: int32[U, k], best first; 0 behind the last item that could be offered.
      scores: float32[U, k], logits; -inf where `ids` is 0.
    """

    ids: np.ndarray
    scores: np.ndarray


class NonFiniteScores(NonFiniteError):
    """Scores, or the vectors behind them, are NaN or infinite; nothing can be ranked by them."""


def groups(histories: Histories, users: int = GROUP_USERS) -> list[range]:
    """Users in ranges of at most `users`: of whole shards, or of parts of one that is larger."""
    result, start, end = [], 0, 0
    for shard in histories.shards:
        count = int(histories.shard_users[shard])
        if end > start and end + count - start > users:
            result.append(range(start, end))
            start = end
        end += count
        while end - start > users:
            result.append(range(start, start + users))
            start += users
    if end > start:
        result.append(range(start, end))
    return result


class Recommender:
    """Makes lists with a model's variables; compiles once for each width of history and of seen items."""

    def __init__(self, model: Bstm, mesh: Mesh, batch_size: int, k: int, filter_seen: bool):
        self._model = model
        self._mesh = mesh
        self._batch_size = batch_size
        self._filter_seen = filter_seen
        self.k = k
        self._catalogue = jax.jit(model.catalogue)
        self._list = jax.jit(self._recommend)

    def _recommend(self, params: Any, tables: Any, table_RxD: Any, items_BxL: Any, seen_BxM: Any) -> Any:
        rows_BxLxD = lookup(tables[ID_TABLE], items_BxL)
        u_BxD = self._model.last_vector(params, rows_BxLxD, items_BxL)
        q_BxD = self._model.abra.query(u_BxD, table_RxD)
        ids, scores = self._model.abra.best(q_BxD, table_RxD, seen_BxM, self.k)
        return ids, scores, jnp.isfinite(q_BxD).all()

    def prepare(self, params: Any, tables: Any) -> Callable[[HistorySource, np.ndarray, np.ndarray], Lists]:
        """A function (source, users, ends) -> Lists for these variables.

        Raises:
          NonFiniteScores: an item vector is not finite; the function raises it for users' vectors and scores.
        """
        with jax.set_mesh(self._mesh):
            table_RxD = self._catalogue(params, tables)
            if not bool(jnp.isfinite(table_RxD).all()):
                raise NonFiniteScores("item vectors are not finite")

        def batch(windows: Windows, seen_BxM: np.ndarray) -> tuple[Any, Any]:
            ids, scores, finite = self._list(params, tables, table_RxD, windows.items, seen_BxM)
            if not bool(finite) or bool(np.isnan(np.asarray(scores)).any()):
                raise NonFiniteScores("scores are not finite")
            return ids, scores

        def lists(source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
            with jax.set_mesh(self._mesh):
                return self.run(batch, source, users_U, ends_U)

        return lists

    def run(
        self,
        batch: Callable[[Windows, np.ndarray], tuple[Any, Any]],
        source: HistorySource,
        users_U: np.ndarray,
        ends_U: np.ndarray,
    ) -> Lists:
        """Cuts users into batches of similar length, short histories first, and puts the lists in order."""
        ids = np.zeros((len(users_U), self.k), np.int32)
        scores = np.full((len(users_U), self.k), -np.inf, np.float32)
        for place_B in _batches(ends_U, self._batch_size):
            users_B, ends_B = users_U[place_B], ends_U[place_B]
            short = self._batch_size - len(place_B)
            users_B = np.pad(users_B, (0, short), constant_values=-1)
            ends_B = np.pad(ends_B, (0, short))
            longest = max(int(ends_B.max()), 1)
            windows = source.windows(users_B, ends_B, min(_width(longest), self._model.max_length))
            seen_BxM = np.zeros((self._batch_size, 1), np.int32)
            if self._filter_seen:
                seen_BxM = source.seen(users_B, ends_B, _width(longest))
            new_ids, new_scores = batch(windows, seen_BxM)
            ids[place_B] = np.asarray(new_ids)[: len(place_B)]
            scores[place_B] = np.asarray(new_scores)[: len(place_B)]
        return Lists(ids, scores)


def _batches(ends_U: np.ndarray, size: int) -> Iterator[np.ndarray]:
    order = np.argsort(ends_U, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _width(longest: int) -> int:
    """The next power of two from 16 up: few widths, so few compilations."""
    return max(16, 1 << (longest - 1).bit_length())


def fixed_lists(recommender: Recommender, scores_R: np.ndarray, items: int, block: int) -> Any:
    """As `Recommender.prepare`, for one score per item that is the same for every user (a baseline)."""
    table_Rx1 = jnp.asarray(scores_R, jnp.float32)[:, None]
    best = jax.jit(
        lambda table, seen: top_k(
            jnp.ones((seen.shape[0], 1)), table, seen, k=recommender.k, items=items, scale=1.0, rows=block
        )
    )

    def lists(source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        return recommender.run(lambda windows, seen: best(table_Rx1, seen), source, users_U, ends_U)

    return lists
