"""Items that came after training, or that it was kept from: they are recommended by what describes them."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.cold import cold_items
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.new_items import read_new_items
from dynrec_jax.models.towers.ids import ID_TABLE

from ..commands import Made, digest, dynrec, experiment, one_line
from ..described import dataset, write_items

pytestmark = pytest.mark.slow  # a run for each fusion

TOPICS = {"jazz": "saxophone trumpet", "chess": "bishop rook", "soup": "leek onion"}
EACH = 8  # items of a topic
WORDS = ["old", "new", "fine", "small", "great"]


def title(topic: str, number: int) -> str:
    """A topic's words with others that say nothing."""
    return f"{WORDS[number % 5]} {TOPICS[topic]} {WORDS[(number + 2) % 5]}"


KNOWN = [
    {
        "item_id": f"{topic}{number}",
        "title": title(topic, number),
        "v": [0.1 * number - (place == k) for k in range(3)],
    }
    for place, topic in enumerate(TOPICS)
    for number in range(EACH)
]
NEW = [
    {
        "item_id": f"a new {topic}",
        "title": title(topic, 6),
        "v": [0.6 - (place == k) for k in range(3)],
        "year": "2001",
    }
    for place, topic in enumerate(TOPICS)
]
TEXT = {
    "item__text": ("title",), "item__text_mode": "tuned", "item__text_dim": 8, "item__text_layers": 1,
    "item__text_tokens": 16, "item__text_vocabulary": 128, "item__text_rate": 1.0, "item__text_refresh": 10,
}  # fmt: skip
NEWS: dict[str, dict[str, Any]] = {  # by fusion, how its items are described
    "both": {**TEXT, "item__id_dropout": 0.7},
    "text": {"item__vectors": ("v",)},
    "ensemble": {"item__vectors": ("v",)},
}
COLD = 0.2
STEPS = 120


def world(folder: Path) -> Any:
    """Users who stay in their topic."""
    rng = random.Random(2)
    log = []
    for user in range(48):
        topic = list(TOPICS)[user % 3]
        log.append(" ".join([f"{topic}-{user}", *(f"{topic}{rng.randrange(EACH)}" for _ in range(9))]))
    return dataset(folder, log, KNOWN)


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained runs by fusion, and `new.jsonl` beside them."""
    folder = tmp_path_factory.mktemp("news")
    made, runs = world(folder / "world"), {}
    write_items(folder / "new.jsonl", NEW + KNOWN[:2])

    def run(fusion: str) -> Made:
        if fusion not in runs:
            keys = {
                "item__fusion": fusion, "data__cold_items": COLD, "model__normalise": True, "model__temperature": 0.1,
                "evaluation__ks": (1, 5, 10),
                "train__steps": STEPS, "train__batch_size": 16, "train__learning_rate": 0.03,
                "train__checkpoint_every": STEPS, "train__evaluate_every": 0,
            }  # fmt: skip
            config = experiment(folder / f"{fusion}.py", made.path, **keys, **NEWS[fusion])
            assert dynrec("train", config=config, workdir=folder / fusion) == 0
            runs[fusion] = Made(made.path, folder / fusion, config)
        return runs[fusion]

    return run


def lists(out: Path) -> dict[str, list[str]]:
    frame = pd.read_parquet(out)
    return {user: list(items) for user, items in zip(frame["user_id"], frame["item_ids"], strict=True)}


def score(made: Made, out: Path, *switches: str, **values: Any) -> dict[str, list[str]]:
    assert dynrec("score", *switches, workdir=made.workdir, out=out, **values) == 0
    return lists(out)


FUSIONS = ["both", "text", "ensemble"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_users_get_the_new_item_of_their_topic(fusion, news, tmp_path, capsys):
    """First of all where they have seen the others of their topic, which are left out."""
    made = news(fusion)
    everything = {topic: [f"{topic}{n}" for n in range(EACH)] for topic in TOPICS}
    # Histories may hold new items: the last one has nothing else.
    histories = everything | {"of new": ["a new chess"]}
    users = tmp_path / "users.csv"
    rows = [f"{user},{item}" for user, items in histories.items() for item in items]
    users.write_text("\n".join(["user_id,item", *rows, "of new,nobody knows"]) + "\n")
    new = made.workdir.parent / "new.jsonl"
    capsys.readouterr()
    found = score(made, tmp_path / "out", "filter_seen", items=new, users=users, k=5)
    told = capsys.readouterr().err
    assert "3 new items are recommended too" in told
    assert "2 rows of --items are items of the dataset and were left out" in told
    assert "1 events of unknown items left out" in told
    for topic in TOPICS:
        assert found[topic][0] == f"a new {topic}", found
    assert all("chess" in item for item in found["of new"]), found
    # Started again with other items it is another job.
    before = digest(tmp_path / "out")
    other = write_items(tmp_path / "other.jsonl", NEW[:2])
    for items in ({"items": other}, {}):
        capsys.readouterr()
        again = {"workdir": made.workdir, "out": tmp_path / "out", "users": users, "k": 5, **items}
        assert dynrec("score", "filter_seen", **again) == 2
        assert str(tmp_path / "out") in one_line(capsys)
    assert digest(tmp_path / "out") == before


@pytest.mark.parametrize("fusion", ["text", "both", "ensemble"])
def test_without_new_items_in_the_lists_they_are_what_they_were(fusion, news, tmp_path):
    made = news(fusion)
    strangers = [{"item_id": "zzz", "title": "", "v": [0.0, 0.0, 0.0]}, {"item_id": "zz", "title": None}]
    file = write_items(tmp_path / "new.jsonl", [*NEW, *strangers])
    without = score(made, tmp_path / "without", k=24)
    with_new = score(made, tmp_path / "with", items=file, k=24 + 5)
    for user, items in with_new.items():
        assert sorted(items) == sorted([*(row["item_id"] for row in KNOWN + NEW), "zz", "zzz"])
        assert [item for item in items if item in without[user]] == without[user]
    # The order of a file is not that of its items.
    turned = write_items(tmp_path / "turned.jsonl", [*strangers, *reversed(NEW)])
    own = open_dataset(made.dataset)
    one, other = (read_new_items(path, own, {"title"}).table for path in (file, turned))
    assert one.equals(other)
    assert one.column("index").to_pylist() == list(range(25, 30))


def test_neither_new_items_nor_cold_ones_have_a_row_of_their_own(news):
    made = news("both")
    run = workdirs.open(made.workdir, items=made.workdir.parent / "new.jsonl")
    assert run.item_ids.to_pylist()[24:] == sorted(row["item_id"] for row in NEW)
    assert (run.items.number, run.new.known, run.dataset.items) == (27, 2, 24)
    rows = np.asarray(run.tables[ID_TABLE]).any(axis=1)
    assert rows[:25].tolist() == [False, *~cold_items(24, COLD)[1:]]
    assert not rows[25:].any()


def test_in_a_catalogue_that_needs_more_rows(tmp_path):
    """255 items and padding fill 256 rows: with new ones the tables are longer, and some items have other rows."""
    rows = [
        {"item_id": f"i{n:03d}", "v": [float(n % 3 == k) + 0.01 * n for k in range(3)]} for n in range(255)
    ]
    log = [" ".join([f"u{n}", *(f"i{(3 * at + 7 * n) % 255:03d}" for at in range(9))]) for n in range(85)]
    made = dataset(tmp_path / "large", log, rows)
    keys = {"item__fusion": "both", "item__vectors": ("v",), "train__evaluate_every": 0}
    config = experiment(tmp_path / "large.py", made.path, **keys)
    assert dynrec("train", config=config, workdir=tmp_path / "run") == 0
    run = Made(made.path, tmp_path / "run", config)
    new = write_items(
        tmp_path / "new.jsonl", [{"item_id": f"n{n}", "v": [1.0, 0.0, 0.5 * n]} for n in range(9)]
    )
    without = score(run, tmp_path / "without", k=255)
    for user, items in score(run, tmp_path / "with", items=new, k=264).items():
        assert [item for item in items if not item.startswith("n")] == without[user]
    opened = workdirs.open(tmp_path / "run", items=new)
    table = np.asarray(opened.tables[ID_TABLE])
    assert table.shape[0] == 512
    assert not table[256:].any()
    assert table[1:256].any(axis=1).all()
    assert json.loads((made.path / "dataset.json").read_text())["counts"]["items"] == 255
    shutil.rmtree(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ cold items


def metrics_of(frame: pd.DataFrame, target: dict[str, str]) -> dict[str, float]:
    """Recall, ndcg and mrr of lists by the place of each user's target."""
    place = [
        list(items).index(target[user]) + 1 if target[user] in set(items) else np.inf
        for user, items in zip(frame["user_id"], frame["item_ids"], strict=True)
    ]
    rank = np.array(place)
    found = {"mrr": float((1 / rank).mean())}
    for k in (1, 5, 10):
        found[f"recall@{k}"] = float((rank <= k).mean())
        found[f"ndcg@{k}"] = float(np.where(rank <= k, 1 / np.log2(rank + 1), 0).mean())
    return found


def test_evaluation_tells_how_cold_items_are_found(news, tmp_path):
    made = news("both")
    assert dynrec("evaluate", workdir=made.workdir, split="test") == 0
    assert dynrec("score", "filter_seen", workdir=made.workdir, out=tmp_path / "out", split="test", k=24) == 0
    result = json.loads((made.workdir / "evaluation" / "test.json").read_text())
    items = sorted(row["item_id"] for row in KNOWN)
    cold = {item for number, item in enumerate(items, 1) if cold_items(24, COLD)[number]}
    log = {
        line.split()[0]: line.split()[1:]
        for line in (made.dataset.parent / "log.txt").read_text().splitlines()
    }
    target = {user: events[-1] for user, events in log.items()}
    frame = pd.read_parquet(tmp_path / "out")
    only = frame[frame["user_id"].map(lambda user: target[user] in cold)]
    assert result["protocol"]["cold_items"] == COLD
    assert result["cold"]["users"] == len(only) > 5
    for name, value in metrics_of(only, target).items():
        assert abs(result["cold"][name] - value) < 1e-6, name
    for name, value in metrics_of(frame, target).items():
        assert abs(result[name] - value) < 1e-6, name
    assert abs(result["cold"]["mrr"] - result["mrr"]) > 1e-4, (
        "they must differ for the comparison to mean something"
    )
    # Popularity knows of no event of theirs: they are the last of its lists.
    warm = [event for events in log.values() for event in events[:-2] if event not in cold]
    order = sorted(items, key=lambda item: (-warm.count(item), item))
    assert set(order[-len(cold) :]) == cold
    shown = [[item for item in order if item not in events[:-1]] for events in log.values()]
    popular = pd.DataFrame({"user_id": list(log), "item_ids": shown})
    for name, value in metrics_of(popular, target).items():
        assert abs(result["baselines"]["popularity"][name] - value) < 1e-6, name
    assert metrics_of(popular[popular["user_id"].isin(only["user_id"])], target)["recall@10"] == 0
