"""Evaluation against the same numbers in plain Python, and the two traps of counting who scored higher."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.examples import NONE, Splits, one_each
from dynrec_jax.data.pipeline import make_splits, time_cuts
from dynrec_jax.errors import DataError
from dynrec_jax.evaluate.evaluator import Evaluator
from dynrec_jax.evaluate.popular import popularity_counts
from dynrec_jax.evaluate.recommender import NonFiniteScores

from .. import tiny

ITEMS = 25
CONFIG = {"evaluation__batch_size": 64}


def evaluator(histories: Histories, which: str = "test", items: int = ITEMS, **changes: Any) -> Evaluator:
    config = tiny.config(**CONFIG, **changes)
    model, _, _ = tiny.bstm(items)
    return Evaluator(histories, make_splits(histories, config), which, model, config, tiny.mesh(1, 1, 1))


def history(histories: Histories, user: int, end: int) -> list[int]:
    items = histories.windows(np.array([user]), np.array([end]), 64).items[0]
    return items[items > 0].tolist()


def plain_metrics(lists: list[list[int]], targets: list[int], ks: tuple[int, ...]) -> dict[str, float]:
    """One user at a time, by the definitions."""
    found: dict[str, float] = {"mrr": 0.0}
    for k in ks:
        found |= {f"recall@{k}": 0.0, f"ndcg@{k}": 0.0}
        found[f"coverage@{k}"] = len({item for made in lists for item in made[:k] if item}) / ITEMS
    for made, target in zip(lists, targets, strict=True):
        if target not in made:
            continue
        rank = made.index(target) + 1
        found["mrr"] += 1 / rank / len(lists)
        for k in ks:
            if rank <= k:
                found[f"recall@{k}"] += 1 / len(lists)
                found[f"ndcg@{k}"] += 1 / math.log2(rank + 1) / len(lists)
    return found


@pytest.mark.parametrize("which", ["validation", "test"])
def test_metrics_are_those_of_the_lists_by_their_definitions(histories: Histories, which: str):
    made = evaluator(histories, which)
    _, params, tables = tiny.bstm(ITEMS)
    users = [user for user in range(histories.users) if histories.lengths[user] >= 3]
    assert made.users_U.tolist() == users
    ends = [int(histories.lengths[user]) - (1 if which == "test" else 2) for user in users]
    targets = [
        int(histories.item_at(np.array([user]), np.array([end]))[0])
        for user, end in zip(users, ends, strict=True)
    ]
    lists = made.recommender.prepare(params, tables)(histories, np.array(users), np.array(ends)).ids.tolist()
    # Whatever was seen is not in the list, so a target that was seen is a miss.
    for user, end, shown in zip(users, ends, lists, strict=True):
        assert not set(history(histories, user, end)) & set(shown)
    assert made.metrics(params, tables) == pytest.approx(plain_metrics(lists, targets, (1, 5, 10)), rel=1e-9)


def test_targets_in_the_history_are_counted_and_are_misses(histories: Histories):
    made = evaluator(histories)
    _, params, tables = tiny.bstm(ITEMS)
    seen = [
        int(target) in history(histories, user, end)
        for user, end, target in zip(made.users_U, made.ends_U, made.targets_U, strict=True)
    ]
    assert 0 < sum(seen) < len(seen)
    assert made.protocol()["targets_in_history"] == sum(seen)
    # Every list holds all 25 items but those seen: what is not seen is found, what is seen is not.
    found = made.metrics(params, tables)["mrr"]
    assert found > 0
    whole = evaluator(histories, evaluation__ks=(25,), evaluation__metric="ndcg@25")
    assert whole.metrics(params, tables)["recall@25"] == pytest.approx(1 - sum(seen) / len(seen))


def test_a_model_that_likes_everything_alike_gets_chance(histories: Histories):
    """All scores are equal: the list is the lowest indices, and is right as often as any fixed one."""
    made = evaluator(histories)
    _, params, tables = tiny.bstm(ITEMS)
    metrics = made.metrics(params, {"item_id": jnp.zeros_like(tables["item_id"])})
    lists = []
    for user, end in zip(made.users_U, made.ends_U, strict=True):
        seen = set(history(histories, int(user), int(end)))
        lists.append([item for item in range(1, ITEMS + 1) if item not in seen])
    expected = plain_metrics(lists, made.targets_U.tolist(), (1, 5, 10))
    assert metrics == pytest.approx(expected, rel=1e-9)
    assert metrics["recall@1"] < 0.2, "no model that knows nothing is perfect"


def test_nan_ends_the_evaluation(histories: Histories):
    made = evaluator(histories)
    _, params, tables = tiny.bstm(ITEMS)
    with pytest.raises(NonFiniteScores):
        made.metrics(params, {"item_id": tables["item_id"] * np.nan})


def test_popularity_counts_training_events_alone(histories: Histories):
    made = evaluator(histories)
    counts, recent = np.zeros(ITEMS + 1, int), np.zeros(ITEMS + 1, int)
    for user in range(histories.users):
        length = int(histories.lengths[user])
        trained = history(histories, user, length - 2 if length >= 3 else length)
        np.add.at(counts, trained, 1)
        np.add.at(recent, trained[-max(math.ceil(len(trained) * 0.1), 1) :], 1)
    config = tiny.config(**CONFIG)
    found = popularity_counts(histories, make_splits(histories, config), config)
    assert found["popularity"].tolist() == counts.tolist()
    assert found["recent_popularity"].tolist() == recent.tolist()
    lists = []
    for user, end in zip(made.users_U, made.ends_U, strict=True):
        seen = set(history(histories, int(user), int(end)))
        order = np.argsort(-counts[1:], kind="stable") + 1
        lists.append([item for item in order.tolist() if item not in seen])
    expected = plain_metrics(lists, made.targets_U.tolist(), (1, 5, 10))
    baselines = made.baselines()
    assert set(baselines) == {"popularity", "recent_popularity"}
    assert baselines["popularity"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_recent_popularity_is_of_the_latest_share_of_training_time(
    timed_dataset: Dataset, cache_dir: Path, split: str
):
    held = Histories(timed_dataset, cache_dir)
    config = tiny.config(**CONFIG, evaluation__split=split, evaluation__holdout=0.2, evaluation__recent=0.25)
    splits = make_splits(held, config)
    found = popularity_counts(held, splits, config)["recent_popularity"]
    # One event a minute: training covers the first 60 % of a time split, and all of the other.
    since = 1_600_000_000 + 60 * (300 * (0.6 if split == "global_time" else 1.0) * 0.75)
    low, high = np.zeros(13, int), np.zeros(13, int)
    rows = [row for shard in range(4) for row in timed_dataset.read_shard(shard).to_pylist()]
    for row, end in zip(rows, splits.train_end, strict=True):
        for item, time in list(zip(row["items"], row["times"], strict=True))[:end]:
            low[item] += time >= since + 120
            high[item] += time >= since - 120
    assert (low <= found).all()
    assert (found <= high).all()
    assert high.sum() - low.sum() <= 4


def test_the_protocol_says_what_the_numbers_mean(
    histories: Histories, timed_dataset: Dataset, cache_dir: Path
):
    protocol = evaluator(histories).protocol()
    assert protocol["split"] == "leave_one_out"
    assert protocol["filter_seen"] is True
    assert protocol["ties"] == "none"
    assert protocol["leak"] == "unknown: the data has no times"
    held = Histories(timed_dataset, cache_dir)
    assert evaluator(held, items=12).protocol()["leak"].startswith("training events of some users are later")
    timed = evaluator(held, items=12, evaluation__split="global_time").protocol()
    assert timed["leak"] == "none"
    assert (timed["validation_from"], timed["test_from"]) == time_cuts(held, tiny.config().evaluation)


def test_nobody_to_ask_is_refused(histories: Histories):
    config = tiny.config(**CONFIG)
    nobody = one_each(np.full(histories.users, NONE))
    model, _, _ = tiny.bstm(ITEMS)
    with pytest.raises(DataError, match="no user has a test target; a user needs three events or more"):
        Evaluator(
            histories, Splits(histories.lengths, nobody, nobody), "test", model, config, tiny.mesh(1, 1, 1)
        )


def test_recent_popularity_counts_before_the_moments_that_are_named(timed_dataset: Dataset, cache_dir: Path):
    held = Histories(timed_dataset, cache_dir)
    first = 1_600_000_000
    # One event a minute: validation from the 150th on, and the last tenth of what comes before is recent.
    moments = {"evaluation__validation_from": first + 150 * 60, "evaluation__test_from": first + 200 * 60}
    config = tiny.config(evaluation__split="global_time", evaluation__recent=0.1, **moments)
    counts = popularity_counts(held, make_splits(held, config), config)
    assert counts["popularity"].sum() == 150
    assert abs(int(counts["recent_popularity"].sum()) - 15) <= 1
