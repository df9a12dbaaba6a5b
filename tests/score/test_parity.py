"""What `evaluate` reports is what anyone recomputes from the file of `score --split=test --filter_seen`."""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from dynrec_jax import workdir as workdirs

from ..commands import Made, dynrec, make, small_run
from ..data import reference

Histories = dict[str, list[str]]
LENGTH = 100  # of the lists that evaluation looks at


def metrics_of(frame: pd.DataFrame, histories: Histories, items: Sequence[str]) -> dict[str, float]:
    """recall, ndcg, mrr and coverage in plain pandas; a list's target is the last event of its user."""
    target = frame["user_id"].map(lambda user: histories[user][-1])
    places = [
        list(shown).index(wanted) + 1 if wanted in set(shown) else math.inf
        for shown, wanted in zip(frame["item_ids"], target, strict=True)
    ]
    rank = pd.Series(places, dtype=float)
    result = {"mrr": float((1 / rank).mean())}
    for k in (1, 5, 10, 20, 50, 100):
        if k > len(items):
            continue
        hit = rank <= k
        result[f"recall@{k}"] = float(hit.mean())
        result[f"ndcg@{k}"] = float(np.where(hit, 1 / np.log2(rank + 1), 0.0).mean())
        shown = {item for row in frame["item_ids"] for item in row[:k]}
        result[f"coverage@{k}"] = len(shown) / len(items)
    return result


def popular(counted: list[str], histories: Histories, items: Sequence[str]) -> pd.DataFrame:
    """Lists by how often an item was counted, without the items before the target; the lowest index first."""
    count = pd.Series(counted).value_counts().reindex(items, fill_value=0)
    order = count.sort_values(ascending=False, kind="stable").index.to_list()
    asked = {user: history for user, history in histories.items() if len(history) >= 3}
    shown = [[item for item in order if item not in history[:-1]][:LENGTH] for history in asked.values()]
    return pd.DataFrame({"user_id": list(asked), "item_ids": shown})


def training_events(histories: Histories) -> list[list[str]]:
    return [history[:-2] if len(history) >= 3 else history for history in histories.values()]


def same(found: dict[str, Any], expected: dict[str, float]) -> None:
    wrong = {name: (found.get(name), value) for name, value in expected.items() if found.get(name) is None
             or abs(found[name] - value) > 1e-6}  # fmt: skip
    assert wrong == {}
    missing = {name for name in found if "@" in name or name == "mrr"} - expected.keys()
    assert missing == set()


def check(made: Made, histories: Histories, out: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Runs both commands and compares; returns what evaluate wrote, and the lists."""
    items = sorted({item for history in histories.values() for item in history}, key=str.encode)
    k = min(LENGTH, len(items))
    assert dynrec("evaluate", workdir=made.workdir, split="test") == 0
    assert dynrec("score", "filter_seen", workdir=made.workdir, out=out, split="test", k=k) == 0
    result = json.loads((made.workdir / "evaluation" / "test.json").read_text())
    frame = pd.read_parquet(out)
    asked = {user: history for user, history in histories.items() if len(history) >= 3}
    assert sorted(frame["user_id"]) == sorted(asked)
    assert (result["users"], result["catalogue"]) == (len(asked), len(items))
    same(result, metrics_of(frame, histories, items))
    repeats = sum(history[-1] in history[:-1] for history in asked.values())
    assert result["protocol"]["targets_in_history"] == repeats
    assert result["protocol"]["filter_seen"] is True
    for user, shown in zip(frame["user_id"], frame["item_ids"], strict=True):
        assert not set(shown) & set(histories[user][:-1])
        assert len(shown) == min(k, len(items) - len(set(histories[user][:-1])))
    everything = [item for history in training_events(histories) for item in history]
    same(
        result["baselines"]["popularity"], metrics_of(popular(everything, histories, items), histories, items)
    )
    return result, frame


def of_dataset(path: Path) -> tuple[Histories, pd.DataFrame]:
    """Histories by user from a dataset folder, with pandas alone, and the table that they came from."""
    rows = pd.concat([pd.read_parquet(file) for file in sorted((path / "interactions").glob("*.parquet"))])
    items = pd.read_parquet(path / "items").set_index("index")["item_id"]
    return {
        user: [items[i] for i in row] for user, row in zip(rows["user_id"], rows["items"], strict=True)
    }, rows


def test_on_the_synthetic_set(tmp_path_factory, tmp_path):
    made = small_run(tmp_path_factory)
    histories, rows = of_dataset(made.dataset)
    result, _ = check(made, histories, tmp_path / "out")
    info = json.loads((made.dataset / "dataset.json").read_text())
    since = info["time_quantiles"][round(0.9 * (len(info["time_quantiles"]) - 1))]
    recent = [
        item
        for history, times in zip(histories.values(), rows["times"], strict=True)
        for item, time in list(zip(history, times, strict=True))[:-2]
        if time >= since
    ]
    items = sorted({item for history in histories.values() for item in history}, key=str.encode)
    same(
        result["baselines"]["recent_popularity"],
        metrics_of(popular(recent, histories, items), histories, items),
    )
    best = max(result["baselines"][name]["ndcg@10"] for name in result["baselines"])
    assert result["oracle"]["ndcg@10"] > best


def test_with_repeated_items(shop, histories, tmp_path):
    result, _ = check(shop, histories, tmp_path / "out")
    assert result["protocol"]["targets_in_history"] > 0
    recent = [
        item
        for history in training_events(histories)
        for item in history[len(history) - max(math.ceil(0.1 * len(history)), 1) :]
    ]
    items = sorted({item for history in histories.values() for item in history}, key=str.encode)
    same(
        result["baselines"]["recent_popularity"],
        metrics_of(popular(recent, histories, items), histories, items),
    )


@pytest.mark.parametrize("distinct", [1, 3])
def test_with_tied_scores(distinct, shop, histories, tmp_path, monkeypatch):
    """Item i has the vector of item i mod `distinct`: equal scores rank by the lowest index, and get chance."""
    opened = workdirs.open

    def tied(*arguments: Any, **named: Any) -> workdirs.Run:
        run = opened(*arguments, **named)
        name, table = next(iter(run.tables.items()))
        return dataclasses.replace(run, tables={name: table[1 + jnp.arange(len(table)) % distinct]})

    monkeypatch.setattr(workdirs, "open", tied)
    result, frame = check(shop, histories, tmp_path / "out")
    items = sorted({item for history in histories.values() for item in history}, key=str.encode)
    place = {item: i + 1 for i, item in enumerate(items)}
    for row in frame.itertuples():
        groups = pd.Series(list(row.scores)).groupby(list(row.scores), sort=False).groups
        assert len(groups) <= distinct
        for members in groups.values():
            shown = [place[row.item_ids[i]] for i in members]
            assert shown == sorted(shown)
    if distinct == 1:
        # The same list for everybody but for what they have seen: as good as a list by item index.
        by_index = popular(items, histories, items)
        same(result, metrics_of(by_index, histories, items))


@pytest.mark.slow
def test_on_movielens_100k(shared_data, tmp_path):
    source = shared_data / "ml-100k"
    sizes = {"data__max_length": 50, "model__dim": 16}
    made = make(
        tmp_path, f"atomic:{source}", shards=8, train__steps=30, train__batch_size=64,
        train__checkpoint_every=30, train__evaluate_every=30, evaluation__batch_size=128, **sizes,
    )  # fmt: skip
    log = pd.read_csv(next(source.glob("*.inter")), sep="\t", dtype=str)
    log.columns = [name.split(":")[0] for name in log.columns]
    log["time"] = log["timestamp"].astype(float)
    log = log.sort_values("time", kind="stable")
    histories = {user: rows["item_id"].to_list() for user, rows in log.groupby("user_id")}
    result, _ = check(made, histories, tmp_path / "out")
    assert result["users"] > 900


@pytest.mark.slow
def test_in_a_catalogue_whose_table_has_another_order(tmp_path):
    """More than 65,536 items and negatives by popularity: trained, evaluated, scored, the popularity baseline too."""
    rng = np.random.default_rng(0)
    items = [f"i{number:05d}" for number in rng.permutation(70_000)]
    histories = {f"u{user}": items[user * 250 : (user + 1) * 250] for user in range(280)}
    # Twenty items are popular, and some of the targets are among them.
    for number, history in enumerate(histories.values()):
        history[3] = items[-1 - number % 20]
        if number % 2:
            history[-1] = items[-1 - (number + 1) % 20]
    lines = [" ".join([user, *history]) for user, history in histories.items()]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    keys = {"loss__kind": "sampled", "loss__sampler": "popularity", "train__learning_rate": 0.03}
    made = make(tmp_path, f"sequences:{tmp_path / 'log.txt'}", **keys)
    result, _ = check(made, histories, tmp_path / "out")
    assert result["catalogue"] == len({item for history in histories.values() for item in history}) > 2**16
    assert result["baselines"]["popularity"]["recall@100"] > 0


def test_cold_items_are_measured_by_the_users_who_are_asked_for_one(tmp_path_factory, tmp_path):
    """How the run was trained is not asked here: its config alone says that some items came later."""
    run = small_run(tmp_path_factory)
    made = run._replace(workdir=tmp_path / "run")
    shutil.copytree(run.workdir, made.workdir)
    config = json.loads((made.workdir / "config.json").read_text())
    config["data"]["cold_items"] = 0.3
    (made.workdir / "config.json").write_text(json.dumps(config))
    histories, _ = of_dataset(made.dataset)
    items = sorted({item for history in histories.values() for item in history}, key=str.encode)
    cold = {items[i - 1] for i in reference.cold(len(items), 0.3)}
    assert dynrec("evaluate", workdir=made.workdir, split="test") == 0
    assert dynrec("score", "filter_seen", workdir=made.workdir, out=tmp_path / "out", split="test", k=32) == 0
    result = json.loads((made.workdir / "evaluation" / "test.json").read_text())
    frame = pd.read_parquet(tmp_path / "out")
    chosen = frame[[histories[user][-1] in cold for user in frame["user_id"]]]
    assert 3 < len(chosen) < len(frame) - 3
    assert result["cold"]["users"] == len(chosen)
    same(result["cold"], metrics_of(chosen, histories, items))
    same(result, metrics_of(frame, histories, items))
    assert result["protocol"]["cold_items"] == 0.3
    # Nobody has counted a cold item, so the lists of the most popular ones end with them, the first index first.
    counted = [item for history in training_events(histories) for item in history if item not in cold]
    same(result["baselines"]["popularity"], metrics_of(popular(counted, histories, items), histories, items))
