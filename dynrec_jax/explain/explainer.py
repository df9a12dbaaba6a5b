"""Why an item is recommended to a user: the share of each past event in the item's score."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynrec_jax.batch import PAD
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import shard_of
from dynrec_jax.data.examples import NONE
from dynrec_jax.data.pipeline import make_splits
from dynrec_jax.data.titles import titles
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.evaluate.evaluator import asked
from dynrec_jax.evaluate.recommender import Recommender
from dynrec_jax.explain.methods import METHODS, MOST_EXACT, parted
from dynrec_jax.explain.served import Past, Served
from dynrec_jax.workdir import Run

AUTO = "auto"
STEPS = 32  # places along the way of gradients
MOST_DELETED = 512  # events that a history may have for each to be left out once, where nobody says how
NEAR_IDS = 100_000  # user ids that are looked at for one like a mistyped one
BASELINES = {
    "deletion": "no history",
    "gradients": "as many events, each the mean of the history's",
    "exact": "no history",
}


@dataclasses.dataclass(frozen=True)
class Event:
    """An event of a history, and its share in an item's score.

    Attributes:
      position: its place in the user's history, from 1, the oldest.
      item_id: as in the source.
      title: of the item; None where it has none.
      time: seconds since 1970; None where the data has no times.
      event: its type; None where it has none.
      share: of the score, a logit; below 0 where the event speaks against the item.
      percent: of the sum of all events' shares without their signs.
    """

    position: int
    item_id: str
    title: str | None
    time: int | None
    event: str | None
    share: float
    percent: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why an item is recommended to a user.

    Attributes:
      user: id.
      item: id.
      title: of the item; None where it has none.
      score: the item's logit, as it is served: `baseline` + all shares + `residual`.
      rank: its place, from 1, among the items that are not in the history, itself apart.
      seen: whether it is in the history.
      counts: how much of the score neighbours' counts are (`models.neighbours`).
      interest: which of the user's interests gives the score, from 1; None of a model that has one.
      method: "exact", "gradients" or "deletion" (`explain.methods`).
      baseline: the score that shares are added to.
      baseline_is: what it is the score of.
      events: those that the model reads, the largest share first; equal ones newest first.
      unread: older events of the history, which the model does not read.
      residual: what shares do not explain. Of "exact" it is rounding, of "gradients" the integral's error; of
        "deletion" what several events say together.
    """

    user: str
    item: str
    title: str | None
    score: float
    rank: int
    seen: bool
    counts: float
    interest: int | None
    method: str
    baseline: float
    baseline_is: str
    events: tuple[Event, ...]
    unread: int
    residual: float

    def as_dict(self, top: int | None = None) -> dict[str, Any]:
        """For JSON; with `top`, no more events than that, and in "rest" what the others share."""
        named = self.events[:top]
        result = dataclasses.asdict(self)
        residual = result.pop("residual")
        result["events"] = [dataclasses.asdict(event) for event in named]
        return {**result, "rest": self.rest(len(named)), "residual": residual}

    def rest(self, named: int) -> float:
        """What all events but the first `named` share."""
        return sum(event.share for event in self.events[named:])


class Explainer:
    """Explains recommendations of one run, one after the other; programs are compiled once.

    Attributes:
      run: the trained model.
      served: its scores.
      histories: of all users.
    """

    def __init__(self, run: Run, split: str = "all", cache_dir: str = ""):
        """`split` says which history is read: "all" of it, or what "test" or "validation" sees.

        Raises:
          ConfigError: the run's evaluation asks a user for several events, so that a split has no one history.
          NonFiniteScores: item vectors are not finite.
        """
        self.run = run
        self.histories = Histories(run.dataset, cache_dir or run.config.data.cache_dir)
        self._split = split
        self.ends_U = self._ends()
        self.served = Served(run)
        self._lists = Recommender(
            run.model, run.mesh, run.config.evaluation.batch_size, 1, True, items=run.items
        ).prepare(run.params, run.tables)
        self._item_ids = run.item_ids

    def explain(
        self, user: str, item: str | None = None, method: str = AUTO, steps: int = STEPS
    ) -> Explanation:
        """Explains an item's score; see `explain`, below."""
        if method not in (AUTO, *METHODS):
            raise ConfigError(f"method {method!r}: expected one of {', '.join((AUTO, *METHODS))}")
        if steps < 1:
            raise ConfigError(f"steps {steps}: expected 1 or more")
        number = self._number(user)
        past = self.past(number, self.served.length + 1)
        read = min(len(past.items), self.served.length)
        method = chosen(method, read)
        index = self.best(np.array([number]))[0] if item is None else self._index(item)
        if index == PAD:
            raise DataError(f"user {user!r} has all items in the history already; name one with --item")
        seen_M = self.seen(number)
        all_N = np.ones((1, len(past.items)), bool)
        at = self.served.standing(past, all_N, index, seen_M)
        share_N, baseline = parted(self.served, past, index, method, steps)
        score = float(at.score[0])
        return Explanation(
            user=user,
            item=self._item_ids[index - 1].as_py(),
            title=self._titles([index])[0],
            score=score,
            rank=int(at.rank[0]),
            seen=index in seen_M,
            counts=float(at.counts[0]),
            interest=int(at.interest[0]) if self.run.model.abra.interests > 1 else None,
            method=method,
            baseline=baseline,
            baseline_is=BASELINES[method],
            events=self._events(past, share_N, int(self.ends_U[number])),
            unread=int(self.ends_U[number]) - read,
            residual=score - baseline - float(share_N.sum()),
        )

    def past(self, number: int, size: int) -> Past:
        """The last events of a user's history, by the user's number."""
        one, end = np.array([number]), self.ends_U[[number]]
        items, times, events = (x[0] for x in self.histories.windows(one, end, min(size, int(end[0]))))
        return Past(items, times, events, int(self.histories.asked(one, end)[0]))

    def seen(self, number: int) -> np.ndarray:
        """int32, the items of a user's history, each once."""
        end = self.ends_U[[number]]
        return np.unique(self.histories.last_items(np.array([number]), end, int(end[0])))

    def best(self, users_U: np.ndarray) -> np.ndarray:
        """int[U], the best item for each user that is not in the history; 0 where there is none."""
        return self._lists(self.histories, users_U, self.ends_U[users_U]).ids[:, 0]

    def _ends(self) -> np.ndarray:
        """int64[U], the event that each user is asked for; NONE for nobody."""
        if self._split == "all":
            return self.histories.lengths
        users, ends = asked(make_splits(self.histories, self.run.config), self._split)
        if len(np.unique(users)) < len(users):
            raise ConfigError(
                f"--split={self._split}: the run's evaluation.targets is "
                f"{self.run.config.evaluation.targets!r}, which asks a user for several events, and one history is "
                "explained; leave the flag out"
            )
        ends_U = np.full(self.histories.users, NONE, np.int64)
        ends_U[users] = ends
        return ends_U

    def _number(self, user: str) -> int:
        stored = self.histories
        shard = shard_of(user, self.run.dataset.shards)
        first = int(stored.shard_first[shard])
        there = stored.ids_of(np.arange(first, first + int(stored.shard_users[shard])))
        if user not in there:
            some = stored.ids_of(np.arange(min(stored.users, NEAR_IDS)))
            hidden = "; its ids are pseudonyms" if self.run.dataset.info["pseudonymised"] else ""
            raise DataError(
                f"user {user!r}: is none of the {stored.users:,} users of {self.run.dataset.path}"
                f"{_like(user, some)}{hidden}"
            )
        number = first + there.index(user)
        if self.ends_U[number] == NONE:
            raise DataError(
                f"user {user!r}: has no {self._split} target, so --split={self._split} has no history; leave it out"
            )
        if self.ends_U[number] == 0:
            raise DataError(
                f"user {user!r}: has no event before the {self._split} target; there is nothing that could explain"
            )
        return number

    def _index(self, item: str) -> int:
        ids = self._item_ids.to_pylist()
        if item not in ids:
            raise DataError(
                f"item {item!r}: is none of the {len(ids):,} items of {self.run.dataset.path}"
                f"{_like(item, ids[:NEAR_IDS])}"
            )
        return ids.index(item) + 1

    def _titles(self, items: Sequence[int]) -> list[str | None]:
        return titles(self.run.dataset, items)

    def _events(self, past: Past, share_N: np.ndarray, end: int) -> tuple[Event, ...]:
        number, dataset = len(share_N), self.run.dataset
        items, times, kinds = (column[len(past.items) - number :].tolist() for column in past[:3])
        named = self._titles(items)
        # Without their signs: shares of both signs can add up to nothing.
        whole = float(np.abs(share_N).sum()) or 1.0
        return tuple(
            Event(
                position=end - number + place + 1,
                item_id=self._item_ids[items[place] - 1].as_py(),
                title=named[place],
                time=None if dataset.first_time is None else dataset.first_time + times[place],
                event=dataset.event_types[kinds[place] - 1] if kinds[place] else None,
                share=float(share_N[place]),
                percent=100 * float(share_N[place]) / whole,
            )
            for place in sorted(range(number), key=lambda place: (-share_N[place], -place))
        )


def explain(
    run: Run,
    user: str,
    item: str | None = None,
    *,
    method: str = AUTO,
    split: str = "all",
    steps: int = STEPS,
    cache_dir: str = "",
) -> Explanation:
    """Explains why an item is recommended to a user: the share of each past event in the item's score.

    Args:
      run: the trained model.
      user: id.
      item: id; the best recommendation that is not in the history where none is named.
      method: "exact", "gradients" or "deletion", as `explain.methods` tells; "auto" is `chosen`'s.
      split: "all" explains what is recommended after the whole history, "test" and "validation" after what evaluation
        sees.
      steps: places along the way of gradients.
      cache_dir: memory-mapped copies of the shards; empty for the run's own setting.

    Raises:
      DataError: no such user or item, a user without a history, or one who has all items.
      ConfigError: no such method or no step; `method` is "exact" and the history is long; a split of several targets.
    """
    return Explainer(run, split, cache_dir).explain(user, item, method, steps)


def chosen(method: str, events: int) -> str:
    """The method for a history of which the model reads so many events; raises ConfigError where it cannot be.

    "auto" is the most faithful one, by `explain.faithful`, that the history is short enough for: "exact" on Amazon
    Beauty's of 4 to 10 events, "deletion" on MovieLens-1M's of up to 200. "gradients" come after them, and make as many
    passes for a long history as for a short one.
    """
    if method == AUTO:
        if events <= MOST_EXACT:
            return "exact"
        return "deletion" if events <= MOST_DELETED else "gradients"
    if method == "exact" and events > MOST_EXACT:
        raise ConfigError(
            f"--method=exact: asks for all subsets of the events, and of these the model reads {events}, more than "
            f"{MOST_EXACT}; choose deletion or gradients"
        )
    return method


def _like(wrong: str, ids: Sequence[str]) -> str:
    found = difflib.get_close_matches(wrong, ids, 1, 0.5)
    return f"; the closest id is {found[0]!r}" if found else f"; ids are such as {ids[0]!r}" if ids else ""
