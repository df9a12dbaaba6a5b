"""A user's state: what a model keeps of a history, so that one more event need not read it again.

Keys and values of the last W events of every layer. An event looks at them, W · D each, and puts its own in the place
of the oldest: with a window in every layer (`model.attention_window`) and without absolute positions that is what a
pass over the whole history gives, however long it is. Other models see `max_length` events and no more; until then they
go on in the same way, and from then on a state reads them again at each event, since each then stands elsewhere.

Where the model is told when it is asked (`model.query_time`), an event's keys and values wait for the next event's
time.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.batch import PAD, History
from dynrec_jax.models.blocks import MEMORY, Ring
from dynrec_jax.models.bstm import Bstm, Towers
from dynrec_jax.models.ensemble import Ensemble
from dynrec_jax.models.model import Model
from dynrec_jax.models.user_encoder import Moments
from dynrec_jax.parallel.table import lookup

Array = jax.Array


class Event(NamedTuple):
    """One event of each of B users; none of a user whose item is 0.

    Attributes:
      items: int32[B], item indices.
      times: int32[B], seconds since the dataset's first event; zeros for a model that does not look at them.
      types: int32[B], event types; zeros likewise.
    """

    items: Any
    times: Any
    types: Any


class UserState(NamedTuple):
    """What is kept of B users; every leaf begins with B, or with layers and then B.

    Attributes:
      memory: keys and values, `[B, H, W, E]` of each layer, [layers, B, H, W, E] of scanned ones.
      times: int32[B, W], of the events they are of.
      length: int32[B], events so far.
      last: the last event.
      vector: float32[B, D], the interest after it, asked for at its own time; zeros before there is one.
      past: the last `max_length` events, padded on the right; None of a model that never needs to read them again.
    """

    memory: Any
    times: Array
    length: Array
    last: Event
    vector: Array
    past: History | None


@dataclasses.dataclass(frozen=True)
class Stream:
    """States of one model; all methods are pure functions of the variables given.

    Attributes:
      model: whose users they are.
    """

    model: Model

    @property
    def continues(self) -> bool:
        """Whether a state goes on forever without reading a history again."""
        sight = self.model.sight
        return bool(sight.window or self._one_vector) and sight.positions != "absolute"

    @property
    def slots(self) -> int:
        """W, events whose keys and values are kept."""
        if self._one_vector:
            return 1
        return self.model.sight.window if self.continues else self.model.max_length

    def empty(self, params: Any, users: int) -> UserState:
        """States of users of whom nothing is known."""
        none_B = jnp.zeros(users, jnp.int32)
        none = Event(none_B, none_B, none_B)
        times_BxW = jnp.zeros((users, self.slots), jnp.int32)
        ensemble = isinstance(self.model, Ensemble)
        v_BxD = jnp.zeros((users, self.model.abra.dim * (2 if ensemble else 1)))
        u_BxD = jnp.zeros((users, self.model.abra.width * (2 if ensemble else 1)))
        made = jax.eval_shape(
            lambda: self._read(params, None, v_BxD, none, none_B, none_B, self._ring(none, none_B, times_BxW))
        )
        past_BxL = jnp.zeros((users, self.model.max_length), jnp.int32)
        return UserState(
            memory=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made[1]),
            times=times_BxW,
            length=none_B,
            last=none,
            vector=u_BxD,
            past=None if self.continues else History(past_BxL, past_BxL, past_BxL),
        )

    def append(self, params: Any, vectors_RxD: Any, state: UserState, event: Event) -> UserState:
        """The states after one more event of each user; `state.vector` is then the new interest.

        Args:
          params: dense weights.
          vectors_RxD: item vectors as the user encoder reads them, as `Recommender.vectors` gives them.
          state: before.
          event: what happened, no earlier than what is there already.
        """
        here_B = event.items != PAD
        memory, times_BxW = state.memory, state.times
        if self.model.sight.query_time:
            # What was last is asked for now, and only now is it known when.
            last = state.last._replace(items=jnp.where(here_B, state.last.items, PAD))
            ring = self._ring(last, state.length - 1, times_BxW)
            v_BxD = self._vectors(vectors_RxD, last.items)
            _, memory = self._read(params, memory, v_BxD, last, state.length - 1, event.times, ring)
            times_BxW = ring.times
        ring = self._ring(event, state.length, times_BxW)
        v_BxD = self._vectors(vectors_RxD, event.items)
        u_BxD, after = self._read(params, memory, v_BxD, event, state.length, event.times, ring)
        if not self.model.sight.query_time:
            memory, times_BxW = after, ring.times
        later = UserState(
            memory=memory,
            times=times_BxW,
            length=state.length + here_B.astype(jnp.int32),
            last=Event(*(jnp.where(here_B, new, old) for new, old in zip(event, state.last, strict=True))),
            vector=jnp.where(here_B[:, None], u_BxD, state.vector),
            past=None if state.past is None else _with(state.past, state.length, event),
        )
        return later._replace(
            vector=self._read_again(params, vectors_RxD, later, later.last.times, later.vector)
        )

    def interest(self, params: Any, vectors_RxD: Any, state: UserState, asked_B: Array) -> Array:
        """The users' vectors when they are asked for at some time (int32[B]), `[B, D]`.

        `state.vector` for a model that is not told.
        """
        if not self.model.sight.query_time:
            return state.vector
        ring = self._ring(state.last, state.length - 1, state.times)
        v_BxD = self._vectors(vectors_RxD, state.last.items)
        u_BxD, _ = self._read(params, state.memory, v_BxD, state.last, state.length - 1, asked_B, ring)
        u_BxD = jnp.where(state.length[:, None] > 0, u_BxD, 0.0)
        return self._read_again(params, vectors_RxD, state, asked_B, u_BxD)

    @property
    def _one_vector(self) -> bool:
        """Whether all that a block remembers is one vector, which no event falls out of."""
        part = self.model.id if isinstance(self.model, Ensemble) else self.model
        return part.towers.user.block == "gru"

    def _parts(self, params: Any) -> Iterator[tuple[str, Bstm, Any]]:
        if isinstance(self.model, Ensemble):
            yield from ((name, part, params[name]) for name, part in self.model.parts.items())
        else:
            yield "", self.model, params

    def _vectors(self, vectors_RxD: Any, items_B: Array) -> Array:
        return lookup(vectors_RxD, items_B[:, None])[:, 0]

    def _ring(self, event: Event, index_B: Array, times_BxW: Array) -> Ring:
        """Where the event goes that is number `index` of its user, and what it looks at."""
        slots = times_BxW.shape[1]
        window = self.model.sight.window or slots
        here_B = (event.items != PAD) & (index_B >= 0)
        distance_BxW = (index_B[:, None] - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
        own_BxW = here_B[:, None] & (distance_BxW == 0)
        return Ring(
            slot=jnp.where(here_B, index_B % slots, -1),
            inside=(distance_BxW <= jnp.maximum(index_B, 0)[:, None]) & (distance_BxW < window),
            distance=distance_BxW,
            times=jnp.where(own_BxW, event.times[:, None], times_BxW),
        )

    def _read(
        self, params: Any, memory: Any, v_BxD: Array, event: Event, index_B: Array, asked_B: Array, ring: Ring
    ) -> tuple[Array, Any]:
        """The vectors `[B, D]` of one event of each user, and the memory with its keys and values."""
        one_Bx1 = jnp.ones_like(index_B)[:, None]
        at = Moments(one_Bx1, index_B[:, None], event.times[:, None], event.types[:, None], asked_B[:, None])
        found, after = [], {}
        parts = list(self._parts(params))
        for (name, part, weights), v in zip(parts, jnp.split(v_BxD, len(parts), axis=-1), strict=True):
            variables = {"params": weights, **({} if memory is None else {MEMORY: memory[name]})}
            u_Bx1xD, changed = part.towers.apply(
                variables, v[:, None], at, ring=ring, mutable=[MEMORY], method=Towers.__call__
            )
            found.append(u_Bx1xD[:, 0] if len(parts) == 1 else part.abra.unit(u_Bx1xD[:, 0]))
            after[name] = changed[MEMORY]
        return jnp.concatenate(found, axis=-1), after

    def _read_again(
        self, params: Any, vectors_RxD: Any, state: UserState, asked_B: Array, u_BxD: Array
    ) -> Array:
        """The vectors, of users with more events than the model sees from the last of them."""
        past = state.past
        if past is None:
            return u_BxD
        full_B = state.length > self.model.max_length

        def read() -> Array:
            v_BxLxD = lookup(vectors_RxD, past.items)
            asked = asked_B if self.model.sight.query_time else None
            again_BxD = self.model.last_vector(params, v_BxLxD, past._replace(asked=asked))
            return jnp.where(full_B[:, None], again_BxD, u_BxD)

        return jax.lax.cond(full_B.any(), read, lambda: u_BxD)


def _with(past: History, count_B: Array, event: Event) -> History:
    """The last events with one more, where the user has one; the oldest goes if there is no room."""
    length = past.items.shape[1]
    here_Bx1 = (event.items != PAD)[:, None]
    full_Bx1 = (count_B >= length)[:, None] & here_Bx1
    place_Bx1 = jnp.minimum(count_B, length - 1)[:, None]
    own_BxL = here_Bx1 & (jnp.arange(length, dtype=jnp.int32)[None] == place_Bx1)

    def put(old_BxL: Array, new_B: Array) -> Array:
        moved_BxL = jnp.where(full_Bx1, jnp.roll(old_BxL, -1, axis=1), old_BxL)
        return jnp.where(own_BxL, new_B[:, None], moved_BxL)

    return History(put(past.items, event.items), put(past.times, event.times), put(past.events, event.types))
