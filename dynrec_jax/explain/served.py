"""Scores as they are served, of any items after any histories: what an explanation takes apart."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynrec_jax.batch import PAD, History
from dynrec_jax.evaluate.recommender import NonFiniteScores, Recommender, widths
from dynrec_jax.models.neighbours import Near, last_items, raised_by_each
from dynrec_jax.parallel.mesh import place_rows, place_same, row_pieces
from dynrec_jax.parallel.rules import constrain, sharding
from dynrec_jax.parallel.table import ids_of, in_rows, lookup, rows_of
from dynrec_jax.workdir import Run

POSITIONS = 16_384  # of the histories that are read together
SIZES = (8, 16, 64, 512)  # histories that are read together, so that few programs are compiled


class Past(NamedTuple):
    """One user's history, oldest event first, as far back as it is looked at.

    Attributes:
      items: int32[n].
      times: int32[n], seconds since the dataset's first event.
      events: int32[n], event types.
      asked: when what comes next is asked for, in such seconds.
    """

    items: np.ndarray
    times: np.ndarray
    events: np.ndarray
    asked: int


class Standing(NamedTuple):
    """Where items stand among all that could be recommended, an element a history.

    Attributes:
      score: float64, the item's logit.
      log_probability: float64, its logarithm under the softmax of all items' logits.
      rank: int64, its place, from 1, among the items that are not left out; equal scores by the lowest index.
      interest: int64, which of the user's interests gives the score, from 1.
      counts: float64, what neighbours' counts are of the score.
    """

    score: np.ndarray
    log_probability: np.ndarray
    rank: np.ndarray
    interest: np.ndarray
    counts: np.ndarray


class _Tables(NamedTuple):
    """Vectors of all items, as the encoder reads them and as they are scored, and their neighbours, if they count."""

    read: jax.Array
    scored: jax.Array
    near: Near | None


class Served:
    """A run's scores. Histories are cut and padded here, so that few programs are compiled.

    Attributes:
      run: the trained model.
      length: events of a history that the model reads.
    """

    def __init__(self, run: Run):
        """Makes the vectors of all items.

        Raises:
          NonFiniteScores: one is not finite.
        """
        self.run = run
        self.length: int = run.model.max_length
        self._model = run.model
        self._recommender = Recommender(run.model, run.mesh, 1, 1, True, items=run.items)
        self._tables = _Tables(*self._recommender.vectors(run.params, run.tables), self._recommender.near)
        self._pieces = row_pieces(run.mesh)
        self._widths = widths(self.length)
        self._score = jax.jit(self._scored)
        self._read = jax.jit(self._queried)
        self._stand = jax.jit(self._standing)
        self._slope = jax.jit(self._sloped)
        self._share = jax.jit(self._counted)
        with jax.set_mesh(run.mesh):
            if not bool(jax.jit(lambda table_RxD: jnp.isfinite(table_RxD).all())(self._tables.scored)):
                raise NonFiniteScores("item vectors are not finite")

    def scores(self, past: Past, kept_KxN: np.ndarray, item: int) -> np.ndarray:
        """float64[K], an item's logit after the events that each row of `kept` leaves; later ones move up."""
        found = [
            np.asarray(self._call(self._score, history, _same(item, history)), np.float64)[:number]
            for number, history in self._batches(past, kept_KxN)
        ]
        return _finite(np.concatenate(found))

    def standing(self, past: Past, kept_KxN: np.ndarray, item: int, left_out: np.ndarray) -> Standing:
        """Where an item stands after the events that each row of `kept` leaves.

        Args:
          past: the history.
          kept_KxN: bool.
          item: its index.
          left_out: int32, items that are not recommended; `item` may be one, and is ranked all the same.
        """
        rows = self._tables.scored.shape[0]
        offered_N = np.ones(self.run.items.number + 1, bool)
        offered_N[[PAD, *left_out]] = False
        offered_R = place_same(sharding(self.run.mesh, "items"), in_rows(offered_N, rows))
        parts = []
        for number, history in self._batches(past, kept_KxN):
            read = self._call(self._read, history)
            item_B = place_rows(self.run.mesh, _same(item, history))
            with jax.set_mesh(self.run.mesh):
                made = self._stand(self._tables, *read, item_B, offered_R)
            parts.append([np.asarray(x, np.float64)[:number] for x in made])
        score, log_probability, rank, interest, counts = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        _finite(log_probability)
        return Standing(score, log_probability, rank.astype(np.int64), interest.astype(np.int64), counts)

    def slopes(self, past: Past, item: int, places_S: np.ndarray) -> tuple[np.ndarray, float]:
        """The logit's slope along each event's way from a baseline, and the logit at the baseline.

        There all events have the mean vector of the history's; they keep their positions, times and types. What
        neighbours' counts add is left out.

        Args:
          past: the history, no longer than `length`.
          item: its index.
          places_S: how far along the way, between 0 and 1: 1 is the events as they are.

        Returns:
          float64[S, n], and the logit.
        """
        found, starts = [], []
        for start in range(0, len(places_S), SIZES[0]):
            place_B = places_S[start : start + SIZES[0]].astype(np.float32)
            kept_KxN = np.ones((len(place_B), len(past.items)), bool)
            ((number, history),) = self._batches(past, kept_KxN, most=0)
            place_B = np.pad(place_B, (0, len(history.items) - number))
            made = self._call(self._slope, history, _same(item, history), place_B)
            slope_BxL, start_B = (np.asarray(x, np.float64) for x in made)
            found.append(slope_BxL[:number, : len(past.items)])
            starts.append(start_B[0])
        return _finite(np.concatenate(found)), float(starts[0])

    def counts(self, past: Past, item: int) -> np.ndarray:
        """float64[n], what each event adds to an item's logit by neighbours' counts."""
        share_N = np.zeros(len(past.items))
        if self._tables.near is None:
            return share_N
        ((_, history),) = self._batches(past, np.ones((1, len(past.items)), bool))
        made_T = np.asarray(self._call(self._share, history, _same(item, history)), np.float64)[0]
        for back, share in enumerate(made_T[: len(past.items)]):
            share_N[-1 - back] = share
        return _finite(share_N)

    def _batches(
        self, past: Past, kept_KxN: np.ndarray, most: int = POSITIONS
    ) -> Iterator[tuple[int, History]]:
        """Histories of some events of one, so many that there are and empty ones behind them."""
        longest = int(kept_KxN.sum(axis=1).max(initial=0))
        width = next((width for width in self._widths if width >= longest), self.length)
        size = next((s for s in SIZES if s >= len(kept_KxN) or 8 * s * width > most), SIZES[-1])
        size = -(-size // self._pieces) * self._pieces
        for start in range(0, len(kept_KxN), size):
            rows = kept_KxN[start : start + size]
            yield len(rows), self._cut(past, np.pad(rows, ((0, size - len(rows)), (0, 0))), width)

    def _cut(self, past: Past, kept_BxN: np.ndarray, width: int) -> History:
        count_B = kept_BxN.sum(axis=1)
        # The places of the kept events first, in their order.
        order_BxN = np.argsort(~kept_BxN, axis=1, kind="stable")
        at_BxL = np.maximum(count_B - width, 0)[:, None] + np.arange(width)
        inside = at_BxL < count_B[:, None]
        place_BxL = np.take_along_axis(order_BxN, np.where(inside, at_BxL, 0), axis=1)
        columns = [
            np.where(inside, column[place_BxL], PAD).astype(np.int32)
            for column in (past.items, past.times, past.events)
        ]
        sight = self._model.sight
        return History(
            columns[0],
            columns[1] if sight.needs_times else None,
            columns[2] if sight.event_types else None,
            np.full(len(kept_BxN), past.asked, np.int32) if sight.query_time else None,
        )

    def _call(self, program: Callable[..., Any], history: History, *given: np.ndarray) -> Any:
        """What a program makes of a batch."""
        with jax.set_mesh(self.run.mesh):
            rows = jax.tree.map(functools.partial(place_rows, self.run.mesh), (history, *given))
            return program(self.run.params, self._tables, *rows)

    def _query(self, params: Any, tables: _Tables, history: History, v_BxLxD: jax.Array) -> jax.Array:
        u_BxD = constrain(self._model.last_vector(params, v_BxLxD, history), "batch", None)
        return self._model.abra.query(u_BxD, tables.scored)

    def _counted(self, params: Any, tables: _Tables, history: History, item_B: jax.Array) -> jax.Array:
        assert tables.near is not None
        weight = self._model.abra.neighbours
        return raised_by_each(tables.near, last_items(history.items), item_B, weight)

    def _scored(self, params: Any, tables: _Tables, history: History, item_B: jax.Array) -> jax.Array:
        q_BxD = self._query(params, tables, history, lookup(tables.read, history.items))
        own_B = self._model.abra.scores_of(q_BxD, tables.scored, item_B[:, None])[:, 0]
        if tables.near is None:
            return own_B
        return own_B + self._counted(params, tables, history, item_B).sum(axis=1)

    def _queried(self, params: Any, tables: _Tables, history: History) -> tuple[jax.Array, jax.Array]:
        q_BxD = self._query(params, tables, history, lookup(tables.read, history.items))
        return constrain(q_BxD, None, None), constrain(last_items(history.items), None, None)

    def _standing(
        self, tables: _Tables, q_BxD: jax.Array, last_BxT: jax.Array, item_B: jax.Array, offered_R: jax.Array
    ) -> tuple[jax.Array, ...]:
        abra, table_RxD = self._model.abra, tables.scored
        v_BxD = constrain(lookup(table_RxD, item_B[:, None])[:, 0], None, None)
        interest_B = jnp.einsum("bid,bd->bi", q_BxD.reshape(len(q_BxD), -1, v_BxD.shape[1]), v_BxD).argmax(1)
        more = self._recommender.raised(tables.near, last_BxT)
        rows = table_RxD.shape[0]
        id_R = ids_of(jnp.arange(rows, dtype=jnp.int32), rows)
        real_R = (id_R != PAD) & (id_R <= abra.items)

        def one(each: Any) -> tuple[jax.Array, ...]:
            """Of one history at a time: its scores are as many numbers as there are items."""
            q_D, item, raised = each
            own_R = abra.logits(q_D[None], table_RxD)[0]
            s_R = own_R if raised is None else own_R.at[rows_of(raised.ids, rows)].add(raised.by)
            s_R = jnp.where(real_R, s_R, -jnp.inf)
            place = rows_of(item, rows)
            score = s_R[place]
            before_R = (s_R > score) | ((s_R == score) & (id_R < item))
            rank = 1 + jnp.sum(before_R & offered_R)
            return score, score - jax.nn.logsumexp(s_R), rank, score - own_R[place]

        score, log_probability, rank, counts = jax.lax.map(one, (q_BxD, item_B, more))
        return score, log_probability, rank, interest_B + 1, counts

    def _sloped(
        self, params: Any, tables: _Tables, history: History, item_B: jax.Array, place_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        x_BxLxD = lookup(tables.read, history.items)
        real_BxLx1 = (history.items != PAD)[..., None]
        sum_Bx1xD = jnp.where(real_BxLx1, x_BxLxD, 0.0).sum(axis=1, keepdims=True)
        mean_Bx1xD = sum_Bx1xD / jnp.maximum(real_BxLx1.sum(axis=1, keepdims=True), 1)
        from_BxLxD = jnp.where(real_BxLx1, mean_Bx1xD, 0.0)

        def scores(at_BxLxD: jax.Array) -> jax.Array:
            q_BxD = self._query(params, tables, history, at_BxLxD)
            return self._model.abra.scores_of(q_BxD, tables.scored, item_B[:, None])[:, 0]

        way_BxLxD = x_BxLxD - from_BxLxD
        at_BxLxD = from_BxLxD + place_B[:, None, None] * way_BxLxD
        g_BxLxD = jax.grad(lambda at_BxLxD: scores(at_BxLxD).sum())(at_BxLxD)
        return jnp.einsum("bld,bld->bl", g_BxLxD, way_BxLxD), scores(from_BxLxD)


def _same(item: int, history: History) -> np.ndarray:
    return np.full(len(history.items), item, np.int32)


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise NonFiniteScores("scores are not finite")
    return values
