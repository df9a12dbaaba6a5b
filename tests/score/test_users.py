"""Files of users: ids as they were written, and new histories that are scored as those of the dataset are."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ..commands import Made, dynrec

AWKWARD = ["001", "1", "NA", "null"]


@pytest.fixture(scope="module")
def expected(lists) -> pd.DataFrame:
    """Lists of all users, by user."""
    return pd.read_parquet(lists).set_index("user_id")


def score(made: Made, folder: Path, users: Path) -> pd.DataFrame:
    assert dynrec("score", workdir=made.workdir, out=folder / "out", k=5, users=users) == 0
    return pd.read_parquet(folder / "out").set_index("user_id")


def same(found: pd.DataFrame, expected: pd.DataFrame, renamed: dict[str, str] | None = None) -> None:
    """Found lists are those of the same users in `expected`: ids equal, scores to rounding."""
    assert len(found)
    for user, row in found.iterrows():
        other = expected.loc[(renamed or {}).get(str(user), str(user))]
        assert list(row["item_ids"]) == list(other["item_ids"])
        np.testing.assert_allclose(row["scores"], other["scores"], rtol=0, atol=1e-5)


def test_a_csv_of_ids(shop, expected, tmp_path, capsys):
    wanted = [*AWKWARD, "u07", "001", "stranger", "01"]
    (tmp_path / "users.csv").write_text("user_id,remark\n" + "".join(f"{user},x\n" for user in wanted))
    found = score(shop, tmp_path, tmp_path / "users.csv")
    assert list(found.index) == [*AWKWARD, "u07"]  # in the order of the file, once each
    same(found, expected)
    assert "2 unknown users left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pa.array(["u07", "NA"]), ["u07", "NA"]),
        (pa.array(["001", "u02"], pa.large_string()), ["001", "u02"]),
        (pa.array([1, 42], pa.int64()), ["1", "42"]),
        (pa.array(["001", "u03", "001"]).dictionary_encode(), ["001", "u03"]),
    ],
    ids=["strings", "large strings", "integers", "categories"],
)
def test_a_parquet_of_ids(column, ids, shop, expected, tmp_path):
    pq.write_table(pa.table({"user_id": column}), tmp_path / "users.parquet")
    found = score(shop, tmp_path, tmp_path / "users.parquet")
    assert list(found.index) == ids
    same(found, expected)


def test_new_histories_a_row_an_event(shop, histories, expected, tmp_path, capsys):
    """Rows in any order: the time decides, as a number (9 before 10), and at the same time the row."""
    names = {f"new {user}": user for user in (*AWKWARD, "u04", "u05")}
    rows = [
        (new, item, 5 + at // 2)
        for new, user in names.items()
        for at, item in enumerate(histories[user])
    ]  # fmt: skip
    rows += [("new 001", "no-such-item", 6), ("new u04", "7 ", 1), ("nobody", "no-such-item", 3)]
    order = sorted(range(len(rows)), key=lambda i: (random.Random(rows[i][2]).random(), i))
    text = "".join(f"{user},{item},{time}\n" for user, item, time in (rows[i] for i in order))
    (tmp_path / "new.csv").write_text("user_id,item,time\n" + text)
    found = score(shop, tmp_path, tmp_path / "new.csv")
    assert sorted(found.index) == sorted(names)
    same(found, expected, names)
    err = capsys.readouterr().err
    assert "3 events of unknown items left out" in err
    assert "1 users without a known item left out" in err


def test_new_histories_a_list_a_row(shop, histories, expected, tmp_path, capsys):
    users = ["001", "u08", "u09", "empty", "strange"]
    items = [histories["001"], histories["u08"], ["no-such-item", *histories["u09"]], [], ["no-such-item"]]
    pq.write_table(pa.table({"user_id": users, "item_ids": items}), tmp_path / "new.parquet")
    found = score(shop, tmp_path, tmp_path / "new.parquet")
    assert list(found.index) == ["001", "u08", "u09"]
    same(found, expected)
    err = capsys.readouterr().err
    assert "2 events of unknown items left out" in err
    assert "2 users without a known item left out" in err


def test_a_split_leaves_out_users_without_a_target(shop, tmp_path, capsys):
    (tmp_path / "users.csv").write_text("user_id\nu00\nu01\nu02\n")
    options = {"k": 5, "split": "test", "users": tmp_path / "users.csv"}
    assert dynrec("score", workdir=shop.workdir, out=tmp_path / "out", **options) == 0
    assert pd.read_parquet(tmp_path / "out")["user_id"].to_list() == ["u02"]
    assert "2 users without a test target left out" in capsys.readouterr().err
