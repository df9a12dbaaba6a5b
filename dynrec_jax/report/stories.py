"""A few users for the page: what they took, what they are interested in over time, and what is recommended now."""

import datetime
from collections.abc import Mapping, Sequence

import numpy as np

from dynrec_jax.batch import History
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.titles import titles
from dynrec_jax.errors import DataError
from dynrec_jax.evaluate.recommender import Recommender
from dynrec_jax.report.attention import attention_over, planted_interests, topics_of
from dynrec_jax.report.interests import LEAST, SHOWN
from dynrec_jax.report.page import UserStory
from dynrec_jax.workdir import Run

EVENTS, NEXT = 12, 10  # titles of a user's last events, and of recommendations
REST = "all others"


def stories(
    run: Run, wanted: Sequence[str] | None, count: int, column: str | None, cache_dir: str
) -> list[UserStory]:
    """Of the users named, or of some with long histories that the model reads whole.

    Raises:
      DataError: no such user, or `column` is none of the items'.
    """
    histories = Histories(run.dataset, cache_dir)
    chosen = _chosen(run, histories, wanted, count)
    try:
        topics = topics_of(run, column)
    except DataError:
        if column:
            raise
        topics = None
    named = titles_of(run)
    ends = histories.lengths[chosen]
    k = min(NEXT, run.items.number)
    recommender = Recommender(
        run.model, run.mesh, max(len(chosen), 1), k, run.config.evaluation.filter_seen, items=run.items
    )
    lists = recommender.prepare(run.params, run.tables)(histories, chosen, ends)
    ids = histories.ids_of(chosen)
    return [
        _story(run, histories, int(user), name, topics, named, [named[i - 1] for i in best if i])
        for user, name, best in zip(chosen, ids, lists.ids.tolist(), strict=True)
    ]


def titles_of(run: Run) -> list[str]:
    """What an item is called: its title or name, or its id where it has none."""
    ids = run.dataset.item_ids().to_pylist()
    found = titles(run.dataset, range(1, run.dataset.items + 1))
    return [str(title or item) for title, item in zip(found, ids, strict=True)]


def _chosen(run: Run, histories: Histories, wanted: Sequence[str] | None, count: int) -> np.ndarray:
    if wanted:
        number = {user: i for i, user in enumerate(histories.ids_of(np.arange(histories.users)))}
        for user in wanted:
            if user not in number:
                raise DataError(
                    f"--users: {user!r} is none of the {histories.users:,} users of {run.dataset.path}"
                )
        return np.array([number[user] for user in wanted])
    within = np.where(histories.lengths <= run.config.data.max_length, histories.lengths, 0)
    order = np.argsort(-within, kind="stable")
    # The longest, and some a little shorter, so that they are not all of one kind.
    return order[: 10 * count : 10][:count]


def _story(
    run: Run,
    histories: Histories,
    user: int,
    name: str,
    topics: tuple[list[str], np.ndarray] | None,
    titles: Sequence[str],
    best: Sequence[str],
) -> UserStory:
    one, end = np.array([user]), histories.lengths[[user]]
    windows = histories.windows(one, end, run.config.data.max_length)
    real = windows.items[0] > 0
    items = windows.items[0][real]
    seconds = windows.times[0][real].astype(np.int64) + int(run.dataset.first_time or 0)
    timed = run.dataset.has_times
    shares: Mapping[str, Sequence[float]] = {}
    planted: Mapping[str, Sequence[float]] = {}
    places = seconds.astype(float) if timed else np.arange(len(items), dtype=float)
    if topics is not None and len(items) > 1:
        names, topic_N = topics
        attention_LxN = attention_over(run, History(*windows, histories.asked(one, end)))[real]
        inferred_LxT = attention_LxN @ np.eye(len(names))[topic_N]
        true_LxT = planted_interests(run, name, seconds, names) if timed else None
        shown = _most_present(inferred_LxT if true_LxT is None else np.concatenate([inferred_LxT, true_LxT]))
        shares = _named(inferred_LxT, names, shown)
        planted = {} if true_LxT is None else _named(true_LxT, names, shown)
    when = [_date(second) if timed else f"event {i + 1}" for i, second in enumerate(seconds)]
    last = [(when[i], titles[item - 1]) for i, item in enumerate(items.tolist())][::-1][:EVENTS]
    return UserStory(name, places.tolist(), shares, planted, _ticks(places, when), last, best)


def _most_present(shares_PxT: np.ndarray) -> list[int]:
    most = np.argsort(-shares_PxT.sum(axis=0), kind="stable")[: SHOWN - 1]
    return [int(topic) for topic in most if shares_PxT[:, topic].max() >= LEAST]


def _named(shares_LxT: np.ndarray, names: Sequence[str], shown: Sequence[int]) -> dict[str, list[float]]:
    others = np.setdiff1d(np.arange(shares_LxT.shape[1]), shown)
    found = {names[topic]: shares_LxT[:, topic].tolist() for topic in shown}
    return {**found, REST: shares_LxT[:, others].sum(axis=1).tolist()}


def _ticks(places: np.ndarray, when: Sequence[str]) -> list[tuple[float, str]]:
    if len(places) == 0:
        return []
    wanted = np.linspace(places[0], places[-1], 5)
    nearest = sorted({int(np.abs(places - value).argmin()) for value in wanted})
    return [(float(places[i]), when[i]) for i in nearest]


def _date(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%d")
