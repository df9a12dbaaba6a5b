"""Runs that recommend together: lists are by the mean of all their scores, in `score` and in `evaluate` alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ..commands import Made, dynrec, make, one_line, small_run

ITEMS = 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """Two runs of the same data: of another seed, and told the times of events."""
    other = make(
        tmp_path_factory.mktemp("other"),
        seed=1,
        train__steps=2,
        train__evaluate_every=0,
        model__time=("bias",),
    )
    return small_run(tmp_path_factory), other


def frame(made: Made, out: Path, *switches: str, **flags: Any) -> pd.DataFrame:
    assert dynrec("score", *switches, workdir=made.workdir, out=out, split="test", **flags) == 0
    return pd.read_parquet(out).set_index("user_id")


def test_lists_are_by_the_mean_of_all_scores_and_metrics_are_those_of_the_lists(
    runs: tuple[Made, Made], tmp_path: Path
):
    a, b = runs
    together = frame(a, tmp_path / "ab", "filter_seen", k=10, **{"with": b.workdir})
    # Every item that each offers, by other commands: the joined list is a sum of columns.
    alone = [frame(made, tmp_path / name, k=ITEMS) for made, name in ((a, "a"), (b, "b"))]
    shown = [
        frame(made, tmp_path / f"{name}s", "filter_seen", k=ITEMS) for made, name in ((a, "a"), (b, "b"))
    ]
    for user, row in together.iterrows():
        mean = sum(
            pd.Series(each.loc[user, "scores"], index=each.loc[user, "item_ids"], dtype=np.float64)
            for each in alone
        ) / 2  # fmt: skip
        left = sorted(
            mean[list(shown[0].loc[user, "item_ids"])].items(), key=lambda pair: (-pair[1], pair[0])
        )
        assert list(row["item_ids"]) == [item for item, _ in left[:10]]
        np.testing.assert_allclose(row["scores"], [value for _, value in left[:10]], rtol=1e-5, atol=1e-6)
    differ = [user for user in together.index if list(together.loc[user, "item_ids"]) not in [
        list(each.loc[user, "item_ids"][:10]) for each in shown]]  # fmt: skip
    assert len(differ) > len(together) / 2, "the two runs hardly differ: nothing is shown by this"

    before = (
        (a.workdir / "evaluation" / "test.json").read_bytes() if (a.workdir / "evaluation").exists() else b""
    )
    assert dynrec("evaluate", workdir=a.workdir, **{"with": b.workdir}) == 0
    result = json.loads((a.workdir / "evaluation" / "test_together.json").read_text())
    (a.workdir / "evaluation" / "test_together.json").unlink()
    assert result["together"] == [{"workdir": "workdir", "step": 6}, {"workdir": "workdir", "step": 2}]
    if before:
        assert (a.workdir / "evaluation" / "test.json").read_bytes() == before, "the run's own numbers stay"
    data = pd.read_parquet(a.dataset / "interactions").set_index("user_id")
    ids = pd.read_parquet(a.dataset / "items").set_index("index")["item_id"]
    ranks = [
        list(row["item_ids"]).index(ids[data.loc[user, "items"][-1]]) + 1
        if ids[data.loc[user, "items"][-1]] in row["item_ids"]
        else np.inf
        for user, row in together.iterrows()
    ]
    assert result["recall@10"] == pytest.approx(np.isfinite(ranks).mean(), abs=1e-9)
    assert result["ndcg@10"] == pytest.approx((1 / np.log2(np.array(ranks) + 1)).mean(), abs=1e-9)


def test_a_job_of_other_runs_is_another_job(runs: tuple[Made, Made], tmp_path: Path, capsys):
    a, b = runs
    frame(a, tmp_path / "out", k=5, **{"with": b.workdir})
    assert [each["step"] for each in json.loads((tmp_path / "out" / "_score.json").read_text())["with"]] == [
        2
    ]
    capsys.readouterr()
    assert dynrec("score", workdir=a.workdir, out=tmp_path / "out", split="test", k=5) == 2
    assert "with" in one_line(capsys)


@pytest.mark.parametrize(
    ("verb", "given", "told"),
    [
        ("evaluate", {"with": "{b},"}, "expected run folders with a comma between two"),
        ("evaluate", {"with": "{b},{b}"}, "is named twice"),
        ("score", {"with": "{a}"}, "is named twice"),
        ("score", {"with": "nowhere"}, "nowhere: no such folder"),
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


def test_runs_of_another_dataset_or_protocol_are_refused(runs: tuple[Made, Made], tmp_path: Path, capsys):
    a, _ = runs
    (tmp_path / "c").mkdir()
    made = make(tmp_path / "c", "synthetic:users=50,items=32,seed=1", train__steps=1, train__evaluate_every=0)
    capsys.readouterr()
    assert dynrec("evaluate", workdir=a.workdir, **{"with": made.workdir}) == 2
    assert "was trained on dataset" in one_line(capsys)
    config = json.loads((made.workdir / "config.json").read_text())
    assert config["evaluation"]["filter_seen"] is True
    config["evaluation"]["filter_seen"] = False
    (made.workdir / "config.json").write_text(json.dumps(config))
    assert dynrec("evaluate", workdir=a.workdir, **{"with": made.workdir}) == 2
    assert "evaluation.filter_seen is False" in one_line(capsys)
