"""The measure of faithfulness, on a score that is known to be a sum."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dynrec_jax.errors import DataError
from dynrec_jax.explain import faithful
from dynrec_jax.explain.faithful import faithfulness
from dynrec_jax.explain.methods import without
from dynrec_jax.explain.served import Past, Standing

LENGTHS = np.array([2, 6, 9, 12, 5])
READ = 8


class Sum:
    """A model whose score is the sum of what its events say; the log-probability moves half as much."""

    length = READ

    def scores(self, past: Past, kept_KxN: np.ndarray, item: int) -> np.ndarray:
        found = []
        for kept_N in kept_KxN:
            last = past.items[kept_N][-READ:]
            found.append(float((last * item).sum()))
        return np.array(found)

    def standing(self, past: Past, kept_KxN: np.ndarray, item: int, left_out: np.ndarray) -> Standing:
        score_K = self.scores(past, kept_KxN, item)
        return Standing(score_K, score_K / 2 - 9, score_K * 0 + 1, score_K * 0 + 1, score_K * 0)


def past(user: int, size: int) -> Past:
    items = np.array([0, 1, 0, 2, 5, 1, 9, 3, 4, 1, 7, 2], np.int32)[: LENGTHS[user]][-size:]
    return Past(items, items, items, 0)


def explainer(items: list[int]) -> Any:
    return SimpleNamespace(
        served=Sum(),
        ends_U=LENGTHS,
        past=past,
        best=lambda users: np.array(items)[users],
        seen=lambda user: np.zeros(0, np.int32),
    )


def test_what_is_named_loses_what_it_says_and_random_events_their_mean(monkeypatch):
    monkeypatch.setattr(faithful, "DRAWS", 4000)
    found = faithfulness(explainer([1, 2, 1, 3, 0]), 100, ["deletion"])
    assert found.users == 3  # the first has two events, and the last one all items
    named, chance, last = [], [], []
    for user, item in ((1, 2), (2, 1), (3, 3)):
        worth = past(user, 99).items * item
        whole = worth[-READ:].sum()
        first = max(len(worth) - READ, 0)

        def after(places: Any, worth: np.ndarray = worth, first: int = first) -> int:
            """The score when some of those that are read have not been."""
            return np.delete(worth, first + np.array(places, int))[-READ:].sum()

        read = min(len(worth), READ)
        by_itself = [whole - after([place]) for place in range(read)]
        named.append(whole - after(np.argsort(-np.array(by_itself), kind="stable")[:3]))
        last.append(whole - after(range(read - 3, read)))
        every = [(a, b, c) for a in range(read) for b in range(a) for c in range(b)]
        chance.append(whole - np.mean([after(places) for places in every]))
    assert found.named["deletion"]["logit"].mean == pytest.approx(np.mean(named))
    assert found.named["last events"]["logit"].mean == pytest.approx(np.mean(last))
    assert found.random["logit"].mean == pytest.approx(np.mean(chance), rel=0.05)
    assert found.ratio["deletion"]["logit"].mean == pytest.approx(np.mean(named) / np.mean(chance), rel=0.05)
    low, high = found.ratio["deletion"]["logit"][1:]
    each = np.array(named) / np.array(chance)
    assert each.min() * 0.95 < low < found.ratio["deletion"]["logit"].mean < high < each.max() * 1.05
    half = found.named["deletion"]["log-probability"].mean
    assert half == pytest.approx(np.mean(named) / 2)
    assert found.as_dict()["methods"]["deletion"]["loss"]["logit"]["mean"] == pytest.approx(np.mean(named))


def test_a_ratio_to_nothing_is_none():
    lost = np.zeros((40, 2, 2))
    lost[:, :, 1] = 1.0
    lost[:, 0, 0] = np.resize([-1.0, 1.0], 40)
    lost[:, 1, 0] = 0.5
    found = faithful._summary(lost, ["deletion"])
    assert found.ratio["deletion"]["logit"] is None
    assert found.ratio["deletion"]["log-probability"] == (2.0, 2.0, 2.0)
    assert found.as_dict()["methods"]["deletion"]["ratio"]["logit"] is None


def test_without_leaves_out_events_that_are_read():
    kept = without(past(3, 99), READ, np.array([[0, 7], [3, 4]]))
    assert kept.shape == (2, 12)
    assert [np.flatnonzero(~row).tolist() for row in kept] == [[4, 11], [7, 8]]


def test_short_histories_alone_cannot_be_measured():
    few = explainer([1] * 5)
    few.ends_U = np.array([3, 2, 4])
    with pytest.raises(DataError, match="1 users have 4 to 8 events"):
        faithfulness(few, 9, ["deletion"])


def test_users_who_have_all_items_cannot_be_measured():
    with pytest.raises(DataError, match="of 4 users, 1 have an item that is not in the history"):
        faithfulness(explainer([0, 0, 1, 0, 0]), 9, ["deletion"])
