"""Baselines against the same numbers by another route, written out over a log of a few users."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.pipeline import make_splits
from dynrec_jax.evaluate.baselines import ease as ease_module
from dynrec_jax.evaluate.baselines import item_knn as knn
from dynrec_jax.evaluate.baselines import lstm as lstm_module
from dynrec_jax.evaluate.baselines.content import tf_idf
from dynrec_jax.evaluate.baselines.known import BASELINES
from dynrec_jax.evaluate.baselines.learned import Learning, Unable, lists_of, top
from dynrec_jax.evaluate.comparison import chosen_setting
from dynrec_jax.evaluate.evaluator import Evaluator

from .. import tiny
from ..invariants.test_split_leak import poisoned


@pytest.fixture(scope="module")
def learning(timed_dataset: Dataset, cache_dir: Path) -> Learning:
    held = Histories(timed_dataset, cache_dir)
    config = tiny.config()
    return Learning(held, make_splits(held, config), config)


def trained_histories(learning: Learning) -> list[tuple[list[int], list[int]]]:
    """Items and times of the training events of each user, read from the Parquet."""
    dataset = learning.histories.dataset
    rows = [row for shard in range(dataset.shards) for row in dataset.read_shard(shard).to_pylist()]
    ends = learning.splits.train_end.tolist()
    return [(row["items"][:end], row["times"][:end]) for row, end in zip(rows, ends, strict=True)]


def scores(scorer: Any, learning: Learning, ends: np.ndarray | None = None) -> np.ndarray:
    """Of all users, from their training events where no other ends are given."""
    users = np.arange(learning.histories.users)
    return np.asarray(scorer(learning.histories, users, learning.splits.train_end if ends is None else ends))


@pytest.mark.parametrize("k", [1, 3, 7, 12])
def test_the_best_are_those_of_a_stable_sort(k: int):
    values = np.random.default_rng(0).integers(0, 4, (50, 12)).astype(float)
    values[:, 3] = -np.inf
    assert np.array_equal(top(values, k), np.argsort(-values, axis=1, kind="stable")[:, :k])


def test_popularity_is_that_of_evaluation(learning: Learning):
    model = tiny.bstm(learning.items)[0]
    evaluator = Evaluator(
        learning.histories, learning.splits, "test", model, learning.config, tiny.mesh(1, 1, 1)
    )
    (scorer,) = BASELINES["popularity"](learning).values()
    lists = lists_of(scorer, learning.items, evaluator.recommender.k, True)
    assert evaluator.metrics_of(lists) == evaluator.baselines()["popularity"]


def test_what_was_taken_last_comes_first_and_then_what_is_popular(learning: Learning):
    (scorer,) = BASELINES["repeat_last"](learning).values()
    counts = learning.histories.item_counts(learning.splits.train_end)[1:]
    for (items, _), found in zip(trained_histories(learning), scores(scorer, learning), strict=True):
        last_first = list(dict.fromkeys(reversed(items)))
        rest = [i for i in np.argsort(-counts, kind="stable") + 1 if i not in last_first]
        assert (top(found[None], learning.items)[0] + 1).tolist() == last_first + rest


def test_neighbours_are_pairs_of_events_near_each_other(learning: Learning, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knn, "NEAR", 4)
    followed = np.zeros((learning.items + 1,) * 2)
    counts = np.zeros(learning.items + 1)
    for items, times in trained_histories(learning):
        for b, (second, late) in enumerate(zip(items, times, strict=True)):
            counts[second] += 1
            for a in range(max(0, b - knn.NEAR), b):
                if items[a] != second:
                    followed[items[a], second] += 0.5 ** ((late - times[a]) / knn.HALF_LIFE) / (b - a)
    scale = np.sqrt(np.outer(counts + knn.SHRINK, counts + knn.SHRINK))
    kinds = {"what followed": followed / scale, "what was near": (followed + followed.T) / scale}
    found = BASELINES["item_knn"](learning)
    assert set(found) == {f"{name}, ago^-{p:g}" for name in kinds for p in knn.POWERS}
    for name, similar in kinds.items():
        expected = [
            sum((similar[i, 1:] / ago for ago, i in enumerate(items[::-1][:4], 1)), np.zeros(learning.items))
            for items, _ in trained_histories(learning)
        ]
        np.testing.assert_allclose(
            scores(found[f"{name}, ago^-1"], learning), expected, rtol=1e-9, atol=1e-12
        )


def test_ease_is_a_ridge_regression_of_each_item_on_the_others(learning: Learning):
    taken = np.zeros((learning.histories.users, learning.items))
    for user, (items, _) in enumerate(trained_histories(learning)):
        taken[user, np.array(items, int) - 1] = 1.0
    found = BASELINES["ease"](learning)["lambda=50"]
    weights = np.zeros((learning.items,) * 2)
    for item in range(learning.items):
        others = np.delete(np.arange(learning.items), item)
        gram = taken[:, others].T @ taken[:, others] + 50.0 * np.eye(len(others))
        weights[others, item] = np.linalg.solve(gram, taken[:, others].T @ taken[:, item])
    np.testing.assert_allclose(scores(found, learning), taken @ weights, rtol=1e-4, atol=1e-5)


def test_ease_and_content_say_what_they_cannot_do(learning: Learning, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ease_module, "MOST", 5)
    with pytest.raises(Unable, match="a dense matrix of 12 items; 5 at most"):
        BASELINES["ease"](learning)
    with pytest.raises(Unable, match="neither text nor attributes"):
        BASELINES["content"](learning)


class Described:
    """Three items with a text and a set."""

    items = 3

    @property
    def item_column_kinds(self) -> dict[str, str]:
        return {"title": "text", "tags": "set", "picture": "vector"}

    def items_table(self) -> pa.Table:
        titles, tags = ["Red shoe, red", "Blue shoe", None], [["a b"], None, ["a b", "c"]]
        return pa.table({"index": [1, 2, 3], "title": titles, "tags": tags, "picture": [[1.0], [2.0], [3.0]]})


def test_words_weigh_by_how_rare_they_are():
    found = tf_idf(Described()).toarray()  # type: ignore[arg-type]
    rare, common = math.log(3 / 1), math.log(3 / 2)
    # In the order of their first appearance: red, shoe, tags=a b; blue; tags=c.
    expected = np.array(
        [
            [(1 + math.log(2)) * rare, common, common, 0, 0],
            [0, common, 0, rare, 0],
            [0, 0, common, 0, rare],
        ]
    )
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-12)


def test_an_lstm_is_its_equations_and_reads_one_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lstm_module, "POOLED", 3)
    params = jax.tree.map(np.asarray, lstm_module._fresh(jax.random.key(0), 9))
    items = np.array([[3, 8, 1, 5]])
    x, (h, c) = params["embedding"][items[0]], np.zeros((2, lstm_module.DIM))
    outputs: list[np.ndarray] = []
    expected: list[np.ndarray] = []
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731 # as in the paper
    for t in range(4):
        gates = x[t] @ params["user_in"] + h @ params["user_back"] + params["user_bias"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
        expected.append(np.mean(outputs[-3:], axis=0))
    found = jax.jit(lstm_module._users)(params, jnp.asarray(items))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def test_the_lstm_learns_what_is_taken_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning: Learning
):
    monkeypatch.setattr(lstm_module, "EPOCHS", 300)
    told: list[str] = []
    held = learning.histories
    # A log in which the next item follows from the last: the oldest events of everybody, one after the other.
    cycle = np.tile(np.arange(1, learning.items + 1), 3)

    class Cycles:
        users, dataset, lengths = held.users, held.dataset, np.full(held.users, 20)

        def last_items(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
            rows = [
                cycle[u % 5 :][max(e - size, 0) : e] if u >= 0 else []
                for u, e in zip(users_B, ends_B, strict=True)
            ]
            return np.array([np.pad(row, (0, size - len(row))) for row in rows], np.int32)

    splits = learning.splits._replace(train_end=np.full(held.users, 9))
    made = Learning(Cycles(), splits, learning.config, told.append)  # type: ignore[arg-type]
    (scorer,) = BASELINES["lstm"](made).values()
    users, ends = np.arange(held.users), np.full(held.users, 7)
    targets = np.array([cycle[u % 5 + 7] for u in users], np.int32)
    found = scorer(made.histories, users, ends)
    assert ((found.argmax(axis=1) + 1) == targets).mean() > 0.9
    assert scorer.accuracy(made.histories, users, ends, targets) > 0.9  # type: ignore[attr-defined]
    assert told[-1].startswith("lstm: epoch 300 of 300, loss ")


@pytest.mark.parametrize("name", ["popularity", "recent_popularity", "repeat_last", "item_knn", "ease"])
def test_nothing_is_learnt_from_what_is_asked_for(name: str, learning: Learning):
    """Other events from the end of training on: the same scores from the same histories."""
    changed = Histories.__new__(Histories)
    changed.__dict__.update(learning.histories.__dict__)
    batches = []
    first = 0
    for batch in learning.histories._batches:
        ends = learning.splits.train_end[first : first + batch.num_rows]
        first += batch.num_rows
        rows = [
            {**row, "items": [i if n < end else 1 for n, i in enumerate(row["items"])]}
            for row, end in zip(batch.to_pylist(), ends, strict=True)
        ]
        batches.append(pa.RecordBatch.from_pylist(rows, schema=batch.schema))
    changed._batches = batches
    other = Learning(changed, learning.splits, learning.config)
    for setting, scorer in BASELINES[name](learning).items():
        again = BASELINES[name](other)[setting]
        np.testing.assert_array_equal(scores(scorer, learning), scores(again, learning))


def test_the_lstm_learns_nothing_from_what_is_asked_for(learning: Learning, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lstm_module, "EPOCHS", 1)
    late = poisoned(learning.histories, learning.splits.train_end)
    found = [
        next(iter(BASELINES["lstm"](Learning(source, learning.splits, learning.config)).values()))
        for source in (learning.histories, late)
    ]
    np.testing.assert_array_equal(*(scores(scorer, learning) for scorer in found))


def test_validation_chooses_the_setting_and_not_the_test(learning: Learning):
    """Of two scorers, one knows the validation's targets and one the test's."""
    model = tiny.bstm(learning.items)[0]
    test, validation = (
        Evaluator(learning.histories, learning.splits, which, model, learning.config, tiny.mesh(1, 1, 1))
        for which in ("test", "validation")
    )

    def knowing(evaluator: Evaluator) -> Any:
        target = dict(zip(evaluator.users_U.tolist(), evaluator.targets_U.tolist(), strict=True))
        return lambda source, users_B, ends_B: np.array(
            [np.arange(1, learning.items + 1) == target[user] for user in users_B.tolist()], float
        )

    scorers = {"knows the test": knowing(test), "knows validation": knowing(validation)}
    assert chosen_setting(scorers, learning, validation) == "knows validation"
    assert chosen_setting(scorers, learning, None) == "knows the test", "the first, where nobody is asked"
