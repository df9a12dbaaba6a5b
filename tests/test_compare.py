"""`dynrec compare`: one table over runs and baselines, whose numbers are those of `evaluate`."""

import json
from pathlib import Path
from typing import Any

import pytest

from .commands import Made, dynrec, make, one_line, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_run(tmp_path_factory)


def rows_of(path: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(path.read_text())}


def test_the_table_holds_the_numbers_of_evaluate_and_intervals_around_them(run: Made, tmp_path: Path, capsys):
    out = tmp_path / "compared.json"
    names = "popularity,recent_popularity,repeat_last,item_knn,ease,content"
    assert (
        dynrec("compare", workdirs=f"{run.workdir},{run.workdir}+{run.workdir}", out=out, baselines=names)
        == 0
    )
    told = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == [str(run.workdir)] * 2 + names.split(",")
    assert dynrec("evaluate", workdir=run.workdir) == 0
    measured = json.loads((run.workdir / "evaluation" / "test.json").read_text())
    by_name = {row["name"]: row["metrics"] for row in rows}
    for name, metrics in by_name.items():
        beside = measured if name == str(run.workdir) else measured["baselines"].get(name, {})
        for metric, value in metrics.items():
            assert value["low"] <= value["mean"] <= value["high"]
            if metric in beside and name != "recent_popularity":  # whose window is chosen on validation here
                assert value["mean"] == pytest.approx(beside[metric], abs=1e-12)
    assert rows[1]["difference"]["ndcg@10"] == {"mean": 0.0, "low": 0.0, "high": 0.0}, "the same run twice"
    assert (rows[1]["runs"], rows[0]["baseline"], rows[2]["baseline"]) == (2, False, True)
    assert rows[0]["protocol"]["split"] == "leave_one_out"
    assert "item_knn is measured: what" in told
    assert "not told apart" in told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "--workdirs is missing"),
        ({"workdirs": "{run},"}, "expected names with a comma or a plus sign between two"),
        ({"workdirs": "{run}", "baselines": "magic"}, "'magic' is not one of all, none, popularity"),
        ({"workdirs": "{run},nowhere"}, "nowhere: no such folder"),
        ({"workdirs": "{run}", "out": "{tmp}/none/c.json"}, "no file can be written there"),
    ],
)
def test_mistakes_get_one_line(run: Made, tmp_path: Path, capsys, values: dict[str, str], told: str):
    capsys.readouterr()
    given = {name: value.format(run=run.workdir, tmp=tmp_path) for name, value in values.items()}
    assert dynrec("compare", **given) == 2
    assert told in one_line(capsys)


def test_runs_of_other_protocols_or_data_are_not_compared(run: Made, tmp_path: Path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ranked = make(tmp_path / "a", evaluation__filter_seen=False, train__steps=1, train__evaluate_every=0)
    other = make(
        tmp_path / "b", "synthetic:users=50,items=32,seed=1", train__steps=1, train__evaluate_every=0
    )
    for made, told in (
        (ranked, "evaluation.filter_seen is False"),
        (other, "was trained on another dataset"),
    ):
        capsys.readouterr()
        assert dynrec("compare", workdirs=f"{run.workdir},{made.workdir}", baselines="none") == 2
        assert told in one_line(capsys)


def test_a_catalogue_without_ten_items_is_compared_by_a_shorter_list(tmp_path: Path, capsys):
    lines = [" ".join([f"u{user}", *(f"i{(user + n) % 8}" for n in range(5))]) for user in range(24)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    small = {"evaluation__metric": "ndcg@5", "evaluation__ks": (1, 5)}
    made = make(tmp_path, f"sequences:{tmp_path / 'log.txt'}", **small)
    out = tmp_path / "compared.json"
    assert dynrec("compare", workdirs=made.workdir, baselines="popularity,item_knn", out=out) == 0
    assert "ndcg@5" in capsys.readouterr().out
    assert dynrec("evaluate", "drift", workdir=made.workdir) == 0
    assert dynrec("report", workdir=made.workdir) == 0
