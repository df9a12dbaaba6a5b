"""`dynrec evaluate --prequential`: each period is scored before it is learnt from, three ways side by side."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.config import from_json
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.pipeline import make_splits, time_cuts
from dynrec_jax.evaluate.recommender import Recommender

from .commands import Made, dynrec, make, one_line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("walk")
    protocol = {"evaluation__split": "global_time", "evaluation__holdout": 0.2}
    return make(folder, "synthetic:users=60,items=32,seed=0", **protocol)


def test_periods_cover_the_time_after_training_and_learn_from_what_came_before(
    run: Made, tmp_path: Path, capsys
):
    workdir = tmp_path / "workdir"
    shutil.copytree(run.workdir, workdir)
    assert dynrec("evaluate", workdir=workdir, dataset=run.dataset, prequential=2) == 0
    assert "frozen" in capsys.readouterr().out
    result = json.loads((workdir / "evaluation" / "prequential.json").read_text())
    first, second = result["periods"]
    opened = workdirs.open(workdir, dataset=run.dataset)
    held = Histories(opened.dataset, opened.config.data.cache_dir)
    validation, test = time_cuts(held, opened.config.evaluation)
    assert first["from"] == test
    assert first["until"] == second["from"]
    rows = [
        row for shard in range(opened.dataset.shards) for row in opened.dataset.read_shard(shard).to_pylist()
    ]
    late = [t for row in rows for t in row["times"] if t >= test]
    assert second["until"] == max(late) + 1
    assert abs(sum(t < first["until"] for t in late) - len(late) / 2) <= 1
    # Every event of a period that its user has one before.
    for period in (first, second):
        inside = [
            n
            for row in rows
            for n, t in enumerate(row["times"])
            if period["from"] <= t < period["until"] and n > 0
        ]
        assert period["queries"] == len(inside)
        for name in ("frozen", "appended", "retrained"):
            value = period[name]["ndcg@10"]
            assert 0 <= value["low"] <= value["mean"] <= value["high"]
    assert first["retrained"] == first["appended"], "nothing came between"
    config = from_json(workdir / "prequential" / "2-1" / "config.json")
    assert (config.evaluation.test_from, config.evaluation.validation_from) == (
        second["from"],
        second["from"] - (test - validation),
    )
    splits = make_splits(held, config)
    for row, end in zip(rows, splits.train_end.tolist(), strict=True):
        assert all(t < second["from"] for t in row["times"][:end])
    assert (workdir / "evaluation" / "prequential.png").stat().st_size > 1_000
    assert result["protocol"]["targets"] == "all"
    # The second period by another route: lists of each event, with the history as the way has it.
    again = workdirs.open(workdir / "prequential" / "2-1", dataset=run.dataset)
    before_test = held.count_before(test)
    asked = [
        (user, n)
        for user, row in enumerate(rows)
        for n, t in enumerate(row["times"])
        if second["from"] <= t < second["until"] and n > 0
    ]
    ways = {
        "frozen": (opened, [before_test[u] for u, _ in asked]),
        "appended": (opened, [n for _, n in asked]),
    }
    ways["retrained"] = (again, ways["appended"][1])
    for name, (of, ends) in ways.items():
        recommender = Recommender(of.model, of.mesh, 16, 20, True, items=of.items)
        lists = recommender.prepare(of.params, of.tables)
        made = lists(held, np.array([u for u, _ in asked]), np.array(ends, np.int64))
        gains = [
            1 / np.log2(ids.index(rows[user]["items"][n]) + 2) if rows[user]["items"][n] in ids[:10] else 0.0
            for ids, (user, n) in zip(made.ids.tolist(), asked, strict=True)
        ]
        assert second[name]["ndcg@10"]["mean"] == pytest.approx(np.mean(gains), abs=1e-9), name


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prequential": 100_000}, "events come after the test's moment"),
        ({"prequential": 2, "split": "validation"}, "leave --drift and --split out"),
    ],
)
def test_what_cannot_be_walked_through_is_refused(run: Made, capsys, values: dict[str, object], told: str):
    capsys.readouterr()
    assert dynrec("evaluate", workdir=run.workdir, **values) == 2
    assert told in one_line(capsys)


def test_a_split_without_moments_is_refused(tmp_path: Path, capsys):
    from .commands import experiment

    assert (
        dynrec("prepare", source="synthetic:users=40,items=30,seed=0", out=tmp_path / "data", shards=4) == 0
    )
    config = experiment(tmp_path / "e.py", tmp_path / "data", train__steps=1)
    assert dynrec("train", config=config, workdir=tmp_path / "run") == 0
    capsys.readouterr()
    assert dynrec("evaluate", workdir=tmp_path / "run", prequential=2) == 2
    assert "train with global_time" in one_line(capsys)
