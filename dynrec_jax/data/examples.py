"""Which events train, which are asked for, and which history a draw names: pure functions on arrays.

Row j of step n of a batch of B is draw k = nB + j: shard k mod S, position k div S in that shard's stream. Every
shard is an endless, independent, seeded stream of its users, one permutation after the other.
"""

import functools
from typing import NamedTuple

import numpy as np

from dynrec_jax.errors import ConfigError

NONE = -1  # of `Splits`: the user has no such target


class Splits(NamedTuple):
    """Where each history is cut, as event numbers.

    Attributes:
      train_end: int64[U], events before it train.
      validation: int64[U], the event that validation asks for; what came before is the history. `NONE`: no such.
      test: int64[U], the event that the test asks for.
    """

    train_end: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def leave_one_out(lengths_U: np.ndarray) -> Splits:
    """The last event is the test, the one before validation, the rest trains.

    Users with fewer than three events train with all of them and are not asked for.
    """
    enough_U = lengths_U >= 3
    return Splits(
        train_end=np.where(enough_U, lengths_U - 2, lengths_U).astype(np.int64),
        validation=np.where(enough_U, lengths_U - 2, NONE).astype(np.int64),
        test=np.where(enough_U, lengths_U - 1, NONE).astype(np.int64),
    )


def global_time(lengths_U: np.ndarray, before_validation_U: np.ndarray, before_test_U: np.ndarray) -> Splits:
    """Two moments cut all histories: events before the first train, and nothing later is ever learnt from.

    Validation asks for a user's first event between the two moments, given the events before the first; the test
    asks for the first event from the second moment on, given all events before that moment.

    Args:
      lengths_U: events of each history.
      before_validation_U: events before the first moment.
      before_test_U: events before the second moment.
    """
    enough_U = lengths_U >= 3
    asked_v = enough_U & (before_validation_U > 0) & (before_validation_U < before_test_U)
    asked_t = enough_U & (before_test_U > 0) & (before_test_U < lengths_U)
    return Splits(
        train_end=before_validation_U.astype(np.int64),
        validation=np.where(asked_v, before_validation_U, NONE).astype(np.int64),
        test=np.where(asked_t, before_test_U, NONE).astype(np.int64),
    )


class Draws(NamedTuple):
    """The draws of a batch, or of a part of it, in order.

    Attributes:
      window: int64[B], number of the draw's window in the whole batch, from 1.
      number: int64[B], k.
      shard: int64[B].
      position: int64[B], in the shard's stream.
    """

    window: np.ndarray
    number: np.ndarray
    shard: np.ndarray
    position: np.ndarray


def check_batch(batch_size: int, shards: int, parts: int = 1) -> None:
    """Raises ConfigError where batch and shards do not divide, one by the other, and both over the parts of a batch."""
    if batch_size % parts or shards % parts:
        raise ConfigError(
            f"config.train.batch_size: {batch_size} and the dataset's {shards} shards do not both divide over "
            f"{parts} processes; choose a batch size and a number of processes that do"
        )
    if batch_size % shards and shards % batch_size:
        lower = max(1, batch_size // shards) * shards
        raise ConfigError(
            f"config.train.batch_size: {batch_size} and the dataset's {shards} shards do not divide; "
            f"use a multiple of {shards} (such as {lower}), or a divisor, or prepare with other --shards"
        )


def draws(step: int, batch_size: int, shards: int) -> Draws:
    """The draws of one step; where a batch holds several of a shard, they lie together."""
    number_B = step * batch_size + np.arange(batch_size, dtype=np.int64)
    if batch_size > shards:
        number_B = number_B.reshape(-1, shards).T.reshape(-1)
    window_B = np.arange(1, batch_size + 1, dtype=np.int64)
    return Draws(window_B, number_B, number_B % shards, number_B // shards)


def part_of(drawn: Draws, part: int, parts: int) -> Draws:
    """The draws of every `parts`-th shard from shard `part` on: what the process supplies that owns these shards.

    Where the number of parts divides batch and shards, parts are equally large.
    """
    here_B = drawn.shard % parts == part
    return Draws(*(values_B[here_B] for values_B in drawn))


@functools.lru_cache(maxsize=256)  # the shards of one process, a few of which are between two permutations
def _permutation(seed: int, shard: int, epoch: int, users: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, shard, epoch)))).permutation(
        users
    )


def pick_users(seed: int, drawn: Draws, first_S: np.ndarray, count_S: np.ndarray) -> np.ndarray:
    """int64[B], the place of each draw's user among `count` users of its shard, counted from `first`.

    A shard without users gives -1; its rows stay empty.
    """
    picked_B = np.full(drawn.shard.shape, -1, np.int64)
    for shard in np.unique(drawn.shard):
        users = int(count_S[shard])
        if users == 0:
            continue
        rows = np.nonzero(drawn.shard == shard)[0]
        epochs, places = np.divmod(drawn.position[rows], users)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = _permutation(seed, int(shard), int(epoch), users)
            picked_B[rows[here]] = first_S[shard] + order[places[here]]
    return picked_B


def window_ends(seed: int, drawn: Draws, train_end_B: np.ndarray, size: int, windows: str) -> np.ndarray:
    """int64[B], where each row's window of `size` events ends (exclusive).

    "last": at the end of what trains. "random": anywhere from `size` events on, by a hash of (seed, draw), so that
    all of a long history trains.
    """
    if windows == "last":
        return train_end_B
    room_B = np.maximum(train_end_B - size, 0).astype(np.uint64) + np.uint64(1)
    back_B = splitmix(drawn.number.astype(np.uint64) ^ splitmix(np.uint64(seed) + np.uint64(1))) % room_B
    return train_end_B - back_B.astype(np.int64)


def splitmix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): neighbouring numbers to unrelated ones."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
