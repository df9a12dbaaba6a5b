"""Mistakes that are told before a run is opened: there is none in the folder that is given."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dynrec_jax.score.options import WHAT

from ..commands import Made, dynrec, one_line


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where there is no run; and some files."""
    monkeypatch.chdir(tmp_path)
    Path("ids.csv").write_text("user_id,item_id\nanna,7\n")
    Path("folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            {"users": "missing.csv"},
            "missing.csv: no such file; expected a CSV or Parquet file with a column user_id",
        ),
        ({"allow": "folder"}, "folder: is a folder"),
        ({"deny": "missing.txt"}, "missing.txt: no such file"),
        ({"candidates": "missing.csv"}, "a column user_id and a column item_id"),
        ({"weights": "2"}, "--weights: is of several runs, and there is one"),
        ({"weights": "0.5,0.5"}, "--weights: is of several runs"),
        ({"weights": "1", "with": "other"}, "has 1 numbers, and there are 2 runs"),
        ({"weights": "1,0", "with": "other"}, "expected numbers above 0"),
        ({"weights": "1,inf", "with": "other"}, "expected numbers above 0"),
        ({"weights": "1,nan", "with": "other"}, "expected numbers above 0"),
        ({"min_score": "nan"}, "--min_score=nan: expected a score"),
        ({"min_score": "-inf"}, "--min_score=-inf: expected a score"),
        ({"candidates": "ids.csv", "table": "int8"}, "--candidates and --table"),
        ({"until": "17671392000000"}, "--until=17671392000000: has more digits"),
        ({"out": "s3://bucket/lists"}, "--out=s3://bucket/lists: dynrec score takes a path of this machine"),
        ({"out": "ids.csv"}, "ids.csv: is a file; choose another --out"),
        ({"out": "ids.csv/lists"}, "ids.csv: is a file; choose another --out"),
        ({"out": "."}, "exists and is not the output of scoring"),
        ({"out": ".", "what": "both"}, "holds more than the folders users and items"),
    ],
)
def test_by_flags_and_files_alone(flags: dict[str, Any], told: str, nowhere: Path, capsys):
    before = sorted(nowhere.iterdir())
    assert dynrec("score", **{"workdir": "run", "out": "out", **flags}) == 2
    assert told in one_line(capsys)
    assert sorted(nowhere.iterdir()) == before


LISTS_ALONE = {
    "candidates": "ids.csv",
    "min_score": 1,
    "filter_seen": "true",
    "diversify": 0.5,
    "calibrate": 0.5,
    "table": "int8",
    "encoder": "int8",
    "with": "other",
}
OF_USERS = {"users": "ids.csv", "split": "test", "at": "2026-01-31", "until": "2026-01-31", "hops": 1}
OF_ITEMS = {"allow": "ids.csv", "deny": "ids.csv", "where": "true"}


@pytest.mark.parametrize("what", WHAT[1:])
def test_what_would_change_nothing_is_refused(what: str, nowhere: Path, capsys):
    refused = {
        **LISTS_ALONE,
        **(OF_USERS if what in ("items", "neighbours") else {}),
        **(OF_ITEMS if what == "users" else {}),
        **({} if what == "neighbours" else {"k": 5}),
    }
    for name, value in refused.items():
        assert dynrec("score", workdir="run", out="out", what=what, **{name: value}) == 2
        assert f"--what={what}: " in one_line(capsys), name
    kept = {**OF_USERS, **OF_ITEMS, "k": 5}.items() - refused.items()
    for name, value in kept:
        assert dynrec("score", workdir="run", out="out", what=what, **{name: value}) == 2
        assert "run: no such folder" in one_line(capsys), name


def test_neighbours_are_as_many_as_there_are_by_default(shop: Made, tmp_path: Path):
    assert dynrec("score", workdir=shop.workdir, out=tmp_path / "out", what="neighbours") == 0
    found = pd.read_parquet(tmp_path / "out")
    assert {len(items) for items in found["item_ids"]} == {len(found) - 1}


def test_both_of_two_outputs_are_looked_at_before_one_is_made(shop: Made, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert dynrec("score", workdir=shop.workdir, out=out / "items", what="items") == 0
    capsys.readouterr()
    assert dynrec("score", workdir=shop.workdir, out=out, what="both") == 2
    assert "holds the output of another job (what: 'items' -> 'both')" in one_line(capsys)
    assert [path.name for path in out.iterdir()] == ["items"]


def test_what_files_say_does_not_command_the_terminal(shop: Made, tmp_path: Path, capsys):
    (tmp_path / "users.csv").write_text("\x1b[2Juser\x07\nanna\n")
    assert dynrec("score", workdir=shop.workdir, out=tmp_path / "out", users=tmp_path / "users.csv") == 2
    assert "has the columns \\x1b[2Juser\\x07; expected one named user_id" in one_line(capsys)
