"""Lists of recommendations for many users: the one path that evaluation and scoring share.

A user's list depends on the groups and batches it is computed in only through rounding, and both sides cut groups
and batches the same way: so evaluation's metrics equal those recomputed from scored files.

Where there are several processes, each brings users of its own, and all compute each batch together.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.batch import History
from dynrec_jax.data.cache import Histories, Windows
from dynrec_jax.errors import NonFiniteError
from dynrec_jax.evaluate.only import EVERYTHING, Only
from dynrec_jax.models.features import Items, described_rows
from dynrec_jax.models.model import Model
from dynrec_jax.models.neighbours import Near, Raised, last_items, raised, shrunk
from dynrec_jax.models.towers.ids import ID_TABLE
from dynrec_jax.parallel.mesh import Feed, feed, own_rows, place_rows, place_same
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.parallel.rules import constrain, sharding
from dynrec_jax.parallel.table import lookup, rows_for
from dynrec_jax.parallel.topk import top_k

GROUP_USERS = 4096  # users of a group at most: one output file, one unit of restarting
WIDTH_MULTIPLE = 8
# Widths of seen items are 16, 64, 256, … 4,096, and twice that, and so on: to fill up 4,096 costs 3 ms of a batch's
# 100, to compile one more 0.3 s.
FEWEST_SEEN, SEEN_FACTOR = 16, 4

Made = tuple[jax.Array, jax.Array, jax.Array]  # ids, scores, and whether all are numbers
# (what the encoder reads, items to leave out [B, M], and where lists are among some items alone, these [B, C])
# -> what is made, or what makes it when it is read
Batch = Callable[..., Made | Callable[[], Made]]


class HistorySource(Protocol):
    """What lists are made from: `Histories`, or anything that can cut histories."""

    def last_items(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
        """int32[B, size], the last items before event number `end` of each user; a user of -1 has none."""
        ...

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> Windows:
        """The last events before event number `end` of each user; a user of -1 has none."""
        ...

    def asked(self, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        """int32[B], when what comes after these events is asked for, in seconds since the dataset's first event."""
        ...


class Lists(NamedTuple):
    """Lists of U users.

    Attributes:
      ids: int32[U, k], best first; 0 behind the last item that could be offered.
      scores: float32[U, k], logits; -inf where `ids` is 0.
    """

    ids: np.ndarray
    scores: np.ndarray


# (source, users int64[U], the event number that each is asked for) -> their lists
ListMaker = Callable[[HistorySource, np.ndarray, np.ndarray], Lists]
# The same -> their vectors, float32[U, W]
VectorMaker = Callable[[HistorySource, np.ndarray, np.ndarray], np.ndarray]


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
    """Makes lists with a model's variables.

    Reading histories and ranking the catalogue are two programs, so that the widths of histories and those of seen
    items do not multiply: each program compiles once for each of its own widths.

    Attributes:
      k: length of the lists.
      own: which part of every batch this process brings.
      batch_size: users of a batch that this process brings.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        batch_size: int,
        k: int,
        filter_seen: bool,
        processes: Processes = ALONE,
        items: Items | None = None,
        only: Only = EVERYTHING,
    ):
        """`batch_size` is that of all processes together, rounded up to what divides over the devices.

        `items` says what describes them, None where they are their ids; `only`, which may be in a list.
        """
        self._items = Items(model.abra.items) if items is None else items
        self._model = model
        self._only = only
        # Called before each batch, by all processes; what it raises ends the making of lists.
        self.before_batch: Callable[[], None] = lambda: None
        self.mesh = mesh
        self._filter_seen = filter_seen
        self._processes = processes
        self.k = k
        self.own: Feed = feed(mesh, processes.index)
        self.batch_size = -(-batch_size // (self.own.parts * self.own.pieces)) * self.own.pieces
        self._catalogue = jax.jit(self._item_vectors)
        self._shrunk = jax.jit(self._drawn)
        self._ready = jax.jit(model.ready)
        self._finite = jax.jit(lambda table_RxD: jnp.isfinite(table_RxD).all())
        self._encode = jax.jit(self._user_vectors)
        self._rank = jax.jit(self._best)
        self._queries = jax.jit(self._scaled)
        self._widths = widths(model.max_length)

    def _item_vectors(self, params: Any, tables: Any, known: Any) -> jax.Array:
        described = described_rows(known, tables, rows_for(self._model.abra.items))
        return constrain(self._model.catalogue(params, described), "items", None)

    def _drawn(self, vectors_RxD: Any, near: Near | None) -> jax.Array:
        assert near is not None, "vectors are drawn to those of neighbours, and items without any were given"
        return constrain(shrunk(vectors_RxD, near, self._model.shrinkage), "items", None)

    def _user_vectors(self, params: Any, vectors_RxD: Any, history: History) -> tuple[jax.Array, jax.Array]:
        v_BxLxD = lookup(vectors_RxD, history.items)
        u_BxD = constrain(self._model.last_vector(params, v_BxLxD, history), "batch", None)
        return u_BxD, constrain(last_items(history.items), "batch", None)

    def _best(
        self,
        read: Any,
        table_RxD: Any,
        seen_BxM: Any,
        near: Near | None = None,
        allowed_Rx1: Any = None,
        offered_BxC: Any = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        u_BxD, last_BxT = read
        abra = self._model.abra
        q_BxD = abra.query(u_BxD, table_RxD)
        more = self.raised(near, last_BxT)
        if offered_BxC is None:
            ids, scores = abra.best(q_BxD, table_RxD, seen_BxM, self.k, more, allowed_Rx1)
        else:
            ids, scores = abra.among(q_BxD, table_RxD, offered_BxC, seen_BxM, self.k, more)
        finite = jnp.isfinite(q_BxD).all() & ~jnp.isnan(scores).any()
        return constrain(ids, "batch", None), constrain(scores, "batch", None), finite

    def _scaled(self, read: Any, table_RxD: Any) -> jax.Array:
        u_BxD, _ = read
        abra = self._model.abra
        return constrain(abra.query(u_BxD, table_RxD) * abra.scale, "batch", None)

    def trace_encode(self, params: Any, vectors_RxD: Any, history: History) -> jax.stages.Traced:
        """The program that reads histories, for shapes, to be counted and compiled ahead of time."""
        with jax.set_mesh(self.mesh):
            return self._encode.trace(params, vectors_RxD, history)

    def trace_rank(self, read: Any, table_RxD: Any, seen_BxM: Any) -> jax.stages.Traced:
        """The program that ranks the catalogue, for shapes; `read` are those that the other program gives."""
        with jax.set_mesh(self.mesh):
            return self._rank.trace(read, table_RxD, seen_BxM)

    def prepare(
        self, params: Any, tables: Any, vectors: tuple[jax.Array, jax.Array] | None = None
    ) -> ListMaker:
        """A function (source, users, ends) -> Lists for these variables; `vectors` are `self.vectors` of them.

        Raises:
          NonFiniteScores: an item vector is not finite; the function raises it for users' vectors and scores.
        """
        vectors_RxD, table_RxD = self.vectors(params, tables) if vectors is None else vectors
        near, allowed_Rx1 = self.near, self._only.place(self.mesh)
        with jax.set_mesh(self.mesh):
            if not bool(self._finite(table_RxD)):
                raise NonFiniteScores("item vectors are not finite")

        def batch(
            history: History, seen_BxM: jax.Array, offered_BxC: jax.Array | None = None
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            read = self._encode(params, vectors_RxD, history)
            return self._rank(read, table_RxD, seen_BxM, near, allowed_Rx1, offered_BxC)

        return functools.partial(self.run, batch)

    @property
    def near(self) -> Near | None:
        """Neighbours of all items, where they raise scores."""
        return self._items.near(self.mesh) if self._model.abra.neighbours else None

    def raised(self, near: Near | None, last_BxT: Any) -> Raised | None:
        """What the neighbours of some users' last items raise; None where `near` is."""
        return None if near is None else raised(near, last_BxT, self._model.abra.neighbours)

    def vectors(self, params: Any, tables: Any) -> tuple[jax.Array, jax.Array]:
        """Item vectors [R, D], as the user encoder reads them and as ABRA scores them; often the same array."""
        if self._model.rows_are_vectors:
            vectors_RxD = tables[ID_TABLE]
        else:
            with self._processes.pulse.at("texts"):
                encoded = jax.block_until_ready(self._items.encoded(params, self.mesh))
            known = {**self._items.place(self.mesh), **encoded}
            with jax.set_mesh(self.mesh):
                vectors_RxD = self._catalogue(params, tables, known)
        if self._model.shrinkage:
            with jax.set_mesh(self.mesh):
                vectors_RxD = self._shrunk(vectors_RxD, self._items.near(self.mesh))
        if not self._model.normalises:
            return vectors_RxD, vectors_RxD
        with jax.set_mesh(self.mesh):
            return vectors_RxD, self._ready(vectors_RxD)

    def run(self, batch: Batch, source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> Lists:
        """Makes lists batch by batch and puts them in order. All processes call it together, those without users too.

        Raises:
          NonFiniteScores: a vector or a score is not a number.
        """
        lists = Lists(
            np.zeros((len(users_U), self.k), np.int32),
            np.full((len(users_U), self.k), -np.inf, np.float32),
        )
        for place_B, made in self._made(batch, source, users_U, ends_U):
            ids, scores, finite = made() if callable(made) else made
            if not bool(finite):
                raise NonFiniteScores("scores are not finite")
            lists.ids[place_B] = own_rows(ids)[: len(place_B)]
            lists.scores[place_B] = own_rows(scores)[: len(place_B)]
        return lists

    def prepare_vectors(self, params: Any, tables: Any) -> VectorMaker:
        """A function (source, users, ends) -> their vectors, float32[U, W], whose products with items are scores.

        Their products with the items' vectors, as `vectors` gives them for ABRA, are ABRA's logits: what counts of
        neighbours add is not in them. Of a model of several interests W is k · D, one behind the other, and an item's
        score is the highest of its products with them.

        Raises:
          NonFiniteScores: by the function, of a vector that is not finite.
        """
        vectors_RxD, table_RxD = self.vectors(params, tables)

        def make(source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray) -> np.ndarray:
            width = self._model.abra.interests * table_RxD.shape[1]
            found = np.zeros((len(users_U), width), np.float32)

            def batch(history: History, seen_BxM: jax.Array) -> jax.Array:
                read = self._encode(params, vectors_RxD, history)
                return self._queries(read, table_RxD)

            for place_B, u_BxW in self._made(batch, source, users_U, ends_U):
                found[place_B] = own_rows(u_BxW)[: len(place_B)]
            if not np.isfinite(found).all():
                raise NonFiniteScores("users' vectors are not finite")
            return found

        return make

    def _made(
        self, batch: Callable[..., Any], source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Cuts users into batches of similar length, short histories first: the places of each and what was made."""
        places = list(_batches(ends_U, self.batch_size))
        nobody = np.zeros(0, np.int64)
        before: tuple[np.ndarray, Any] | None = None
        for number, longest in enumerate(self._agreed([int(ends_U[place_B].max()) for place_B in places])):
            place_B = places[number] if number < len(places) else nobody
            short = self.batch_size - len(place_B)
            users_B = np.pad(users_U[place_B], (0, short), constant_values=-1)
            ends_B = np.pad(ends_U[place_B], (0, short))
            history = self._history(source, users_B, ends_B, _at_least(longest, self._widths))
            rows = [np.zeros((self.batch_size, 1), np.int32)]
            if self._filter_seen:
                rows = [source.last_items(users_B, ends_B, seen_width(longest))]
            if self._only.offered is not None:
                rows.append(self._only.offered.to(users_B))
            self._processes.pulse.beat()
            self.before_batch()
            with jax.set_mesh(self.mesh):
                placed = jax.tree.map(functools.partial(place_rows, self.mesh), history)
                made = batch(placed, *(place_rows(self.mesh, each) for each in rows))
            # The device goes on with this batch while the one before it is read.
            if before is not None:
                yield before
            before = place_B, made
        if before is not None:
            yield before

    def _history(self, source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> History:
        """What the model reads of some histories."""
        sight = self._model.sight
        if not (sight.needs_times or sight.event_types):
            return History(source.last_items(users_B, ends_B, size))
        items, times, events = source.windows(users_B, ends_B, size)
        return History(
            items,
            times if sight.needs_times else None,
            events if sight.event_types else None,
            source.asked(users_B, ends_B) if sight.query_time else None,
        )

    def _agreed(self, longest: list[int]) -> list[int]:
        """The longest history of each batch, in all processes."""
        several = self._processes.exchange(longest)
        return [max(each) for each in itertools.zip_longest(*several, fillvalue=0)]


def _batches(ends_U: np.ndarray, size: int) -> Iterator[np.ndarray]:
    order = np.argsort(ends_U, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def widths(longest: int) -> list[int]:
    """Widths that the encoder reads, in order: quarters of the longest, below them an eighth, and so on by halves.

    Each takes almost a second to compile on CPU. On MovieLens-1M they make 1.27 times the pairs of positions that
    there are, powers of two 1.39 times, and half as many widths again 1.23 times.
    """
    result = [longest * quarters // 4 for quarters in (4, 3, 2, 1)]
    while result[-1] > 2 * WIDTH_MULTIPLE:
        result.append(result[-1] // 2)
    return sorted({min(-(-max(width, 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, longest) for width in result})


def _at_least(length: int, widths: Sequence[int]) -> int:
    """The first width that holds `length`; the last where none does."""
    return next((width for width in widths if width >= length), widths[-1])


def seen_width(length: int) -> int:
    """Width of the seen items of a batch whose longest history has so many events; see `SEEN_FACTOR`."""
    width = FEWEST_SEEN
    while width < length:
        width *= SEEN_FACTOR if width < 4_096 else 2
    return width


def fixed_lists(recommender: Recommender, scores_R: np.ndarray, items: int, block: int) -> ListMaker:
    """As `Recommender.prepare`, for one score per item that is the same for every user (a baseline)."""
    table_Rx1 = place_same(sharding(recommender.mesh, "items", None), scores_R.astype(np.float32)[:, None])

    @jax.jit
    def best(table_Rx1: jax.Array, seen_BxM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        one_Bx1 = jnp.ones((seen_BxM.shape[0], 1))
        ids, scores = top_k(one_Bx1, table_Rx1, seen_BxM, k=recommender.k, items=items, scale=1.0, rows=block)
        return constrain(ids, "batch", None), constrain(scores, "batch", None), ~jnp.isnan(scores).any()

    return functools.partial(recommender.run, lambda items, seen: best(table_Rx1, seen))
