"""Whether explanations are true: what an item's score loses when the events that they name had not been.

For many users and the best recommendation of each, the `NAMED` events with the largest shares are left out of the
history, later ones moving up, and the model is asked again; beside it as many events at random are left out, the mean
of `DRAWS` draws (deletion, as DeYoung et al. 2020 call it comprehensiveness).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynrec_jax.errors import DataError
from dynrec_jax.evaluate.bootstrap import Interval, interval, resampled_means
from dynrec_jax.explain.explainer import AUTO, STEPS, Explainer, chosen
from dynrec_jax.explain.methods import METHODS, MOST_EXACT, parted, without

NAMED = 3
DRAWS = 8
LAST = "last events"  # the newest events, without any explanation: what a method must beat
MEASURES = ("logit", "log-probability")


class Faithfulness(NamedTuple):
    """What leaving events out costs an item, by which events; intervals of 95 %, over users.

    Attributes:
      users: how many were asked.
      random: what random events cost, by measure: "logit", the item's score; "log-probability", that under the softmax
        of all items' scores, which does not change where all scores rise by the same.
      named: what those cost that a method names, by method and measure.
      ratio: `named` to `random`, each the mean over users; None where random events cost so little that their interval
        holds 0, as in long histories, and a ratio to it says nothing.
    """

    users: int
    random: dict[str, Interval]
    named: dict[str, dict[str, Interval]]
    ratio: dict[str, dict[str, Interval | None]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""

        def plain(parts: Mapping[str, Interval | None]) -> dict[str, Any]:
            return {name: part and part.as_dict() for name, part in parts.items()}

        return {
            "users": self.users,
            "events": NAMED,
            "random": plain(self.random),
            "methods": {
                name: {"loss": plain(self.named[name]), "ratio": plain(self.ratio[name])}
                for name in self.named
            },
        }


def faithfulness(
    explainer: Explainer,
    users: int,
    methods: Sequence[str],
    steps: int = STEPS,
    seed: int = 0,
    say: Callable[[int], None] = lambda done: None,
) -> Faithfulness:
    """Measures methods over so many users with more than `NAMED` events, drawn with a seed, or all that there are.

    Args:
      explainer: of a run.
      users: how many.
      methods: of `METHODS`, or "auto"; with "exact", users are drawn who have a history as short as it needs.
      steps: places along the way of gradients.
      seed: of the draws.
      say: is told how many users are done.

    Raises:
      DataError: there are not two such users to whom an item can be recommended.
    """
    assert set(methods) <= {AUTO, *METHODS}
    rng = np.random.default_rng(seed)
    read_U = np.minimum(explainer.ends_U, explainer.served.length)
    most = MOST_EXACT if "exact" in methods else explainer.served.length
    there = np.flatnonzero((read_U > NAMED) & (read_U <= most))
    if len(there) < 2:
        raise DataError(
            f"{len(there)} users have {NAMED + 1} to {most} events that the model reads; expected two at least"
        )
    drawn = np.sort(rng.permutation(there)[:users])
    items = explainer.best(drawn)
    lost = []
    for done, (user, item) in enumerate(zip(drawn.tolist(), items.tolist(), strict=True)):
        if item:  # somebody may have all of them
            lost.append(_lost(explainer, user, item, methods, steps, rng))
        say(done + 1)
    if len(lost) < 2:
        raise DataError(
            f"of {len(drawn):,} users, {len(lost)} have an item that is not in the history; expected two at least"
        )
    return _summary(np.stack(lost), [LAST, *methods])


def _lost(
    explainer: Explainer, user: int, item: int, methods: Sequence[str], steps: int, rng: np.random.Generator
) -> np.ndarray:
    """float64[2, 2 + methods]: by measure, what random events cost, the last ones, and those of each method."""
    served = explainer.served
    past = explainer.past(user, served.length + NAMED)
    read = min(len(past.items), served.length)
    named = [np.arange(read - NAMED, read)]
    for method in methods:
        share_N = parted(served, past, item, chosen(method, read), steps).share_N
        named.append(np.argsort(-share_N, kind="stable")[:NAMED])
    drawn = [rng.permutation(read)[:NAMED] for _ in range(DRAWS)]
    left = without(past, served.length, np.stack([*drawn, *named]))
    all_N = np.ones((1, len(past.items)), bool)
    at = served.standing(past, np.concatenate([all_N, left]), item, explainer.seen(user))
    loss_2xK = np.stack([each[0] - each[1:] for each in (at.score, at.log_probability)])
    return np.concatenate([loss_2xK[:, :DRAWS].mean(axis=1, keepdims=True), loss_2xK[:, DRAWS:]], axis=1)


def _summary(lost_Ux2xC: np.ndarray, names: Sequence[str]) -> Faithfulness:
    users = len(lost_Ux2xC)
    mean_2xC = lost_Ux2xC.mean(axis=0)
    drawn_Rx2xC = resampled_means(lost_Ux2xC.reshape(users, -1), np.arange(users)).reshape(
        -1, *mean_2xC.shape
    )

    def by_measure(mean_2: np.ndarray, drawn_Rx2: np.ndarray) -> dict[str, Interval]:
        return {name: interval(mean_2[i], drawn_Rx2[:, i]) for i, name in enumerate(MEASURES)}

    columns = [by_measure(mean_2xC[:, i], drawn_Rx2xC[:, :, i]) for i in range(len(names) + 1)]
    chance, losses = columns[0], dict(zip(names, columns[1:], strict=True))

    def ratio(measure: int, column: int) -> Interval | None:
        if chance[MEASURES[measure]].low <= 0:
            return None
        drawn_RxC = drawn_Rx2xC[:, measure]
        return interval(
            mean_2xC[measure, column] / mean_2xC[measure, 0], drawn_RxC[:, column] / drawn_RxC[:, 0]
        )

    ratios = {
        name: {measure: ratio(m, i) for m, measure in enumerate(MEASURES)} for i, name in enumerate(names, 1)
    }
    return Faithfulness(users, chance, losses, ratios)
