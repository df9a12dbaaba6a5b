"""Vectors with the ids of the source, whose products are the scores; neighbours of items; queries of other kinds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.cli import main
from dynrec_jax.data.cache import Histories
from dynrec_jax.score import queries, sections

from ..commands import Made, a_shard_each, dynrec, one_line, small_run

ITEMS = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_run(tmp_path_factory)


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queries, "groups", a_shard_each)
    monkeypatch.setattr(sections, "GROUP_ITEMS", 10)


def frame(made: Made, out: Path, index: str = "user_id", **values: Any) -> pd.DataFrame:
    assert dynrec("score", workdir=made.workdir, out=out, **values) == 0
    return pd.read_parquet(out).set_index(index)


def test_products_of_vectors_are_the_scores(made: Made, tmp_path: Path):
    scores = frame(made, tmp_path / "lists", k=ITEMS)
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "both", what="both") == 0
    users = pd.read_parquet(tmp_path / "both" / "users").set_index("user_id")["vector"]
    items = pd.read_parquet(tmp_path / "both" / "items").set_index("item_id")["vector"]
    assert len(list((tmp_path / "both" / "items").glob("part-*"))) == 4
    assert sorted(users.index) == sorted(scores.index)
    assert len(items) == ITEMS
    for user, row in scores.iterrows():
        products = np.stack(list(items[list(row["item_ids"])])) @ users[user]
        np.testing.assert_allclose(products, row["scores"], rtol=1e-4, atol=1e-5)
    for what, of in (("users", users), ("items", items)):
        alone = frame(made, tmp_path / what, index=of.index.name, what=what)["vector"]
        np.testing.assert_array_equal(np.stack(list(alone[of.index])), np.stack(list(of)))


def test_neighbours_are_by_the_cosine_of_item_vectors(made: Made, tmp_path: Path):
    items = frame(made, tmp_path / "items", index="item_id", what="items")["vector"]
    (tmp_path / "deny.txt").write_text(f"{items.index[3]}\n{items.index[17]}\n")
    found = frame(
        made, tmp_path / "near", index="item_id", what="neighbours", k=5, deny=tmp_path / "deny.txt"
    )
    unit = np.stack(list(items))
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = pd.DataFrame(unit @ unit.T, index=items.index, columns=items.index)
    assert list(found.index) == list(items.index)  # what may not be recommended has neighbours too
    for item, row in found.iterrows():
        others = cosine.loc[item].drop([item, items.index[3], items.index[17]], errors="ignore")
        best = others.sort_values(ascending=False, kind="stable")[:5]
        assert list(row["item_ids"]) == list(best.index)
        np.testing.assert_allclose(row["scores"], best, rtol=1e-5, atol=1e-6)


def test_histories_up_to_a_moment(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """They are those of a file that holds no later events."""
    run = workdirs.open(made.workdir)
    stored = Histories(run.dataset, tmp_path / "cache")
    users = np.arange(stored.users)
    users, items, seconds = stored.events_before(stored.lengths)
    times = seconds.astype(np.int64) + (run.dataset.first_time or 0)
    moment = int(np.quantile(times, 0.3))
    early = times < moment
    assert 0 < early.sum() < len(times)
    ids = np.array(run.item_ids.to_pylist())
    log = pd.DataFrame({"user_id": stored.ids_of(users), "item": ids[items - 1], "time": times})
    log[early].to_csv(tmp_path / "early.csv", index=False)
    log.to_csv(tmp_path / "log.csv", index=False)
    capsys.readouterr()
    found = frame(made, tmp_path / "until", k=5, until=moment)
    left = log["user_id"].nunique() - log[early]["user_id"].nunique()
    if left:
        assert f"{left} users without an event before --until left out" in capsys.readouterr().err
    expected = frame(made, tmp_path / "early", k=5, users=tmp_path / "early.csv")
    cut = frame(made, tmp_path / "cut", k=5, users=tmp_path / "log.csv", until=moment)
    for other in (expected, cut):
        assert sorted(other.index) == sorted(found.index)
        for user, row in other.iterrows():
            assert list(row["item_ids"]) == list(found.loc[user, "item_ids"])
            np.testing.assert_allclose(row["scores"], found.loc[user, "scores"], rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    first = int(times.min())
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "x", until=first - 10) == 2
    assert "before the dataset's first event" in one_line(capsys)


def test_hops_are_chosen_anew(made: Made, tmp_path: Path):
    """One hop asks with the vector and the mixture that it saw, by hand."""
    users = frame(made, tmp_path / "users", what="users")["vector"]
    items = frame(made, tmp_path / "items", index="item_id", what="items")["vector"]
    again = frame(made, tmp_path / "hop", what="users", hops=1)["vector"]
    run = workdirs.open(made.workdir)
    v, u = np.stack(list(items)), np.stack(list(users))
    weights = np.exp(u @ v.T)
    mixed = weights @ v / weights.sum(axis=1, keepdims=True)
    scale = 1 / (run.config.model.temperature * np.sqrt(2 * run.config.model.dim))
    np.testing.assert_allclose(np.stack(list(again)), u + mixed * scale, rtol=1e-4, atol=1e-5)


def test_scores_of_several_runs_are_summed_by_weights(made: Made, tmp_path: Path, capsys):
    """Of one run given as another folder too: the sum is so many times its own scores."""
    other = shutil.copytree(made.workdir, tmp_path / "other")
    alone = frame(made, tmp_path / "alone", k=7)
    flags = ["--workdir", str(made.workdir), "--workdir", str(other), "--k", "7"]
    assert main(["score", *flags, "--out", str(tmp_path / "sum"), "--weights", "2,0.5"]) == 0
    summed = pd.read_parquet(tmp_path / "sum").set_index("user_id")
    for user, row in summed.iterrows():
        np.testing.assert_allclose(row["scores"], 2.5 * alone.loc[user, "scores"], rtol=1e-4, atol=1e-5)
    for weights, told in (("1", "expected one each"), ("1,0", "above 0"), ("a,b", "numbers with commas")):
        capsys.readouterr()
        assert main(["score", *flags, "--out", str(tmp_path / "no"), f"--weights={weights}"]) == 2
        assert told in one_line(capsys)
