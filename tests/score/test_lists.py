"""Lists that were written, measured: the numbers of `evaluate`, and those that pandas makes of the same files."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.cache import Histories
from dynrec_jax.errors import DataError
from dynrec_jax.evaluate.recommender import Lists
from dynrec_jax.score import lists, queries
from dynrec_jax.score.lists import batches, item_numbers, open_written
from dynrec_jax.score.parts import Parts
from dynrec_jax.score.tables import of_lists

from ..commands import Made, a_shard_each, digest, dynrec, one_line, small_run
from .test_parity import of_dataset

K = 12
MANY = 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The small run in a folder of its own, with what `evaluate` writes of its test."""
    small = small_run(tmp_path_factory)
    workdir = tmp_path_factory.mktemp("measured") / "workdir"
    shutil.copytree(small.workdir, workdir, ignore=shutil.ignore_patterns("evaluation"))
    assert dynrec("evaluate", workdir=workdir, split="test") == 0
    return small._replace(workdir=workdir)


@pytest.fixture(scope="module")
def out(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole lists of the test, in several parts."""
    folder = tmp_path_factory.mktemp("out") / "lists"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "groups", a_shard_each)
        assert dynrec("score", "filter_seen", workdir=made.workdir, out=folder, split="test", k=32) == 0
    assert len(list(folder.glob("*.parquet"))) > 1
    return folder


def measured(made: Made, out: Path, **flags: Any) -> dict[str, Any]:
    path = out.parent / f"{out.name}.json"
    assert dynrec("evaluate", workdir=made.workdir, lists=out, out=path, **flags) == 0
    return json.loads(path.read_text())


def test_accuracy_is_what_evaluate_says(made: Made, out: Path, capsys):
    assert dynrec("evaluate", workdir=made.workdir, lists=out) == 0
    told = capsys.readouterr().out
    evaluated = json.loads((made.workdir / "evaluation" / "test.json").read_text())
    found = json.loads((made.workdir / "evaluation" / "lists_test.json").read_text())
    names = [name for name in evaluated if name == "mrr" or name.startswith(("ndcg@", "recall@"))]
    assert len(names) > 6
    assert {name: found[name] for name in names} == {name: evaluated[name] for name in names}
    assert found["coverage@10"] == evaluated["coverage@10"]
    assert (found["users"], found["asked"]) == (evaluated["users"], evaluated["users"])
    assert f"{evaluated['ndcg@10']:.4f}" in told
    assert "blockbuster" in told
    # Read again in batches of other sizes, they are the same.
    again = list(batches(open_written(out), 7))
    assert sum(len(users) for users, _ in again) == found["users"]
    assert max(len(users) for users, _ in again) == 7


def by_pandas(
    made: Made, frame: pd.DataFrame, vectors: np.ndarray, words: dict[str, set[str]], k: int
) -> dict[str, float]:
    """The same metrics, item by item and pair by pair."""
    histories, _ = of_dataset(made.dataset)
    training = {user: h[:-2] if len(h) >= 3 else h for user, h in histories.items()}
    items = pd.read_parquet(made.dataset / "items").sort_values("index")["item_id"].tolist()
    share = {item: np.mean([item in h for h in training.values()]) for item in items}
    place = {item: i for i, item in enumerate(items)}
    shown = {user: list(row)[:k] for user, row in zip(frame["user_id"], frame["item_ids"], strict=True)}
    count = (
        pd.Series([item for row in shown.values() for item in row])
        .value_counts()
        .reindex(items, fill_value=0)
    )

    def cosine(a: str, b: str) -> float:
        x, y = (vectors[place[item]].astype(float) for item in (a, b))
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    def pairs(distance) -> float:
        return float(
            np.mean(
                [
                    np.mean([distance(a, b) for a, b in itertools.combinations(row, 2)])
                    for row in shown.values()
                ]
            )
        )

    result = {
        "coverage": float((count > 0).mean()),
        "gini": float(np.abs(np.subtract.outer(count.values, count.values)).mean() / (2 * count.mean())),
        "novelty": float(
            np.mean([
                np.mean([-math.log2(max(share[i], 1 / len(training))) for i in row]) for row in shown.values()
            ])
        ),
        "popularity": float(np.mean([np.mean([share[i] for i in row]) for row in shown.values()])),
        "diversity": pairs(lambda a, b: 1 - cosine(a, b)),
        "diversity_title": pairs(lambda a, b: 1 - len(words[a] & words[b]) / len(words[a] | words[b])),
    }  # fmt: skip
    events = pd.Series([i for h in training.values() for i in h]).value_counts().reindex(items, fill_value=0)
    events = events.sort_values(ascending=False, kind="stable")
    before = (events.cumsum() - events) / events.sum()
    kinds = {item: "head" if at < 0.2 else "middle" if at < 0.8 else "tail" for item, at in before.items()}
    profile = pd.Series({user: np.mean([share[i] for i in h]) for user, h in training.items()})
    third = (profile.rank(method="first") - 1) * 3 // len(profile)
    for number, name in enumerate(("niche", "diverse", "blockbuster")):
        users = [user for user in shown if third.get(user) == number]
        before = profile[users].mean()
        now = np.mean([np.mean([share[i] for i in shown[user]]) for user in users])
        result[f"{name} lift"] = float((now - before) / before)
        result[f"{name} miscalibration"] = float(
            np.mean([divergence(training[user], shown[user], kinds) for user in users])
        )
    return result


def divergence(taken: list[str], shown: list[str], kinds: dict[str, str]) -> float:
    """KL divergence of the kinds of what is shown, smoothed, from those of what was taken."""
    total = 0.0
    for kind in set(kinds.values()):
        p, q = (np.mean([kinds[item] == kind for item in row]) for row in (taken, shown))
        total += p * math.log(p / (0.99 * q + 0.01 * p)) if p else 0.0
    return total


def test_the_rest_is_what_pandas_makes_of_the_files(made: Made, out: Path):
    found = measured(made, out, attributes="title: ")
    run = workdirs.open(made.workdir)
    vectors = np.asarray(run.tables["item_id"])[1 : run.dataset.items + 1]
    table = pd.read_parquet(made.dataset / "items")
    words = {item: set(title.split()) for item, title in zip(table["item_id"], table["title"], strict=True)}
    frame = pd.read_parquet(out)
    for k in (10, 32):
        expected = by_pandas(made, frame, vectors, words, k)
        for name, value in expected.items():
            group, _, of_group = name.partition(" ")
            has = found["groups"][group][f"{of_group}@{k}"] if of_group else found[f"{name}@{k}"]
            assert has == pytest.approx(value, rel=1e-5), (name, k)
    assert (found["unknown_users"], found["users_without_training"]) == (0, 0)


def test_users_whom_the_dataset_does_not_know_are_counted_and_in_no_group(made: Made, tmp_path: Path):
    histories, _ = of_dataset(made.dataset)
    known, items = list(histories)[:3], next(iter(histories.values()))
    rows = [f"{user},{item}" for user in (*known, "stranger") for item in items]
    (tmp_path / "users.csv").write_text("\n".join(["user_id,item", *rows]) + "\n")
    out = tmp_path / "lists"
    assert dynrec("score", workdir=made.workdir, out=out, users=tmp_path / "users.csv", k=4) == 0
    found = measured(made, out)
    assert (found["users"], found["unknown_users"], found["groups"]["all"]["users"]) == (4, 1, 3)
    assert "coverage@4" in found
    assert "ndcg@4" not in found


def test_counts_of_histories_are_those_of_python(tiny_dataset, cache_dir):
    stored = Histories(tiny_dataset, cache_dir)
    ends = np.maximum(stored.lengths - 2, 0)
    rows = [
        stored.windows(np.array([u]), np.array([end]), int(end)).items[0].tolist() if end else []
        for u, end in enumerate(ends)
    ]
    expected = [sum(item in row for row in rows) for item in range(tiny_dataset.items + 1)]
    assert stored.holders(ends).tolist() == expected
    values = np.random.default_rng(0).random(tiny_dataset.items + 1)
    means = [np.mean(values[row]) if row else np.nan for row in rows]
    np.testing.assert_allclose(stored.means(values, ends), means)
    assert np.isnan(means).any()
    order = np.random.default_rng(1).permutation(stored.users)
    ids = pa.array([*stored.ids_of(order), "stranger"])
    assert stored.numbers_of(ids).tolist() == [*order, -1]
    some = Histories(tiny_dataset, cache_dir, range(1, 4, 2))
    held = some.numbers_of(ids)
    assert sorted(held[held >= 0]) == list(range(some.users))
    assert some.ids_of(held[held >= 0]) == [
        user for user, at in zip(ids.to_pylist(), held, strict=True) if at >= 0
    ]


def copied(out: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(out, to)
    about = {**json.loads((out / "_score.json").read_text()), **changes}
    (to / "_score.json").write_text(json.dumps(about))
    return to


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dataset": "0" * 64}, "lists of dataset 000000000000"),
        ({"config": "0" * 64, "workdir": "elsewhere"}, "another config, elsewhere"),
        ({"weights": "0" * 32}, "made by other weights"),
        ({"items": "0" * 64}, "lists with items of --items"),
        ({"step": 5}, "step 5"),
        ({"parts": 9}, "9 of 9 parts are missing"),
        ({"k": 5}, "_score.json says 5 at most"),
        ({"k": 33}, "holds lists of 33 items"),
        ({"k": None}, "k is None; score again"),
        ({"k": 0}, "k is 0; score again"),
        ({"parts": "4"}, "parts is '4'; score again"),
        ({"parts": 10**12}, "1000000000000 of 1000000000000 parts are missing"),
        ({"split": "[/x]"}, "split is '[/x]'; score again"),
        ({"step": True}, "step is True; score again"),
        ({"file_format": ["../x"]}, "file_format is ['../x']; score again"),
    ],
)
def test_lists_of_something_else_are_refused(change, told, made: Made, out: Path, tmp_path: Path, capsys):
    folder = copied(out, tmp_path / "lists", **change)
    before = digest(made.workdir)
    assert dynrec("evaluate", workdir=made.workdir, lists=folder) == 2
    assert told in one_line(capsys)
    assert digest(made.workdir) == before


def test_a_folder_that_is_not_whole_is_refused(
    made: Made, out: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    for folder in (tmp_path / "nowhere", made.workdir):
        assert dynrec("evaluate", workdir=made.workdir, lists=folder) == 2
        assert "holds no _score.json" in one_line(capsys)
    folder = copied(out, tmp_path / "lists")
    part = sorted(folder.glob("*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:100])
    assert dynrec("evaluate", workdir=made.workdir, lists=folder) == 2
    assert "is not what _parts.log says" in one_line(capsys)
    pq.write_table(pa.table({"user_id": ["a"], "item_ids": [["x", None]]}), part)
    monkeypatch.setattr(lists, "is_whole", lambda path, record: True)
    with pytest.raises(DataError, match="an item without id"):
        list(batches(open_written(folder)))
    part.unlink()
    assert dynrec("evaluate", workdir=made.workdir, lists=folder) == 2
    assert "1 of 4 parts are missing" in one_line(capsys)
    with pytest.raises(DataError, match="recommends 'y', which is no item"):
        item_numbers(pa.array([["x", "y"], []]), pa.array(["x", "z"]), 3, folder)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"split": "validation"}, "--split"),
        ({"step": "last"}, "--step"),
        ({"with": "other"}, "--with"),
        ({"table": "int8"}, "--table"),
        ({"prune": 0.5}, "--prune"),
        ({"attributes": "brand"}, "no item column of attributes 'brand'; found title"),
        ({"out": "nowhere/lists.json"}, "--out=nowhere/lists.json"),
    ],
)
def test_what_the_lists_say_themselves_is_not_asked(flags, told, made: Made, out: Path, capsys):
    assert dynrec("evaluate", workdir=made.workdir, lists=out, **flags) == 2
    assert told in one_line(capsys)


def test_ids_that_look_like_times_and_long_lines_are_read_from_json_lines(tmp_path: Path):
    """A line is longer than two of the blocks that Arrow reads by default."""
    items = [str(time) for time in pd.date_range("2026-01-01", periods=MANY, freq="s")]
    ids = np.stack([np.arange(MANY) + 1, np.zeros(MANY, int)])
    made = Lists(ids, np.ones(ids.shape))
    table = of_lists("user_id", pa.array(["2026-01-31", "2026-02-01"]), made, pa.array(items))
    about = dict.fromkeys(lists.NEEDED, "x") | {"step": 1, "k": MANY, "filter_seen": False, "split": "all"}
    parts = Parts(tmp_path / "out", {**about, "file_format": "jsonl"}, 1, "jsonl")
    parts.write(0, table)
    ((users, found),) = batches(open_written(tmp_path / "out"))
    assert users.to_pylist() == ["2026-01-31", "2026-02-01"]
    assert found.to_pylist() == [items, []]


@pytest.mark.parametrize("flag", ["attributes", "out"])
def test_what_is_of_lists_alone_is_refused_without(flag, made: Made, capsys):
    assert dynrec("evaluate", workdir=made.workdir, **{flag: "x"}) == 2
    assert f"--{flag}: is for --lists alone" in one_line(capsys)


def test_lists_made_anew_are_of_the_first_candidates_and_more_varied_or_more_like_the_history(
    made: Made, out: Path, tmp_path: Path, capsys
):
    flags = {"workdir": made.workdir, "split": "test", "k": K}
    frames = {}
    for name, more in {
        "plain": {},
        "varied": {"diversify": 0.8, "pool": 20},
        "calibrated": {"calibrate": 0.95, "pool": 20},
    }.items():
        assert dynrec("score", "filter_seen", out=tmp_path / name, **flags, **more) == 0
        frames[name] = pd.read_parquet(tmp_path / name).set_index("user_id")
    whole = pd.read_parquet(out).set_index("user_id")
    for name in ("varied", "calibrated"):
        for user, row in frames[name].iterrows():
            worth = dict(zip(whole.loc[user, "item_ids"][:20], whole.loc[user, "scores"][:20], strict=True))
            assert len(set(row["item_ids"])) == len(row["item_ids"]) == K
            np.testing.assert_allclose(
                [worth[i] for i in row["item_ids"]], row["scores"], rtol=1e-5, atol=1e-6
            )
        both = zip(frames["plain"]["item_ids"], frames[name]["item_ids"], strict=True)
        assert np.mean([list(one) != list(other) for one, other in both]) > 0.5
    found = {name: measured(made, tmp_path / name) for name in frames}
    assert found["varied"][f"diversity@{K}"] > found["plain"][f"diversity@{K}"]
    apart = {name: each["groups"]["all"][f"miscalibration@{K}"] for name, each in found.items()}
    assert apart["calibrated"] < apart["plain"]
    assert found["varied"]["made_by"]["diversify"] == 0.8
    # Another job: what is there is not gone on with.
    capsys.readouterr()
    assert dynrec("score", "filter_seen", out=tmp_path / "varied", **flags, diversify=0.7, pool=20) == 2
    assert "diversify: 0.8 -> 0.7" in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"diversify": 0.5, "calibrate": 0.5}, "--diversify and --calibrate"),
        ({"diversify": 0.5, "k": 9, "pool": 8}, "--pool=8: lists have 9 items"),
        ({"diversify": 0.0, "k": 9, "pool": 9}, "--pool: is for --diversify or --calibrate"),
        ({"diversify": 1.5}, "--diversify=1.5"),
        ({"calibrate": "nan"}, "--calibrate=nan"),
    ],
)
def test_weights_and_pools_that_make_no_sense_are_refused(flags, told, made: Made, tmp_path: Path, capsys):
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "lists", **flags) == 2
    assert told in one_line(capsys)
    assert not (tmp_path / "lists").exists()
