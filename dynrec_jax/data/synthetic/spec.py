"""What a synthetic log is made from: a few numbers, read from text such as `users=2000,items=1000,seed=0`."""

import dataclasses

from dynrec_jax.errors import DataError

SHORTEST = 5  # events of the shortest history
LONGEST = 4  # the longest history as a multiple of the mean
LIMIT = 2**31 - 1  # of users and items: item indices are int32


@dataclasses.dataclass(frozen=True)
class SyntheticSpec:
    """The numbers that a synthetic log follows from; equal specs give the same bytes.

    Attributes:
      users: how many users; each has at least `SHORTEST` events.
      items: how many items; a history holds half of them at most.
      topics: how many topics the items are dealt to, in equal numbers.
      seed: of everything that is random.
      events: mean events a user.
      interests: topics that a user is interested in, one after the other and again.
      days: from the first event to the last.

    Raises:
      DataError: a number is out of range, or contradicts another.
    """

    users: int = 2_000
    items: int = 1_000
    topics: int = 20
    seed: int = 0
    events: int = 45
    interests: int = 3
    days: int = 180

    def __post_init__(self) -> None:
        least = {"items": 4 * SHORTEST, "seed": 0, "events": SHORTEST}
        for key, value in dataclasses.asdict(self).items():
            low = least.get(key, 1)
            if not low <= value <= LIMIT:
                raise DataError(f"synthetic: {key}={value}; expected an integer from {low} to {LIMIT}")
        if self.topics > self.items:
            raise DataError(f"synthetic: topics={self.topics}; expected at most items={self.items}")
        if self.interests > self.topics:
            raise DataError(f"synthetic: interests={self.interests}; expected at most topics={self.topics}")

    @property
    def longest(self) -> int:
        """No history has more events than this."""
        return min(LONGEST * self.events, self.items // 2)


KEYS = tuple(field.name for field in dataclasses.fields(SyntheticSpec))


def parse(text: str) -> SyntheticSpec:
    """The spec that `key=integer,key=integer` describes; keys left out have their defaults, and so has "".

    Raises:
      DataError: an unknown or repeated key, a value that is not an integer, or one that is out of range.
    """
    values: dict[str, int] = {}
    for part in text.split(",") if text.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in KEYS:
            raise DataError(
                f"synthetic:{text}: {part!r}; expected key=integer with a key of {', '.join(KEYS)}"
            )
        if key in values:
            raise DataError(f"synthetic:{text}: {key} is given twice; give it once")
        try:
            values[key] = int(value)
        except ValueError:
            raise DataError(f"synthetic:{text}: {key}={value!r} is not an integer") from None
    return SyntheticSpec(**values)
