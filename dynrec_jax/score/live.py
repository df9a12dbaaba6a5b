"""Recommending while users act: each event of a user moves the interest at once, without reading the history again."""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dynrec_jax.batch import PAD
from dynrec_jax.data.cache import Histories, from_start
from dynrec_jax.data.units import UNITS
from dynrec_jax.errors import DataError, MachineError
from dynrec_jax.evaluate.recommender import Lists, Recommender, seen_width
from dynrec_jax.models.neighbours import LAST
from dynrec_jax.models.user_state import Event, Stream, UserState
from dynrec_jax.parallel.digest import tree_digest
from dynrec_jax.parallel.mesh import row_pieces
from dynrec_jax.workdir import Run

FORMAT = "1"
TOGETHER = 1_024  # users of a batch at most
SMALLEST = (
    8  # users of a batch; larger ones are of twice as many, and so on, so that few programs are compiled
)


class Live:
    """States of some users of a run, and recommendations for them.

    Attributes:
      run: the trained model.
      users: ids, in the order of the states.
      stream: what continues the states; `stream.continues` tells whether it can do so forever.
      states: of all users, on the devices.
    """

    def __init__(self, run: Run, users: Sequence[str]):
        """Users of whom nothing is known yet; they need not be in the dataset.

        Raises:
          DataError: a user comes twice, or there is none.
        """
        self.run = run
        self.users = list(users)
        self._number = {user: i for i, user in enumerate(self.users)}
        if len(self._number) < len(self.users) or not self.users:
            raise DataError(
                f"{len(self.users):,} users, {len(self._number):,} different ones; expected each once"
            )
        self.stream = Stream(run.model)
        self._mesh = run.mesh
        self._pieces = row_pieces(run.mesh)
        self._items = run.item_ids
        self._index = {item: i + 1 for i, item in enumerate(self._items.to_pylist())}
        self._types = {name: i + 1 for i, name in enumerate(run.dataset.event_types)}
        self._seen: list[list[int]] = [[] for _ in self.users]
        self._recommender = Recommender(run.model, run.mesh, 1, 1, False, items=run.items)
        self._vectors, self._table = self._recommender.vectors(run.params, run.tables)
        with jax.set_mesh(run.mesh):
            # One row more than there are users: what fills up a batch goes there.
            self.states = jax.jit(self.stream.empty, static_argnums=1)(run.params, len(self.users) + 1)
        self._append = jax.jit(self._appended, donate_argnums=2)
        self._best = jax.jit(self._recommended, static_argnums=5)

    def append(
        self,
        users: Sequence[str],
        items: Sequence[str],
        times: Sequence[int] | np.ndarray | None = None,
        events: Sequence[str | None] | None = None,
    ) -> int:
        """Puts events into the states, in their order; a user may have several.

        Args:
          users: of each event.
          items: ids; events of items that the model does not know are left out.
          times: seconds since 1970; needed by a model that looks at them.
          events: names of event types; unknown ones count as none.

        Returns:
          How many events were left out.

        Raises:
          DataError: an unknown user, or no times for a model that needs them.
        """
        for name, given in (("items", items), ("times", times), ("events", events)):
            if given is not None and len(given) != len(users):
                raise DataError(
                    f"{len(users):,} users and {len(given):,} {name}; expected one of each an event"
                )
        if times is None and self.run.model.sight.needs_times:
            raise DataError(
                "the model looks at the times of events; expected one for each, in seconds since 1970"
            )
        number_E = np.array([self._of(user) for user in users], np.int64)
        item_E = np.array([self._index.get(item, PAD) for item in items], np.int32)
        time_E = (
            np.zeros(len(item_E), np.int32) if times is None else self._seconds(np.asarray(times, np.int64))
        )
        type_E = np.zeros(len(item_E), np.int32)
        if events is not None:
            type_E = np.array([self._types.get(name or "", 0) for name in events], np.int32)
        known = item_E != PAD
        self.put(number_E[known], item_E[known], time_E[known], type_E[known])
        return int((~known).sum())

    def recommend(
        self,
        users: Sequence[str],
        k: int = 10,
        at: Sequence[int] | np.ndarray | None = None,
        filter_seen: bool = True,
    ) -> tuple[pa.Array, np.ndarray]:
        """Ids of the items that follow best, lists of `k`, best first, and their scores, float32[B, k].

        Args:
          users: whom for; each once.
          k: length of the lists.
          at: seconds since 1970, when each list is asked for; the time of the last event where not given.
          filter_seen: leave out items of the user's history.
        """
        number_B = np.array([self._of(user) for user in users], np.int64)
        moment_B = None if at is None else self._seconds(np.asarray(at, np.int64))
        lists = self.lists(number_B, k, moment_B, filter_seen)
        real = lists.ids != PAD
        ids = self._items.take(pa.array(np.maximum(lists.ids[real] - 1, 0)))
        offsets = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), ids), lists.scores

    def lists(
        self, number_B: np.ndarray, k: int, moment_B: np.ndarray | None = None, filter_seen: bool = True
    ) -> Lists:
        """As `recommend`, with users and items by number, and moments in seconds since the dataset's first event."""
        made = []
        for start in range(0, len(number_B), TOGETHER):
            rows = number_B[start : start + TOGETHER]
            size = self._size(len(rows))
            row_B = np.pad(rows, (0, size - len(rows)), constant_values=len(self.users)).astype(np.int32)
            longest = max((len(self._seen[i]) for i in rows), default=0) if filter_seen else 0
            seen_BxM = np.zeros((size, seen_width(longest)), np.int32)
            if filter_seen:
                for place, number in enumerate(rows):
                    seen_BxM[place, : len(self._seen[number])] = self._seen[number]
            asked = None
            if moment_B is not None:
                asked = jnp.asarray(np.pad(moment_B[start : start + TOGETHER], (0, size - len(rows))))
            with jax.set_mesh(self._mesh):
                tables = self._vectors, self._table, self._recommender.near
                ids, scores = self._best(
                    self.run.params, tables, self.states, (row_B, asked, self._last(rows, size)), seen_BxM, k
                )
            made.append((np.asarray(ids)[: len(rows)], np.asarray(scores)[: len(rows)]))
        if not made:
            return Lists(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        return Lists(*(np.concatenate(parts) for parts in zip(*made, strict=True)))

    def _last(self, rows: np.ndarray, size: int) -> np.ndarray:
        """The last items of some users, newest first, int32[size, LAST]; 0 where there are fewer."""
        last_BxT = np.zeros((size, LAST), np.int32)
        for place, number in enumerate(rows):
            newest = self._seen[number][: -LAST - 1 : -1]
            last_BxT[place, : len(newest)] = newest
        return last_BxT

    def read(self, histories: Histories, ends_U: np.ndarray | None = None) -> None:
        """Appends what the dataset knows of the users: all events, or those before number `ends` of each."""
        numbers = {user: i for i, user in enumerate(histories.ids_of(np.arange(histories.users)))}
        pairs = [(self._number[user], numbers[user]) for user in self.users if user in numbers]
        ends_U = histories.lengths if ends_U is None else ends_U
        for start in range(0, len(pairs), TOGETHER):
            own, theirs = (
                np.array(part, np.int64) for part in zip(*pairs[start : start + TOGETHER], strict=True)
            )
            longest = int(ends_U[theirs].max(initial=0))
            columns = histories.windows(theirs, ends_U[theirs], longest)
            inside = columns.items != PAD
            # Event by event: the first of all users, then the second.
            place, user = np.nonzero(inside.T)
            self.put(own[user], *(values[user, place] for values in columns))

    def save(self, path: Path) -> None:
        """Writes the states to a safetensors file; raises MachineError where it cannot."""
        leaves = jax.tree_util.tree_leaves_with_path(self.states)
        tensors = {f"state{jax.tree_util.keystr(place)}": np.asarray(leaf) for place, leaf in leaves}
        tensors["users"] = np.frombuffer(json.dumps(self.users).encode(), np.uint8)
        tensors["seen"] = np.array([item for items in self._seen for item in items], np.int32)
        tensors["seen_counts"] = np.array([len(items) for items in self._seen], np.int64)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(tensors, temporary, {"format": FORMAT, "weights": self._weights})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise MachineError(f"{path}: the states cannot be written ({error})") from None

    @classmethod
    def load(cls, run: Run, path: Path) -> "Live":
        """Opens states that `save` wrote.

        Raises:
          DataError: no such file, not such a file, or the states of other weights.
        """
        try:
            with safe_open(path, "numpy") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping
            if about.get("format") != FORMAT:
                raise DataError(f"{path}: holds no users' states; expected what `Live.save` wrote")
            live = cls(run, json.loads(tensors["users"].tobytes()))
            if about.get("weights") != live._weights:
                raise DataError(
                    f"{path}: holds states of other weights or items than step {run.step} of {run.path}"
                )
            live._take(tensors)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path}: not readable as users' states ({error})") from None
        return live

    def _take(self, tensors: dict[str, np.ndarray]) -> None:
        def of(place: Any, leaf: jax.Array) -> jax.Array:
            found = tensors[f"state{jax.tree_util.keystr(place)}"]
            if found.shape != leaf.shape or found.dtype != leaf.dtype:
                raise ValueError(f"state{jax.tree_util.keystr(place)} is {found.dtype}{list(found.shape)}")
            return jax.device_put(found, leaf.sharding)

        self.states = jax.tree_util.tree_map_with_path(of, self.states)
        parts = np.split(tensors["seen"], np.cumsum(tensors["seen_counts"])[:-1])
        self._seen = [part.tolist() for part in parts]

    @functools.cached_property
    def _weights(self) -> str:
        weights = tree_digest((self.run.params, self.run.tables))
        # Items have numbers in the states: those of the dataset, and new ones behind them.
        items = hashlib.sha256("\0".join(self._items.to_pylist()).encode()).hexdigest()
        return f"{weights}-{items}"

    def _of(self, user: str) -> int:
        if user not in self._number:
            raise DataError(f"user {user!r} is none of the {len(self.users):,} users whose states are kept")
        return self._number[user]

    def _seconds(self, times_E: np.ndarray) -> np.ndarray:
        if (np.abs(times_E) >= UNITS["seconds"][0]).any():
            raise DataError(f"time {int(np.abs(times_E).max())} is no number of seconds since 1970")
        return from_start(times_E, self.run.dataset.first_time or 0)

    def _size(self, count: int) -> int:
        size = SMALLEST
        while size < count:
            size *= 2
        return -(-size // self._pieces) * self._pieces

    def put(self, number_E: np.ndarray, *columns: np.ndarray) -> None:
        """As `append`, with users and items by number, and times in seconds since the dataset's first event.

        Args:
          number_E: users, as `lists` takes them.
          columns: items, times and types of the events.
        """
        for chosen in _rounds(number_E):
            size = self._size(len(chosen))
            row_B = np.pad(number_E[chosen], (0, size - len(chosen)), constant_values=len(self.users))
            event = Event(
                *(np.pad(values[chosen], (0, size - len(chosen))).astype(np.int32) for values in columns)
            )
            with jax.set_mesh(self._mesh):
                self.states = self._append(
                    self.run.params, self._vectors, self.states, row_B.astype(np.int32), event
                )
        for number, item in zip(number_E.tolist(), columns[0].tolist(), strict=True):
            self._seen[number].append(item)

    def _appended(
        self, params: Any, vectors_RxD: Any, states: UserState, row_B: Any, event: Event
    ) -> UserState:
        axis = _user_axis(states)
        some = jax.tree.map(lambda leaf, a: jnp.take(leaf, row_B, axis=a), states, axis)
        later = self.stream.append(params, vectors_RxD, some, event)

        def put(leaf: jax.Array, new: jax.Array, a: int) -> jax.Array:
            return leaf.at[(slice(None),) * a + (row_B,)].set(new)

        return jax.tree.map(put, states, later, axis)

    def _recommended(
        self, params: Any, tables: Any, states: UserState, asked: Any, seen_BxM: Any, k: int
    ) -> tuple[jax.Array, jax.Array]:
        (vectors_RxD, table_RxD, near), (row_B, moment_B, last_BxT) = tables, asked
        some = jax.tree.map(lambda leaf, a: jnp.take(leaf, row_B, axis=a), states, _user_axis(states))
        moment_B = some.last.times if moment_B is None else moment_B
        u_BxD = self.stream.interest(params, vectors_RxD, some, moment_B)
        q_BxD = self.run.model.abra.query(u_BxD, table_RxD)
        more = self._recommender.raised(near, last_BxT)
        return self.run.model.abra.best(q_BxD, table_RxD, seen_BxM, k, more)


def _user_axis(states: UserState) -> UserState:
    """Which axis of each leaf is that of users: the second where layers are stacked."""

    def axis(leaf: jax.Array) -> int:
        return leaf.ndim - 4

    zeros = jax.tree.map(lambda leaf: 0, states._replace(memory=None))
    return zeros._replace(memory=jax.tree.map(axis, states.memory))


def _rounds(number_E: np.ndarray) -> Iterator[np.ndarray]:
    """Events in rounds, in order, of which each has no user twice: places of `TOGETHER` at most."""
    if len(number_E) == 0:
        return
    order = np.argsort(number_E, kind="stable")
    ordered = number_E[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    repeat = np.arange(len(ordered)) - np.repeat(first, np.diff(np.append(first, len(ordered))))
    turn_E = np.empty(len(ordered), np.int64)
    turn_E[order] = repeat  # how many events of the same user come before
    for turn in range(int(turn_E.max()) + 1):
        places = np.flatnonzero(turn_E == turn)
        for start in range(0, len(places), TOGETHER):
            yield places[start : start + TOGETHER]
