"""What is explained is what `score` recommends; who asks for what is not there is told what is."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.titles import titles
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.explain import Explainer, explain
from dynrec_jax.explain import explainer as module
from dynrec_jax.explain.explainer import chosen
from dynrec_jax.workdir import Run

from ..commands import Made, dynrec, small_run
from ..export.runs import recommended, untrained

MODELS: dict[str, dict[str, Any]] = {
    "ensemble": {"item__fusion": "ensemble", "item__attributes": ("a",), "model__normalise": True},
    "both": {"item__fusion": "both", "item__attributes": ("a",), "model__hops": 2, "model__shrinkage": 2.0},
    "interests": {"model__interests": 3, "model__scan_layers": True, "model__neighbours": 0.5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_run(tmp_path_factory)


@pytest.fixture(scope="module")
def run(made: Made) -> Run:
    return workdirs.open(made.workdir)


@pytest.fixture(scope="module")
def explainer(run: Run) -> Explainer:
    return Explainer(run)


def lists(made: Made, folder: Any, split: str) -> pd.DataFrame:
    assert dynrec("score", "filter_seen", workdir=made.workdir, out=folder, split=split, k=5) == 0
    return pd.read_parquet(folder).set_index("user_id")


@pytest.mark.parametrize("split", [pytest.param("all", marks=pytest.mark.slow), "test"])
def test_the_best_recommendation_is_explained_with_its_served_score(split, made, run, explainer, tmp_path):
    served = lists(made, tmp_path / "out", split)
    asked = explainer if split == "all" else Explainer(run, split)
    for user in served.index[:3]:
        best = asked.explain(user, method="deletion")
        assert best.item == served.loc[user, "item_ids"][0]
        assert best.score == pytest.approx(served.loc[user, "scores"][0], rel=1e-4, abs=1e-5)
        assert (best.rank, best.seen) == (1, False)
        third = asked.explain(user, served.loc[user, "item_ids"][2], method="deletion")
        assert third.score == pytest.approx(served.loc[user, "scores"][2], rel=1e-4, abs=1e-5)
        assert third.rank == 3


def test_events_are_those_of_the_history_and_add_up(run, explainer):
    stored = Histories(run.dataset, run.config.data.cache_dir)
    number = int(np.argmax(stored.lengths))
    user, length = stored.ids_of(np.array([number]))[0], int(stored.lengths[number])
    windows = stored.windows(np.array([number]), np.array([length]), 8)
    ids = run.dataset.item_ids().to_pylist()
    for method in ("exact", "gradients", "deletion"):
        found = explainer.explain(user, method=method)
        assert found.method == method
        assert found.unread == length - 8
        events = sorted(found.events, key=lambda event: event.position)
        assert [event.position for event in events] == list(range(length - 7, length + 1))
        assert [event.item_id for event in events] == [ids[i - 1] for i in windows.items[0]]
        seconds = windows.times[0].astype(np.int64) + run.dataset.first_time
        assert [event.time for event in events] == seconds.tolist()
        assert all(event.title for event in events)
        shares = [event.share for event in found.events]
        assert shares == sorted(shares, reverse=True)
        assert found.baseline + sum(shares) + found.residual == pytest.approx(found.score)
        assert sum(abs(event.percent) for event in found.events) == pytest.approx(100)
        shown = found.as_dict(3)
        assert len(shown["events"]) == 3
        assert shown["rest"] == pytest.approx(sum(shares[3:]))
        if method == "exact":
            assert abs(found.residual) < 1e-5
            assert explainer.explain(user).method == "exact"  # auto: it is short enough
            assert [event.share for event in explainer.explain(user).events] == shares


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_any_model_is_explained_as_it_is_served(
    name: str, tiny_dataset: Dataset, histories: Histories, cache_dir: Path
):
    run = untrained(tiny_dataset, **MODELS[name])
    served = recommended(run, histories, 3, True)
    explainer, ids = Explainer(run, cache_dir=str(cache_dir)), run.item_ids.to_pylist()
    for user, place in itertools.product((5, 14), (0, 2)):
        name, item = histories.ids_of(np.array([user]))[0], ids[served.ids[user, place] - 1]
        for method in ("gradients", "deletion"):
            found = explainer.explain(name, item, method, steps=256)
            assert found.score == pytest.approx(served.scores[user, place], rel=1e-5, abs=1e-5)
            assert (found.rank, found.seen) == (place + 1, False)
            if method == "gradients":
                assert abs(found.residual) < 2e-3
        assert explainer.explain(name).item == ids[served.ids[user, 0] - 1]


def test_an_item_of_the_history_is_explained_and_said_to_be_one(run, explainer, monkeypatch):
    # One whose programs are compiled.
    monkeypatch.setattr(module, "Explainer", lambda *given: explainer if given == (run, "all", "") else None)
    stored = Histories(run.dataset, run.config.data.cache_dir)
    user = stored.ids_of(np.array([0]))[0]
    item = run.dataset.item_ids()[int(stored.item_at(np.array([0]), np.array([0]))[0]) - 1].as_py()
    assert explain(run, user, item, method="gradients", steps=4).seen
    assert not explainer.explain(user, method="gradients", steps=4).seen


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"user": "u000001x"}, r"user 'u000001x': is none of the 60 users of .*; the closest id is 'u"),
        ({"user": "☃"}, r"user '☃': is none of the 60 users of .*; ids are such as '"),
        ({"item": "nothing"}, r"item 'nothing': is none of the 32 items"),
        ({"method": "guess"}, r"method 'guess': expected one of auto, exact, gradients, deletion"),
        ({"steps": 0}, r"steps 0: expected 1 or more"),
    ],
)
def test_what_is_not_there_is_named(asked, message, run, explainer):
    user = explainer.histories.ids_of(np.array([0]))[0]
    with pytest.raises((DataError, ConfigError), match=message):
        explainer.explain(**{"user": user, **asked})


def test_nobody_is_explained_without_a_history(explainer, monkeypatch):
    user = explainer.histories.ids_of(np.array([4]))[0]
    for end, message in ((0, "has no event before"), (-1, "has no all target")):
        ends = explainer.ends_U.copy()
        ends[4] = end
        monkeypatch.setattr(explainer, "ends_U", ends)
        with pytest.raises(DataError, match=f"user {user!r}: {message}"):
            explainer.explain(user)


def test_a_split_of_several_targets_is_refused(run):
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluation.split, config.evaluation.targets = "global_time", "all"
    with pytest.raises(ConfigError, match=r"--split=test: .* asks a user for several events"):
        Explainer(dataclasses.replace(run, config=config), "test")


def test_auto_is_by_length():
    assert [chosen("auto", n) for n in (1, 10, 11, 512, 513)] == [
        "exact", "exact", "deletion", "deletion", "gradients",
    ]  # fmt: skip
    assert chosen("gradients", 3) == "gradients"
    with pytest.raises(ConfigError, match=r"--method=exact: .* reads 11, more than 10"):
        chosen("exact", 11)


def test_titles_are_those_of_the_column_that_says_so():
    table = pa.table({"brand_name": ["x", "y", "z"], "Title": ["a", None, ""], "vector": [[1.0]] * 3})
    kinds = {"brand_name": "text", "Title": "text", "vector": "vector"}
    dataset: Any = SimpleNamespace(items=3, item_column_kinds=kinds, items_table=lambda: table)
    assert titles(dataset, [3, 1, 2, 4]) == [None, "a", None, None]
    dataset.item_column_kinds = {"vector": "vector"}
    assert titles(dataset, [1]) == [None]
