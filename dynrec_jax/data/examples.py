"""Which events train, which are asked for, and which history a draw names: pure functions on arrays.

Row j of step n of a batch of B is draw k = nB + j: shard k mod S, position k div S in that shard's stream. Every
shard is an endless, independent, seeded stream of its users, one permutation after the other.
"""

import functools
from typing import NamedTuple

import numpy as np

from dynrec_jax.errors import ConfigError

NONE = -1  # the user has no such event
LEAST = 3  # events of a history without which nobody is asked


class Asked(NamedTuple):
    """Events that are asked for, each given what its user did before it.

    Attributes:
      users: int64[Q], ascending; a user may come several times, then with the oldest event first.
      ends: int64[Q], numbers of the events: as many come before it.
    """

    users: np.ndarray
    ends: np.ndarray


class Splits(NamedTuple):
    """Where each history is cut, as event numbers.

    Attributes:
      train_end: int64[U], events before it train.
      validation: the events that validation asks for.
      test: the events that the test asks for.
    """

    train_end: np.ndarray
    validation: Asked
    test: Asked


def one_each(ends_U: np.ndarray) -> Asked:
    """An event of each user, who has none where `ends` is `NONE`."""
    users = np.flatnonzero(ends_U != NONE)
    return Asked(users, ends_U[users].astype(np.int64))


def leave_one_out(
    lengths_U: np.ndarray, validation_U: np.ndarray | None = None, test_U: np.ndarray | None = None
) -> Splits:
    """The last event is the test, the one before validation, what was before both trains.

    Users with fewer than three events train with all of them and are not asked for; so do those of whom no two events
    may be asked for, or the first of all would be.

    Args:
      lengths_U: events of each history.
      validation_U: the last but one of the events that may be asked for, `NONE` for none; where not given, of all.
      test_U: the last of them.
    """
    validation_U = lengths_U - 2 if validation_U is None else validation_U
    test_U = lengths_U - 1 if test_U is None else test_U
    enough_U = (lengths_U >= LEAST) & (validation_U >= 1)
    return Splits(
        train_end=np.where(enough_U, validation_U, lengths_U).astype(np.int64),
        validation=one_each(np.where(enough_U, validation_U, NONE)),
        test=one_each(np.where(enough_U, test_U, NONE)),
    )


def able(asked: Asked, lengths_U: np.ndarray) -> Asked:
    """Those that come after another event, of users with three or more."""
    kept = (asked.ends >= 1) & (lengths_U[asked.users] >= LEAST)
    return Asked(asked.users[kept], asked.ends[kept])


def between(start_U: np.ndarray, stop_U: np.ndarray) -> Asked:
    """All events from number `start` to `stop - 1` of each user."""
    count_U = np.maximum(stop_U - start_U, 0)
    users = np.repeat(np.arange(len(count_U)), count_U)
    within = np.arange(len(users)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
    return Asked(users, start_U[users] + within)


def one_at_random(asked: Asked, keys_U: np.ndarray, seed: int) -> Asked:
    """One event of each user, by a hash of (seed, the user's key)."""
    first = np.flatnonzero(np.diff(asked.users, prepend=-1))
    users = asked.users[first]
    count = np.diff(np.append(first, len(asked.users)))
    hashed = splitmix(keys_U[users].astype(np.uint64) ^ splitmix(np.uint64(seed) + np.uint64(2)))
    return Asked(users, asked.ends[first + (hashed % count.astype(np.uint64)).astype(np.int64)])


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
