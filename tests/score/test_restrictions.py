"""What may be in a list: files of items, rules, what each user is offered, a lowest score, a moment."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dynrec_jax.errors import ConfigError
from dynrec_jax.score.allowed import keeping

from ..commands import Made, dynrec, one_line
from .conftest import ITEMS

STOCK = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "in_stock": ["true", "false", "true", None],
        "category": ["toys", "toys", "adult", "toys"],
        "price": ["9", "10", "11", "12"],
        "tags": [["new"], [], ["new", "red"], None],
    }
)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("in_stock and category <> 'adult'", "a"),
        ("CAST(price AS DOUBLE) < 11", "ab"),
        ("item_id IN ('b', 'd') OR list_contains(tags, 'red')", "bcd"),
        ("not in_stock", "b"),  # what is null is not kept
        ("false", ""),
    ],
)
def test_a_rule_keeps_the_items_that_it_is_true_of(rule: str, kept: str):
    assert "".join(np.array(list("abcd"))[keeping(STOCK, rule)]) == kept


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("in_stok", "in_stok"),
        ("price < 10", "cast"),
        ("price", "VARCHAR"),
        ("in_stock, true", "single expression"),
        ("true) FROM known; DROP TABLE known; --", "syntax error"),
        ("count(*) > 0", "each item"),
        ("columns(*) IS NULL", "one expression"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "disabled"),
        ("(SELECT max(content) FROM read_text('/etc/passwd')) IS NULL", "disabled"),
        ("(SELECT count(*) FROM '/etc/passwd') > 0", "does not exist"),
        ("exists(SELECT * FROM STOCK)", "STOCK"),  # nothing of Python's is seen
        ("getenv('HOME') <> ''", "getenv"),
        (" ", "empty"),
    ],
)
def test_what_is_no_rule_on_the_items_is_refused(rule: str, told: str):
    with pytest.raises(ConfigError, match="--where") as refused:
        keeping(STOCK, rule)
    assert told in str(refused.value)
    assert "in_stock, category, price" in str(refused.value)
    assert "\n" not in str(refused.value)


def frame(made: Made, out: Path, *switches: str, **values: object) -> pd.DataFrame:
    assert dynrec("score", *switches, workdir=made.workdir, out=out, **values) == 0
    return pd.read_parquet(out).set_index("user_id")


@pytest.fixture(scope="module")
def whole(shop: Made, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """All items, ranked for each user."""
    return frame(shop, tmp_path_factory.mktemp("whole") / "out", k=len(ITEMS))


def expect(found: pd.DataFrame, whole: pd.DataFrame, k: int, may: dict[str, set[str]]) -> None:
    """Lists are the first of `whole`, of those that may be there."""
    assert len(found)
    for user, row in found.iterrows():
        left = [i for i, item in enumerate(whole.loc[user, "item_ids"]) if item in may[str(user)]][:k]
        assert list(row["item_ids"]) == list(whole.loc[user, "item_ids"][left])
        np.testing.assert_allclose(row["scores"], whole.loc[user, "scores"][left], rtol=1e-5, atol=1e-5)


def test_only_items_that_are_allowed_not_denied_and_kept_by_the_rule(
    shop: Made, whole: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "allow.csv").write_text(
        "item_id,why\n" + "".join(f"{item},x\n" for item in [*ITEMS[:9], "gone"])
    )
    (tmp_path / "deny.txt").write_text("007\n\nNA\n")
    capsys.readouterr()
    flags = {"allow": tmp_path / "allow.csv", "deny": tmp_path / "deny.txt", "where": "item_id <> 'i02'"}
    found = frame(shop, tmp_path / "out", k=4, **flags)
    left = set(ITEMS[:9]) - {"007", "NA", "i02"}
    expect(found, whole, 4, dict.fromkeys(whole.index, left))
    told = capsys.readouterr().err
    assert f"{len(left)} of {len(ITEMS)} items may be recommended" in told
    assert "1 items of" in told
    assert dynrec("score", workdir=shop.workdir, out=tmp_path / "long", k=len(left) + 1, **flags) == 2
    assert f"give {len(left)} or less" in one_line(capsys)
    # Another file of the same name is another job.
    (tmp_path / "deny.txt").write_text("007\n")
    assert dynrec("score", workdir=shop.workdir, out=tmp_path / "out", k=4, **flags) == 2
    assert "deny" in one_line(capsys)


def test_a_rule_that_keeps_other_items_now_is_another_job(shop: Made, tmp_path: Path, capsys):
    """As one about the day does, the next day."""
    flags = {"k": 1, "where": "item_id = '007' or random() < 0.5"}
    frame(shop, tmp_path / "out", **flags)
    capsys.readouterr()
    # It may keep the same ones once or twice.
    assert any(dynrec("score", workdir=shop.workdir, out=tmp_path / "out", **flags) == 2 for _ in range(5))
    assert "holds the output of another job (allowed: " in capsys.readouterr().err


def test_candidates_of_each_user(shop: Made, whole: pd.DataFrame, tmp_path: Path, capsys):
    rows = [("001", "7"), ("001", "NA"), ("001", "i03"), ("u07", "null"), ("u07", "null"), ("u07", "gone")]
    rows += [("stranger", "7"), ("42", "i05")]
    pd.DataFrame(rows, columns=["user_id", "item_id"]).to_csv(tmp_path / "offers.csv", index=False)
    capsys.readouterr()
    found = frame(shop, tmp_path / "out", k=2, candidates=tmp_path / "offers.csv", where="item_id <> 'i05'")
    assert sorted(found.index) == ["001", "u07"]  # nothing that 42 is offered may be recommended
    may = {user: {item for own, item in rows if own == user} for user in found.index}
    expect(found, whole, 2, may)
    told = capsys.readouterr().err
    assert "1 rows of" in told
    assert "users whom" in told
    # Who is not asked is not missed.
    (tmp_path / "users.csv").write_text("user_id\nu07\nu08\n")
    asked = {"users": tmp_path / "users.csv", "candidates": tmp_path / "offers.csv"}
    alone = frame(shop, tmp_path / "alone", k=2, **asked)
    pd.testing.assert_frame_equal(alone, found.loc[["u07"]])
    assert "1 users whom" in capsys.readouterr().err
    lists = pa.table({"user_id": ["001", "u07"], "item_ids": [["7", "NA", "i03"], ["null"]]})
    pa.parquet.write_table(lists, tmp_path / "offers.parquet")
    again = frame(shop, tmp_path / "lists", k=2, candidates=tmp_path / "offers.parquet")
    pd.testing.assert_frame_equal(again, found)


def test_a_lowest_score(shop: Made, whole: pd.DataFrame, tmp_path: Path):
    least = float(np.median(np.concatenate(list(whole["scores"]))))
    found = frame(shop, tmp_path / "out", k=len(ITEMS), min_score=least)
    for user, row in found.iterrows():
        assert list(row["scores"]) == [score for score in whole.loc[user, "scores"] if score >= least]


def test_mistakes(shop: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "unknown.csv").write_text("item_id\nnothing\n")
    (tmp_path / "other.csv").write_text("id\n7\n")
    (tmp_path / "all.txt").write_text("\n".join(ITEMS))
    (tmp_path / "ids.csv").write_text("user_id\n001\nu02\n")
    (tmp_path / "short.csv").write_text("user_id\nu00\nu01\n")
    (tmp_path / "offers.csv").write_text("user_id,item_id\nu05,7\n")
    for flags, told in (
        ({"allow": tmp_path / "unknown.csv"}, "none of its 1 items"),
        ({"deny": tmp_path / "other.csv"}, "expected a column item_id"),
        ({"deny": tmp_path / "all.txt"}, "leave no item"),
        ({"where": "colour = 'red'"}, "colour"),
        ({"candidates": tmp_path / "all.txt"}, "user_id"),
        ({"until": "2026-01-31"}, "has no times"),
        ({"what": "neighbours", "k": len(ITEMS)}, "other items"),
        ({"users": tmp_path / "ids.csv", "until": "2026-01-31"}, "has no times"),
        ({"users": tmp_path / "short.csv", "split": "test"}, "nobody is left"),
        (
            {"users": tmp_path / "ids.csv", "candidates": tmp_path / "offers.csv"},
            "offers none of these users",
        ),
    ):
        assert dynrec("score", workdir=shop.workdir, out=tmp_path / "out", **{"k": 3, **flags}) == 2, flags
        assert told in one_line(capsys), flags
        assert not (tmp_path / "out").exists()


def test_json_lines_and_arrow_hold_what_parquet_holds(shop: Made, lists: Path, tmp_path: Path):
    expected = pd.read_parquet(lists)
    for name in ("jsonl", "arrow"):
        assert dynrec("score", workdir=shop.workdir, out=tmp_path / name, k=5, format=name) == 0
    (lines,) = (tmp_path / "jsonl").glob("*.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["user_id"] for row in rows] == list(expected["user_id"])
    assert [row["item_ids"] for row in rows] == [list(items) for items in expected["item_ids"]]
    np.testing.assert_allclose([row["scores"] for row in rows], np.stack(expected["scores"]), rtol=1e-6)
    (file,) = (tmp_path / "arrow").glob("*.arrow")
    pd.testing.assert_frame_equal(pa.ipc.open_file(file).read_pandas(), expected)
