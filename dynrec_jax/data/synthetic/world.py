"""What all users share: the items, their topics and successors, and the trends."""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from dynrec_jax.data.synthetic import titles
from dynrec_jax.data.synthetic.spec import SyntheticSpec

FIRST_TIME = 1_704_067_200  # 2024-01-01T00:00:00Z, seconds since 1970
DAY = 86_400
ZIPF = 0.7  # exponent of the items' weights within a topic
SUCCESSION = 0.75  # share of a topic's draws that follow the item taken there last
SUCCESSORS = (0.16, 0.15, 0.14, 0.12, 0.10, 0.09, 0.08, 0.07, 0.05, 0.04)  # of an item, nearest first
TREND = 2.0  # how far a topic's trend lifts or lowers its logit

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class World:
    """Items as places in topics: item `items[z, m]` is place m of topic z, -1 where a topic has fewer items.

    The places are in the order of succession, as a ring: place m is followed by m + 1, m + 2, ...

    Attributes:
      items: int64[T, M].
      weights: float64[T, M], sums to 1 over each topic; 0 where there is no item.
      sizes: int64[T], items of each topic.
      popularity: float64[T], how readily a topic becomes a user's interest, as a logit.
      turn: float64[T], when each trend is half way, as a share of the log's time.
      rise: float64[T], the trend at the end of the log; it starts at the negative.
    """

    items: Ints
    weights: Floats
    sizes: Ints
    popularity: Floats
    turn: Floats
    rise: Floats

    def trends(self, share: Floats) -> Floats:
        """What trends add to the logits of topics, `[..., T]`, at shares `[...]` of the log's time."""
        return self.rise * np.tanh((share[..., None] - self.turn) / 0.15)


def uniforms(spec: SyntheticSpec, *stream: int) -> np.random.Generator:
    """The generator of one independent stream of the seed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, *stream])))


@functools.lru_cache(maxsize=4)
def world_of(spec: SyntheticSpec) -> World:
    """The world that a spec describes, the same for any number of users."""
    random = uniforms(spec, 0)
    topics, most = spec.topics, -(-spec.items // spec.topics)
    dealt = np.full(topics * most, -1, np.int64)
    dealt[: spec.items] = np.argsort(random.random(spec.items))
    items = dealt.reshape(most, topics).T  # dealt round: no topic is more than one item larger than another
    sizes = np.sum(items >= 0, axis=1)
    rank = np.argsort(np.argsort(np.where(items >= 0, random.random((topics, most)), np.inf), axis=1), axis=1)
    weights = np.where(items >= 0, (rank + 1.0) ** -ZIPF, 0.0)
    return World(
        items=items,
        weights=weights / weights.sum(axis=1, keepdims=True),
        sizes=sizes,
        popularity=0.7 * (2 * random.random(topics) - 1),
        turn=0.2 + 0.6 * random.random(topics),
        rise=TREND * (2 * random.random(topics) - 1),
    )


@functools.lru_cache(maxsize=4)
def topic_of_items(spec: SyntheticSpec) -> Ints:
    """int64[N], the topic of each item, in the order of `item_ids`."""
    items = world_of(spec).items
    topic, place = np.nonzero(items >= 0)
    topics = np.empty(spec.items, np.int64)
    topics[items[topic, place]] = topic
    topics.flags.writeable = False  # shared by all callers
    return topics


def item_ids(spec: SyntheticSpec) -> list[str]:
    """The ids of the generated items; their order is also that of their bytes."""
    return _ids("i", spec.items)


def user_ids(spec: SyntheticSpec) -> list[str]:
    """The ids of the generated users; their order is also that of their bytes."""
    return _ids("u", spec.users)


def topic_names(spec: SyntheticSpec) -> list[str]:
    """Readable names of the topics, in their order."""
    return [titles.topic_name(topic) for topic in range(spec.topics)]


def item_titles(spec: SyntheticSpec) -> list[str]:
    """A readable title of each item, in the order of `item_ids`; no two are the same."""
    given = [0] * spec.topics
    names = []
    for topic in topic_of_items(spec).tolist():
        names.append(titles.title(topic, given[topic]))
        given[topic] += 1
    return names


def _ids(letter: str, count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"{letter}{number:0{width}d}" for number in range(count)]
