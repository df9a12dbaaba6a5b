"""Recommending while users act, against `score`, which reads whole histories; and models that look at time."""

import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.cache import Histories
from dynrec_jax.errors import DataError
from dynrec_jax.score.live import Live
from dynrec_jax.score.users import new_histories

from ..commands import Made, dynrec, make, one_line

FIRST = 1_600_000_000
LAST = FIRST + 86_400 * 30
SIGHT = {
    "model__positions": "relative",
    "model__time": ("bias", "sinusoidal"),
    "model__query_time": True,
    "model__events": True,
    "model__attention_window": 4,
    "model__layers": 2,
    "model__neighbours": 1.0,
    "model__shrinkage": 2.0,
}


def table(folder: Path) -> str:
    """A log of 20 users, of up to 15 events each, with times and types; the last event is at `LAST`."""
    rng = random.Random(5)
    rows = [
        f"u{rng.randrange(20):02d},i{rng.randrange(14):02d},{FIRST + rng.randrange(86_400 * 30)},"
        f"{rng.choice(['view', 'buy'])}"
        for _ in range(200)
    ]
    rows.append(f"u00,i03,{LAST},buy")
    (folder / "log.csv").write_text("\n".join(["user,item,time,event", *rows]) + "\n")
    return f"table:{folder / 'log.csv'}"


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run whose model looks at times, at types and at the time of the request."""
    folder = tmp_path_factory.mktemp("timed_run")
    return make(folder, table(folder), data__max_length=16, **SIGHT)


def scored(made: Made, out: Path, *switches: str, **values: Any) -> dict[str, tuple[list[str], np.ndarray]]:
    assert dynrec("score", *switches, workdir=made.workdir, out=out, **values) == 0
    frame = pq.read_table(out).to_pylist()
    return {row["user_id"]: (row["item_ids"], np.array(row["scores"])) for row in frame}


def opened(made: Made) -> tuple[workdirs.Run, Histories]:
    run = workdirs.open(made.workdir)
    return run, Histories(run.dataset, run.config.data.cache_dir)


def assert_same_lists(live: Live, lists: dict[str, tuple[list[str], np.ndarray]], **options: Any) -> None:
    ids, scores = live.recommend(live.users, k=5, **options)
    for user, shown, found in zip(live.users, ids.to_pylist(), scores, strict=True):
        expected, values = lists[user]
        np.testing.assert_allclose(found[: len(values)], values, rtol=1e-5, atol=1e-5)
        assert shown == expected


def test_live_lists_are_those_of_scoring_the_whole_history(timed: Made, tmp_path: Path):
    run, stored = opened(timed)
    at = LAST + 86_400
    lists = scored(timed, tmp_path / "out", "filter_seen", k=5, at=at)
    earlier = scored(timed, tmp_path / "earlier", "filter_seen", k=5)
    felt = [not np.array_equal(values, earlier[user][1]) for user, (_, values) in lists.items()]
    assert all(felt), "the time of the request is felt"
    everybody = stored.ids_of(np.arange(stored.users))
    live = Live(run, everybody)
    assert live.stream.continues
    live.read(stored)
    moments = np.full(len(everybody), at)
    assert_same_lists(live, lists, at=moments)

    # The same by single events, of all users as they came, and in two sittings with a file between.
    log = pd.read_csv(timed.dataset.parent / "log.csv", dtype=str).sort_values("time", kind="stable")
    half = len(log) // 2
    other = Live(run, everybody)
    for part in (log[:half], log[half:]):
        columns = [part[name].tolist() for name in ("user", "item")]
        assert other.append(*columns, part["time"].astype(int).tolist(), part["event"].tolist()) == 0
        other.save(tmp_path / "states.safetensors")
        other = Live.load(run, tmp_path / "states.safetensors")
    assert_same_lists(other, lists, at=moments)
    for one, two in zip(jax.tree.leaves(live.states), jax.tree.leaves(other.states), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-5, atol=1e-5)


def test_a_model_of_positions_reads_again_once_its_window_is_full(shop: Made, lists: Path):
    run, stored = opened(shop)
    assert stored.lengths.max() > run.config.data.max_length
    live = Live(run, stored.ids_of(np.arange(stored.users)))
    assert not live.stream.continues
    live.read(stored)
    frame = pq.read_table(lists).to_pylist()
    expected = {row["user_id"]: (row["item_ids"], np.array(row["scores"])) for row in frame}
    assert_same_lists(live, expected, filter_seen=False)


def test_unknown_items_are_left_out_and_other_mistakes_refused(timed: Made, tmp_path: Path):
    run, _ = opened(timed)
    live = Live(run, ["new", "u00"])
    assert live.append(["new", "new"], ["nothing", "i01"], [FIRST, FIRST + 1], ["view", "unheard of"]) == 1
    with pytest.raises(DataError, match="'u07' is none of the 2 users"):
        live.append(["u07"], ["i01"], [FIRST])
    with pytest.raises(DataError, match="looks at the times of events"):
        live.append(["new"], ["i01"])
    with pytest.raises(DataError, match="expected each once"):
        Live(run, ["a", "a"])
    with pytest.raises(DataError, match="1 users and 2 times"):
        live.append(["new"], ["i01"], [FIRST, FIRST])
    with pytest.raises(DataError, match="is no number of seconds since 1970"):
        live.append(["new"], ["i01"], [FIRST * 1000])
    path = tmp_path / "states.safetensors"
    live.save(path)
    tensors = load_file(path)
    save_file(tensors, path, {"format": "1", "weights": "others"})
    with pytest.raises(DataError, match="states of other weights or items"):
        Live.load(run, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="not readable as users' states"):
        Live.load(run, path)


def test_histories_of_a_file_bring_times_and_types(timed: Made, tmp_path: Path, capsys):
    lists = scored(timed, tmp_path / "out", k=5, at="2020-10-15T00:00")
    log = pd.read_csv(timed.dataset.parent / "log.csv", dtype=str)
    log.rename(columns={"user": "user_id"}).to_csv(tmp_path / "rows.csv", index=False)
    found = scored(timed, tmp_path / "rows", k=5, at="2020-10-15", users=tmp_path / "rows.csv")
    ordered = log.assign(time=log["time"].astype(int)).sort_values("time", kind="stable")
    grouped = ordered.groupby("user").agg(list).reset_index()
    grouped.columns = ["user_id", "item_ids", "times", "events"]
    grouped.to_parquet(tmp_path / "lists.parquet")
    other = scored(timed, tmp_path / "lists", k=5, at=1_602_720_000, users=tmp_path / "lists.parquet")
    for user, (items, scores) in lists.items():
        for ids, values in (found[user], other[user]):
            assert ids == items
            np.testing.assert_allclose(values, scores, rtol=1e-5, atol=1e-5)
    log.drop(columns="time").rename(columns={"user": "user_id"}).to_csv(tmp_path / "bare.csv", index=False)
    capsys.readouterr()
    assert dynrec("score", workdir=timed.workdir, out=tmp_path / "no", users=tmp_path / "bare.csv") == 2
    assert "has no times, and the model looks at them" in one_line(capsys)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"at": "yesterday"}, "--at=yesterday: expected a date such as 2026-01-31"),
        ({"at": "20200101"}, "is before the dataset's first event (2020-09-13"),
        ({"at": "2020-10-15", "split": "test"}, "--split=test asks at the time of its targets"),
    ],
)
def test_a_moment_that_cannot_be_is_refused(timed: Made, tmp_path: Path, capsys, values: Any, told: str):
    capsys.readouterr()
    assert dynrec("score", workdir=timed.workdir, out=tmp_path / "no", **values) == 2
    assert told in one_line(capsys)
    assert not (tmp_path / "no").exists()


def test_a_model_that_is_not_told_the_moment_refuses_one(shop: Made, tmp_path: Path, capsys):
    capsys.readouterr()
    assert dynrec("score", workdir=shop.workdir, out=tmp_path / "no", at="2020-10-15") == 2
    assert "does not look at the time of a request" in one_line(capsys)


def test_evaluation_asks_at_the_time_of_the_target(timed: Made, tmp_path: Path):
    """The protocol says so, and the numbers are those of `score --split=test`, whatever the log's end."""
    import json

    workdir = tmp_path / "workdir"
    shutil.copytree(timed.workdir, workdir)
    assert dynrec("evaluate", workdir=workdir, dataset=timed.dataset) == 0
    result = json.loads((workdir / "evaluation" / "test.json").read_text())
    assert result["protocol"]["query_time"] is True
    lists = scored(timed, tmp_path / "out", "filter_seen", split="test")
    log = pd.read_csv(timed.dataset.parent / "log.csv", dtype=str)
    log = log.assign(time=log["time"].astype(int)).sort_values("time", kind="stable")
    target = log.groupby("user")["item"].last()
    gains = [
        1 / np.log2(ids.index(target[u]) + 2) if target[u] in ids[:10] else 0.0
        for u, (ids, _) in lists.items()
    ]
    assert result["users"] == len(lists)
    np.testing.assert_allclose(result["ndcg@10"], np.mean(gains), atol=1e-9)


def test_times_of_a_file_may_be_finer_than_seconds(timed: Made, tmp_path: Path, capsys):
    """In milliseconds as in seconds; and within a second the finer part orders events."""
    log = pd.read_csv(timed.dataset.parent / "log.csv", dtype=str).rename(columns={"user": "user_id"})
    log.to_csv(tmp_path / "s.csv", index=False)
    log.assign(time=(log["time"].astype(int) * 1000).astype(str)).to_csv(tmp_path / "ms.csv", index=False)
    one, other = (
        scored(timed, tmp_path / unit, k=5, at="2020-10-15", users=tmp_path / f"{unit}.csv")
        for unit in ("s", "ms")
    )
    assert {user: ids for user, (ids, _) in one.items()} == {user: ids for user, (ids, _) in other.items()}
    mixed = log.assign(time=log["time"].where(log.index > 3, "1600000000000"))
    mixed.to_csv(tmp_path / "mixed.csv", index=False)
    capsys.readouterr()
    assert dynrec("score", workdir=timed.workdir, out=tmp_path / "no", users=tmp_path / "mixed.csv") == 2
    assert "look like seconds and like milliseconds" in one_line(capsys)
    run, _ = opened(timed)
    fine = pa.table({"user_id": ["a"] * 3, "item": ["i03", "i02", "i01"], "time": [100.9, 100.5, 100.1]})
    assert new_histories(fine, run.item_ids, None).items.tolist() == [
        run.item_ids.index(name).as_py() + 1 for name in ("i01", "i02", "i03")
    ]


def test_lists_of_either_width_and_events_without_a_type_are_read(timed: Made):
    run, _ = opened(timed)
    table = pa.table(
        {
            "user_id": ["a", "b"],
            "items": pa.array([["i01", "i02"], []], pa.list_(pa.string())),
            "times": pa.array([[5, 9], None], pa.large_list(pa.int64())),
            "events": pa.array([[None, None], []], pa.list_(pa.null())),
        }
    )
    found = new_histories(table, run.item_ids, None, 0, ["buy", "view"])
    assert found.events.tolist() == [0, 0]
    assert found.times is not None
    assert found.times.tolist() == [5, 9]
    durations = table.set_column(2, "times", pa.array([[5, 9], []], pa.list_(pa.duration("s"))))
    with pytest.raises(DataError, match="expected seconds since 1970"):
        new_histories(durations, run.item_ids, None, 0)
