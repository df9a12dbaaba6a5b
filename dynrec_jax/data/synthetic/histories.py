"""Users, their interests over time, and the histories drawn from them, a block of users at a time.

A block has its own random stream, so that any user's history can be drawn again without those of the others.
"""

import dataclasses
import functools
import math

import numpy as np

from dynrec_jax.data.synthetic.spec import SHORTEST, SyntheticSpec
from dynrec_jax.data.synthetic.world import (
    DAY,
    FIRST_TIME,
    SUCCESSION,
    SUCCESSORS,
    Flags,
    Floats,
    Ints,
    World,
    uniforms,
    world_of,
)

BLOCK = 256  # users that share a random stream
STRENGTH = 9.0  # logit of an interest at its height; all other topics have their trend alone
BREADTH = 1.2  # the smaller, the longer an interest stays at its height
SPREAD = 0.5  # standard deviation of the logarithm of a history's length
SESSION = 4.0  # mean events of a session


@dataclasses.dataclass(frozen=True)
class Users:
    """The interests of U users, K each: bumps that return after a period.

    Attributes:
      topic: int64[U, K], different topics.
      strength: float64[U, K], the logit at its height.
      phase: float64[U, K], when the height is, as a share of the period.
      period: float64[U], as a share of the log's time.
    """

    topic: Ints
    strength: Floats
    phase: Floats
    period: Floats

    def shares(self, rows: Ints, times: Ints, spec: SyntheticSpec) -> Floats:
        """float64[R, T], the probability of each topic for users `rows` [R] at `times` [R]."""
        share = (times - FIRST_TIME) / (DAY * spec.days)
        logits = world_of(spec).trends(share)
        turn = share[:, None] / self.period[rows, None] - self.phase[rows]
        bump = self.strength[rows] * np.exp((np.cos(2 * np.pi * turn) - 1) / BREADTH)
        logits[np.arange(len(rows))[:, None], self.topic[rows]] += bump
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Histories:
    """The users of one block and all their events, oldest first.

    Attributes:
      users: their interests.
      lengths: int64[U], events of each.
      times: int64[U, E], seconds since 1970, strictly increasing.
      topics: int64[U, E]; `places`: int64[U, E], which item of the topic. Both mean nothing past the length.
    """

    users: Users
    lengths: Ints
    times: Ints
    topics: Ints
    places: Ints


def block_size(spec: SyntheticSpec, block: int) -> int:
    """How many users block number `block` has."""
    return min(BLOCK, spec.users - block * BLOCK)


@functools.lru_cache(maxsize=16)  # users are asked for in any order, a few at a time
def draw_block(spec: SyntheticSpec, block: int) -> Histories:
    """All events of users `block * BLOCK` and after."""
    random = uniforms(spec, 1, block)
    size = block_size(spec, block)
    users = _draw_users(spec, random, size)
    normal = np.sqrt(-2 * np.log1p(-random.random(size))) * np.cos(2 * np.pi * random.random(size))
    lengths = np.exp(SPREAD * normal + math.log(spec.events) - SPREAD**2 / 2)
    lengths = np.clip(np.rint(lengths), SHORTEST, spec.longest).astype(np.int64)
    times = _draw_times(spec, random, lengths)
    chance = random.random((2, size, spec.longest))
    topics, places = _draw_events(spec, users, lengths, times, chance)
    return Histories(users, lengths, times, topics, places)


def weights_within(world: World, topics: Ints, last: Ints, seen: Flags) -> Floats:
    """float64[R, M], how likely each place of `topics` [R] is, not normalised; 0 where `seen` [R, M].

    `last` [R] is the place that the user took last in that topic, -1 where there was none.
    """
    weights = world.weights[topics]
    size = world.sizes[topics]
    follows = last >= 0
    weights[follows] *= 1 - SUCCESSION
    for step, share in enumerate(SUCCESSORS, start=1):
        rows = np.flatnonzero(follows)
        weights[rows, (last[rows] + step) % size[rows]] += SUCCESSION * share
    weights[seen] = 0.0
    return weights


def _draw_users(spec: SyntheticSpec, random: np.random.Generator, size: int) -> Users:
    # The largest of logit + Gumbel noise are a draw without replacement (Vieira 2014).
    noise = -np.log(-np.log1p(-random.random((size, spec.topics))))
    topic = np.argsort(-(world_of(spec).popularity + noise), axis=1)[:, : spec.interests]
    order = np.arange(spec.interests) + 0.5 * random.random((size, spec.interests))
    return Users(
        topic=topic,
        strength=STRENGTH * (0.8 + 0.4 * random.random((size, spec.interests))),
        phase=order / spec.interests + random.random((size, 1)),
        period=0.6 + 0.5 * random.random(size),
    )


def _draw_times(spec: SyntheticSpec, random: np.random.Generator, lengths: Ints) -> Ints:
    """Sessions with minutes between events, and days between sessions, up to near the log's end."""
    size, longest = len(lengths), spec.longest
    seconds = spec.days * DAY
    start, end = 0.5 * random.random(size) * seconds, (0.85 + 0.15 * random.random(size)) * seconds
    minutes = 60 + 540 * random.random((size, longest))
    pause = -np.log1p(-random.random((size, longest)))
    opens = random.random((size, longest)) < 1 / SESSION
    opens[:, 0] = True
    past = np.arange(longest) >= lengths[:, None]
    within = np.where(opens | past, 0.0, minutes)
    between = np.where(opens & ~past, pause, 0.0)
    # Long histories in a log of few days: sessions take half of the time at most.
    span = end - start
    within *= np.minimum(1.0, 0.5 * span / np.maximum(within.sum(axis=1), 1.0))[:, None]
    scale = (span - within.sum(axis=1)) / between.sum(axis=1)
    # One second an event keeps the times of a user apart, whatever rounding does.
    times = start[:, None] + np.cumsum(within + between * scale[:, None] + 1, axis=1)
    return FIRST_TIME + times.astype(np.int64)


def _draw_events(
    spec: SyntheticSpec, users: Users, lengths: Ints, times: Ints, chance: Floats
) -> tuple[Ints, Ints]:
    world = world_of(spec)
    size, longest = times.shape
    topics = np.zeros((size, longest), np.int64)
    places = np.zeros((size, longest), np.int64)
    seen = np.broadcast_to(world.items < 0, (size, *world.items.shape)).copy()
    left = np.tile(world.sizes, (size, 1))
    last = np.full((size, spec.topics), -1, np.int64)
    for event in range(int(lengths.max())):
        rows = np.flatnonzero(event < lengths)
        shares = users.shares(rows, times[rows, event], spec) * (left[rows] > 0)
        topic = _draw(shares, chance[0, rows, event])
        place = _draw(
            weights_within(world, topic, last[rows, topic], seen[rows, topic]), chance[1, rows, event]
        )
        topics[rows, event], places[rows, event] = topic, place
        seen[rows, topic, place] = True
        left[rows, topic] -= 1
        last[rows, topic] = place
    return topics, places


def _draw(weights: Floats, chance: Floats) -> Ints:
    """int64[R], a column of each row of `weights` [R, C], where uniform `chance` [R] falls."""
    total = np.cumsum(weights, axis=1)
    return np.sum(total <= chance[:, None] * total[:, -1:], axis=1)
