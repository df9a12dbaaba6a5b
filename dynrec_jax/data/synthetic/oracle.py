"""The distribution that an event of the log was drawn from, regenerated from the seed."""

from collections.abc import Sequence

import numpy as np

from dynrec_jax.data.synthetic.histories import BLOCK, Histories, draw_block, weights_within
from dynrec_jax.data.synthetic.spec import SyntheticSpec
from dynrec_jax.data.synthetic.world import Floats, Ints, world_of
from dynrec_jax.errors import DataError

CELLS = 4_000_000  # users x items that are worked on at a time


def oracle_scores(spec: SyntheticSpec, user_ids: Sequence[str], history_lengths: Sequence[int]) -> Floats:
    """The true distribution of the event after a history, given all of it and the time of that event.

    Args:
      spec: of the log.
      user_ids: B ids of its users; one may come several times.
      history_lengths: how many events are known of each: 0 asks for the user's first event.

    Returns:
      float64[B, N], rows sum to 1, columns in the order of `item_ids`; items of the history have 0.

    Raises:
      DataError: an id is not of this log, or a history is not shorter than the user's events.
    """
    numbers = np.array([_number(spec, user) for user in user_ids], np.int64)
    known = np.asarray(history_lengths, np.int64)
    scores = np.empty((len(numbers), spec.items))
    chunk = max(1, CELLS // spec.items)
    for block in np.unique(numbers // BLOCK).tolist():
        drawn = draw_block(spec, block)
        asked = np.flatnonzero(numbers // BLOCK == block)
        for rows in np.split(asked, range(chunk, len(asked), chunk)):
            scores[rows] = _distribution(spec, drawn, numbers[rows] % BLOCK, known[rows])
    return scores


def interests(spec: SyntheticSpec, user_id: str, times: Sequence[int] | Ints) -> Floats:
    """float64[len(times), T], the planted share of each topic in a user's interest at each time.

    Times are seconds since 1970; the shares of a time sum to 1.
    """
    number = _number(spec, user_id)
    users = draw_block(spec, number // BLOCK).users
    at = np.asarray(times, np.int64)
    return users.shares(np.full(len(at), number % BLOCK), at, spec)


def _distribution(spec: SyntheticSpec, drawn: Histories, rows: Ints, known: Ints) -> Floats:
    """float64[R, N] for users `rows` of a block after `known` events each."""
    wrong = np.flatnonzero((known < 0) | (known >= drawn.lengths[rows]))
    if len(wrong):
        have, length = int(drawn.lengths[rows][wrong[0]]), int(known[wrong[0]])
        raise DataError(f"synthetic: history length {length} of a user with {have} events; expected less")
    world = world_of(spec)
    count = len(rows)
    seen = np.broadcast_to(world.items < 0, (count, *world.items.shape)).copy()
    last = np.full((count, spec.topics), -1, np.int64)
    for event in range(int(known.max(initial=0))):
        at = np.flatnonzero(event < known)
        topic, place = drawn.topics[rows[at], event], drawn.places[rows[at], event]
        seen[at, topic, place] = True
        last[at, topic] = place
    shares = drawn.users.shares(rows, drawn.times[rows, known], spec) * ~seen.all(axis=2)
    shares /= shares.sum(axis=1, keepdims=True)
    scores = np.zeros((count, spec.items))
    for topic in range(spec.topics):
        within = weights_within(world, np.full(count, topic), last[:, topic], seen[:, topic])
        within /= np.maximum(within.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        size = world.sizes[topic]
        scores[:, world.items[topic, :size]] = shares[:, topic, None] * within[:, :size]
    return scores


def _number(spec: SyntheticSpec, user_id: str) -> int:
    """The number in an id that `user_ids` gives."""
    digits = user_id[1:]
    width = len(str(spec.users - 1))
    plain = user_id[:1] == "u" and len(digits) == width and digits.isascii() and digits.isdigit()
    if not plain or int(digits) >= spec.users:
        raise DataError(f"synthetic: {user_id!r} is no user of this log; expected u{0:0{width}d} and so on")
    return int(digits)
