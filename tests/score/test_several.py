"""Runs that recommend together: lists are by the mean of all their scores, in `score` and in `evaluate` alike."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.new_items import NewItems
from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.processes import Processes
from dynrec_jax.score import job, queries
from dynrec_jax.score.options import ScoreOptions
from dynrec_jax.score.several import open_together

from ..commands import Made, a_shard_each, dynrec, make, one_line, small_run

ITEMS = 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """Two runs of the same data: the second of another seed, told times and when a list is asked for."""
    folder = tmp_path_factory.mktemp("several")
    small = small_run(tmp_path_factory)
    first = small._replace(workdir=folder / "first")
    shutil.copytree(small.workdir, first.workdir, ignore=shutil.ignore_patterns("evaluation"))
    (folder / "other").mkdir()
    other = make(
        folder / "other",
        seed=1,
        train__steps=2,
        train__checkpoint_every=1,
        train__evaluate_every=0,
        model__time=("bias",),
        model__query_time=True,
    )
    return first, other


def frame(made: Made, out: Path, *switches: str, **flags: Any) -> pd.DataFrame:
    assert dynrec("score", *switches, workdir=made.workdir, out=out, **flags) == 0
    return pd.read_parquet(out).set_index("user_id")


def assert_joined(together: pd.DataFrame, alone: list[pd.DataFrame], shown: pd.DataFrame | None = None):
    """By whole lists of each: `together` has the best of their mean, of the items that `shown` has."""
    assert list(together.index) == list(alone[0].index)
    for user, row in together.iterrows():
        mean = sum(
            pd.Series(each.loc[user, "scores"], index=each.loc[user, "item_ids"], dtype=np.float64)
            for each in alone
        ) / len(alone)  # fmt: skip
        if shown is not None:
            mean = mean[list(shown.loc[user, "item_ids"])]
        best = sorted(mean.items(), key=lambda pair: (-np.float32(pair[1]), pair[0]))[: len(row["item_ids"])]
        assert list(row["item_ids"]) == [item for item, _ in best]
        np.testing.assert_allclose(row["scores"], [value for _, value in best], rtol=1e-5, atol=1e-6)


def test_lists_are_by_the_mean_of_all_scores_and_metrics_are_those_of_the_lists(
    runs: tuple[Made, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(queries, "groups", a_shard_each)  # several parts
    a, b = runs
    flags = {"split": "test"}
    together = frame(a, tmp_path / "ab", "filter_seen", k=10, **flags, **{"with": b.workdir})
    # Every item that each offers, by other commands: the joined list is a sum of columns.
    alone = [frame(made, tmp_path / name, k=ITEMS, **flags) for made, name in ((a, "a"), (b, "b"))]
    shown = frame(a, tmp_path / "shown", "filter_seen", k=ITEMS, **flags)
    assert_joined(together, alone, shown)
    first = [list(row[:10]) for row in shown.loc[together.index, "item_ids"]]
    assert np.mean([list(row) != own for row, own in zip(together["item_ids"], first, strict=True)]) > 0.5

    assert dynrec("evaluate", workdir=a.workdir) == 0
    own = (a.workdir / "evaluation" / "test.json").read_bytes()
    assert dynrec("evaluate", workdir=a.workdir, **{"with": b.workdir}) == 0
    result = json.loads((a.workdir / "evaluation" / "test_together.json").read_text())
    assert (a.workdir / "evaluation" / "test.json").read_bytes() == own, "the run's own numbers stay"
    assert result["together"] == [
        {"workdir": str(a.workdir), "step": 6, "seed": 0},
        {"workdir": str(b.workdir), "step": 2, "seed": 1},
    ]
    assert result["protocol"]["query_time"] is True, "one of them is told"
    data = pd.read_parquet(a.dataset / "interactions").set_index("user_id")
    ids = pd.read_parquet(a.dataset / "items").set_index("index")["item_id"]
    targets = [ids[data.loc[user, "items"][-1]] for user in together.index]
    ranks = [
        list(row).index(target) + 1 if target in row else np.inf
        for row, target in zip(together["item_ids"], targets, strict=True)
    ]
    assert result["recall@10"] == pytest.approx(np.isfinite(ranks).mean(), abs=1e-9)
    assert result["ndcg@10"] == pytest.approx((1 / np.log2(np.array(ranks) + 1)).mean(), abs=1e-9)


@pytest.mark.slow
def test_compressed_runs_recommend_together(runs: tuple[Made, Made], tmp_path: Path):
    """By tables that offer all items, lists are those of the runs as they are; by encoders, those of such encoders."""
    a, b = runs
    flags, other = {"split": "test", "k": ITEMS}, {"with": b.workdir}
    plain = frame(a, tmp_path / "plain", **flags, **other)
    by_table = frame(a, tmp_path / "table", table="int8", **flags, **other)
    small = {"encoder": "int8", "prune": 0.3}
    alone = [frame(made, tmp_path / made.workdir.name, **small, **flags) for made in runs]
    together = frame(a, tmp_path / "encoder", **small, **flags, **other)
    assert_joined(together, alone)
    assert list(by_table.index) == list(plain.index) == list(together.index)
    for user, row in plain.iterrows():
        np.testing.assert_allclose(by_table.loc[user, "scores"], row["scores"], rtol=1e-4, atol=1e-5)
    moved = [abs(x - y).max() for x, y in zip(plain["scores"], together["scores"], strict=True)]
    assert max(moved) > 1e-3


def test_moments_checkpoints_and_users_are_those_of_all_runs(
    runs: tuple[Made, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The second run alone looks at times, and has a first and a second step."""
    a, b = runs
    moment = {"at": "2026-01-31"}
    together = frame(a, tmp_path / "ab", k=5, step="last", **moment, **{"with": b.workdir})
    alone = [
        frame(a, tmp_path / "a", k=ITEMS, step="last"),
        frame(b, tmp_path / "b", k=ITEMS, step="last", **moment),
    ]
    assert_joined(together, alone)
    users = {"users": tmp_path / "users.parquet", "out": tmp_path / "of_users"}
    pd.DataFrame({"user_id": ["new"], "item_ids": [list(together["item_ids"].iloc[0])]}).to_parquet(
        users["users"]
    )
    capsys.readouterr()
    assert dynrec("score", workdir=a.workdir, **users, **{"with": b.workdir}) == 2
    assert "has no times, and the model looks at them" in one_line(capsys)
    assert dynrec("score", workdir=a.workdir, **users) == 0, "the first run alone needs none"
    capsys.readouterr()
    assert dynrec("evaluate", workdir=a.workdir, step=3, **{"with": b.workdir}) == 2
    assert str(b.workdir) in one_line(capsys), "of these, the second has no step 3"


def test_a_job_of_other_runs_is_another_job(runs: tuple[Made, Made], tmp_path: Path, capsys):
    a, b = runs
    frame(a, tmp_path / "out", k=5, split="test", **{"with": b.workdir})
    assert [each["step"] for each in json.loads((tmp_path / "out" / "_score.json").read_text())["with"]] == [
        2
    ]
    capsys.readouterr()
    assert dynrec("score", workdir=a.workdir, out=tmp_path / "out", split="test", k=5) == 2
    assert "with" in one_line(capsys)


def test_a_job_of_other_new_items_is_another_job_whichever_run_reads_them(runs: tuple[Made, Made]):
    """Each run keeps those columns of the file of new items that it reads."""
    opened = open_together([made.workdir for made in runs])

    def manifest(*colours: str) -> dict[str, Any]:
        tables = [pa.table({"item_id": ["new"], "colour": [colour]}) for colour in colours]
        given = [
            dataclasses.replace(run, new=NewItems(table, 0, 0, 0))
            for run, table in zip(opened, tables, strict=True)
        ]
        return job._manifest(given, ScoreOptions(), ["one", "two"])

    assert manifest("red", "blue") == manifest("red", "blue")
    assert manifest("red", "blue") != manifest("red", "green")
    assert manifest("red", "blue") != manifest("pink", "blue")


def test_every_run_is_opened_with_the_same_step_items_and_dataset(
    runs: tuple[Made, Made], monkeypatch: pytest.MonkeyPatch
):
    first, other = (made.workdir for made in runs)
    opened = workdirs.open(first)
    calls = []

    def opens(path: Path, *given: Any) -> workdirs.Run:
        calls.append((path, *given))
        return opened

    monkeypatch.setattr(workdirs, "open", opens)
    open_together([first, other], 2, None, items="new.csv")
    (_, step, place, processes, items, say), again = calls
    assert (step, place, items) == (2, None, "new.csv")
    assert again == (other, 2, opened.dataset.path, processes, "new.csv", say), (
        "the dataset lies where the first one's does"
    )
    calls.clear()
    open_together([first, other], "last", "moved")
    assert [call[2] for call in calls] == ["moved", "moved"]


def test_processes_with_other_runs_are_told_before_they_wait_for_each_other(runs: tuple[Made, Made]):
    class Peer:
        """The other process, which was started without `--with`."""

        def receive(self) -> Any:
            return {"--with": []}

        def send(self, values: Any) -> None:
            pass

    with pytest.raises(ConfigError, match=r"the processes differ: --with is .* and \[\] in process 1"):
        open_together([made.workdir for made in runs], processes=Processes(0, 2, [Peer()]))


@pytest.mark.parametrize(
    ("verb", "given", "told"),
    [
        ("evaluate", {"with": "{b},"}, "expected run folders with a comma between two"),
        ("evaluate", {"with": "{b},{b}"}, "is named twice"),
        ("score", {"with": "{a}/../{a.name}"}, "is named twice"),
        ("score", {"with": "{b},nowhere"}, "nowhere: no such folder"),
        ("evaluate", {"with": "{b}", "drift": "true"}, "--drift: is of one run; leave --with out"),
        ("evaluate", {"with": "{b}", "prequential": 2}, "--prequential: is of one run; leave --with out"),
    ],
)
def test_mistakes_get_one_line(
    runs: tuple[Made, Made], tmp_path: Path, capsys, verb: str, given: dict[str, Any], told: str
):
    a, b = runs
    flags = {name: str(value).format(a=a.workdir, b=b.workdir) for name, value in given.items()}
    if verb == "score":
        flags["out"] = tmp_path / "out"
    capsys.readouterr()
    assert dynrec(verb, workdir=a.workdir, **flags) == 2
    assert told in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_data_or_trained_for_other_queries_are_refused(
    runs: tuple[Made, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before anything is opened: the folder has no checkpoint."""
    a, b = runs
    other = tmp_path / "other"
    other.mkdir()
    record = json.loads((b.workdir / "run.json").read_text())
    config = json.loads((b.workdir / "config.json").read_text())

    def refused() -> str:
        (other / "run.json").write_text(json.dumps(record))
        (other / "config.json").write_text(json.dumps(config))
        capsys.readouterr()
        assert dynrec("evaluate", workdir=a.workdir, **{"with": other}) == 2
        return one_line(capsys)

    config["evaluation"]["filter_seen"] = False
    assert "checkpoint" in refused(), "whether seen items are shown is not for training to say"
    config["evaluation"]["holdout"] = 0.5
    assert "evaluation.holdout is 0.5" in refused()
    record["dataset"]["content"] = "0" * 64
    assert "was trained on another dataset than" in refused()
