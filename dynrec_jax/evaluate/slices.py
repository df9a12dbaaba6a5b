"""Ways to cut an evaluation's queries into bins: by time, by how much an interest changed, by user and by item."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse as sparse

from dynrec_jax.batch import PAD
from dynrec_jax.data import synthetic
from dynrec_jax.data.pipeline import time_cuts
from dynrec_jax.evaluate.baselines.content import tf_idf
from dynrec_jax.evaluate.baselines.learned import Events, Learning, Unable
from dynrec_jax.evaluate.oracle import synthetic_spec

HOUR, DAY = 3_600, 86_400
SPANS = ((HOUR, "an hour"), (DAY, "a day"), (7 * DAY, "a week"), (30 * DAY, "30 days"), (90 * DAY, "90 days"))
LENGTHS = (5, 10, 20, 50, 100, 200)
RECENT, EARLIER = (
    5,
    50,
)  # events whose mean is the interest now, and those before whose mean is the one it was
BEFORE, AFTER = 5, 15  # events around a change of interest that are shown
STABLE = 5  # events that an interest must have lasted, and must last, for its change to be one
NO_BIN = -1


@dataclasses.dataclass(frozen=True)
class Slices:
    """One way to cut the queries.

    Attributes:
      name: of the way, in the output.
      title: for people.
      labels: of the bins, in order.
      bin_Q: int64, the bin of each query; `NO_BIN` for none.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    bin_Q: np.ndarray


@dataclasses.dataclass(frozen=True)
class Queries:
    """What an evaluation asks: int64[Q] users and event numbers, int32[Q] items."""

    users: np.ndarray
    ends: np.ndarray
    targets: np.ndarray


def all_slices(learning: Learning, queries: Queries, vectors: Callable[[], np.ndarray]) -> list[Slices]:
    """Every way that the dataset allows.

    Args:
      learning: the training events.
      queries: what was asked.
      vectors: float[N, D] of the items, asked for where nothing else tells which are alike.
    """
    events = learning.events()
    found = [_by_length(queries), _by_popularity(learning, queries, events), _by_users(learning, queries)]
    if learning.histories.dataset.has_times:
        found += [_by_training_end(learning, queries), _by_age(learning, queries, events)]
    found.append(_by_change(learning, queries, vectors))
    shift = _by_shift(learning, queries)
    return [*found, shift] if shift is not None else found


def _spans(seconds_Q: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels and bins of spans of time."""
    limits = np.array([limit for limit, _ in SPANS])
    names = [name for _, name in SPANS]
    labels = [f"up to {names[0]}", *(f"up to {name}" for name in names[1:]), f"more than {names[-1]}"]
    return tuple(labels), np.searchsorted(limits, seconds_Q, side="left")


def _by_length(queries: Queries) -> Slices:
    lower = (1, *(limit + 1 for limit in LENGTHS))
    labels = [f"{low} to {high}" for low, high in zip(lower, LENGTHS, strict=False)] + [
        f"{lower[-1]} and more"
    ]
    return Slices(
        "history", "Events in the history", tuple(labels), np.searchsorted(LENGTHS, queries.ends, side="left")
    )


def _by_popularity(learning: Learning, queries: Queries, events: Events) -> Slices:
    """Head, middle and tail have a third of the training events each; what has none is new."""
    counts_N = np.bincount(events.items, minlength=learning.items + 1)[1:]
    order_N = np.argsort(-counts_N, kind="stable")
    before_N = np.cumsum(counts_N[order_N]) - counts_N[order_N]
    bin_N = np.empty(len(counts_N), np.int64)
    bin_N[order_N] = np.minimum(before_N * 3 // max(int(counts_N.sum()), 1), 2)
    bin_N[counts_N == 0] = 3
    labels = ("head", "middle", "tail", "new: no training event")
    return Slices(
        "item_popularity", "Popularity of the target in training", labels, bin_N[queries.targets - 1]
    )


def _by_users(learning: Learning, queries: Queries) -> Slices:
    known_Q = learning.splits.train_end[queries.users] > 0
    labels = ("has training events", "new: has none")
    return Slices("user", "Users", labels, np.where(known_Q, 0, 1))


def _by_training_end(learning: Learning, queries: Queries) -> Slices:
    """Since the moment that cuts all histories, or since the user's last training event."""
    histories = learning.histories
    asked_Q = histories.asked(queries.users, queries.ends).astype(np.int64)
    if learning.config.evaluation.split == "global_time":
        first = time_cuts(histories, learning.config.evaluation)[0] - int(histories.dataset.first_time or 0)
        since_Q, title = asked_Q - first, "Time since training ended"
    else:
        end_Q = learning.splits.train_end[queries.users]
        since_Q = asked_Q - histories.asked(queries.users, np.maximum(end_Q - 1, 0))
        title = "Time since the user's last training event"
    labels, bin_Q = _spans(since_Q)
    return Slices("since_training", title, labels, bin_Q)


def _by_age(learning: Learning, queries: Queries, events: Events) -> Slices:
    """Since the item's first training event."""
    first_N = np.full(learning.items + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_N, events.items, events.times.astype(np.int64))
    asked_Q = learning.histories.asked(queries.users, queries.ends).astype(np.int64)
    labels, bin_Q = _spans(asked_Q - np.minimum(first_N[queries.targets], asked_Q))
    new_Q = first_N[queries.targets] == np.iinfo(np.int64).max
    labels = (*labels, "new: no training event")
    return Slices("item_age", "Age of the target", labels, np.where(new_Q, len(labels) - 1, bin_Q))


def _by_change(learning: Learning, queries: Queries, vectors: Callable[[], np.ndarray]) -> Slices:
    """`1 - cos` of the mean of the last 5 items and that of up to 50 before them, in quarters of the queries."""
    try:
        of_items, by = tf_idf(learning.histories.dataset), "by their words"
    except Unable:
        of_items, by = sparse.csr_matrix(vectors()), "by the model's vectors"
    change_Q = np.full(len(queries.users), np.nan)
    for start in range(0, len(queries.users), 4_096):
        here = slice(start, start + 4_096)
        items_BxM = learning.histories.last_items(queries.users[here], queries.ends[here], RECENT + EARLIER)
        length_Bx1 = (items_BxM != PAD).sum(axis=1, keepdims=True)
        ago_BxM = length_Bx1 - np.arange(items_BxM.shape[1])[None]  # 1 is the last event
        now, then = (
            _mean(of_items, items_BxM, chosen)
            for chosen in ((ago_BxM >= 1) & (ago_BxM <= RECENT), ago_BxM > RECENT)
        )
        product = np.asarray(now.multiply(then).sum(axis=1)).ravel()
        norms = [np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel()) for x in (now, then)]
        enough = (length_Bx1[:, 0] >= 2 * RECENT) & (norms[0] > 0) & (norms[1] > 0)
        change_Q[here] = np.where(enough, 1 - product / np.where(enough, norms[0] * norms[1], 1.0), np.nan)
    known = np.isfinite(change_Q)
    cuts = np.quantile(change_Q[known], [0.25, 0.5, 0.75]) if known.any() else np.zeros(3)
    bin_Q = np.where(known, np.searchsorted(cuts, np.where(known, change_Q, 0.0), side="left"), NO_BIN)
    labels = ("smallest quarter", "second quarter", "third quarter", "largest quarter")
    title = f"How much the last {RECENT} items differ from those before, {by}"
    return Slices("recent_change", title, labels, bin_Q)


def _mean(of_items: sparse.csr_matrix, items_BxM: np.ndarray, chosen_BxM: np.ndarray) -> sparse.csr_matrix:
    rows, columns = np.nonzero(chosen_BxM & (items_BxM != PAD))
    ones = (np.ones(len(rows)), (rows, items_BxM[rows, columns] - 1))
    return sparse.coo_matrix(ones, shape=(len(items_BxM), of_items.shape[0])).tocsr() @ of_items


def _by_shift(learning: Learning, queries: Queries) -> Slices | None:
    """Events since the planted interest changed, where the source knows it: 0 is the first event of the new one."""
    spec = synthetic_spec(learning.histories.dataset)
    if spec is None:
        return None
    histories = learning.histories
    first_time = int(histories.dataset.first_time or 0)
    bin_Q = np.full(len(queries.users), NO_BIN)
    for user in np.unique(queries.users):
        here = np.flatnonzero(queries.users == user)
        length = int(histories.lengths[user])
        times = histories.windows(np.array([user]), np.array([length]), length).times[0].astype(np.int64)
        (name,) = histories.ids_of(np.array([user]))
        main_L = synthetic.interests(spec, name, times + first_time).argmax(axis=1)
        since_L = events_since_change(main_L)
        found = since_L[queries.ends[here]]
        bin_Q[here] = np.where(found == NONE_NEAR, NO_BIN, found + BEFORE)
    labels = tuple(f"{offset:+d}" if offset else "0" for offset in range(-BEFORE, AFTER + 1))
    return Slices("shift", "Events since the interest changed", labels, bin_Q)


NONE_NEAR = -1_000


def events_since_change(main_L: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64[L], of each event how many it is behind a change: negative before one, 0 at its first event.

    A change is one only where what was lasted for `STABLE` events and what comes lasts for as many. Of two changes, an
    event belongs to the next where it is one of the `BEFORE` events before it, and else to the last; `NONE_NEAR` where
    none is near enough.
    """
    main = np.asarray(main_L)
    change = np.flatnonzero(np.diff(main)) + 1
    edges = np.concatenate([[0], change, [len(main)]])
    since = np.full(len(main), NONE_NEAR)
    for before, at, after in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        if at - before < STABLE or after - at < STABLE:
            continue
        start, end = max(before, at - BEFORE), min(after, at + AFTER + 1)
        since[start:at] = np.arange(start - at, 0)
        since[at:end] = np.arange(end - at)
    return since
