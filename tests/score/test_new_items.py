"""Items that came after training: recommended by what describes them, with those that training has seen."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.new_items import read_new_items
from dynrec_jax.models.towers.ids import ID_TABLE

from ..commands import Made, digest, dynrec, experiment, one_line, small_run
from ..described import dataset, write_items

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
NEWS: dict[str, dict[str, Any]] = {  # by fusion, how its items are described
    "text": {
        "item__text": ("title",), "item__text_mode": "tuned", "item__text_dim": 8, "item__text_layers": 1,
        "item__text_tokens": 16, "item__text_vocabulary": 128, "item__text_rate": 1.0, "item__text_refresh": 10,
    },
    "both": {"item__vectors": ("v",), "item__id_dropout": 0.5},
    "ensemble": {"item__vectors": ("v",)},
}  # fmt: skip
STEPS = 60


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
                "item__fusion": fusion, "model__normalise": True, "model__temperature": 0.1,
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


FUSIONS = ["text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("both", "ensemble"))]


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
    # Started again it has nothing to do; with other items it is another job.
    before = digest(tmp_path / "out")
    assert dynrec(
        "score", "filter_seen", workdir=made.workdir, out=tmp_path / "out", items=new, users=users, k=5
    ) == 0  # fmt: skip
    other = write_items(tmp_path / "other.jsonl", NEW[:2])
    for items in ({"items": other}, {}):
        capsys.readouterr()
        again = {"workdir": made.workdir, "out": tmp_path / "out", "users": users, "k": 5, **items}
        assert dynrec("score", "filter_seen", **again) == 2
        assert str(tmp_path / "out") in one_line(capsys)
    assert digest(tmp_path / "out") == before


@pytest.mark.parametrize("fusion", FUSIONS)
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


def test_new_items_have_no_row_of_their_own(news, tmp_path):
    made = news("text")
    run = workdirs.open(made.workdir, items=made.workdir.parent / "new.jsonl")
    assert run.item_ids.to_pylist()[24:] == sorted(row["item_id"] for row in NEW)
    assert (run.items.number, run.new.known, run.dataset.items) == (27, 2, 24)
    assert ID_TABLE not in run.tables


NOTHING = [{"item_id": "new", "colour": "red"}]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (None, ["nowhere.jsonl", "no such file"]),
        (KNOWN[:3], ["items.jsonl", "all of its 3 items are in the dataset"]),
        (NOTHING, ["items.jsonl", "colour", "expected one of these", "title"]),
        ([{"item_id": "new", "title": ["a", "b"]}], ["items.jsonl", "'title' is list"]),
        ([{"title": "a"}], ["items.jsonl", "item_id"]),
    ],
)
def test_files_that_are_refused(rows, named, news, tmp_path, capsys):
    made = news("text")
    file = tmp_path / "nowhere.jsonl" if rows is None else write_items(tmp_path / "items.jsonl", rows)
    capsys.readouterr()
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "out", items=file) == 2
    line = one_line(capsys)
    assert [part for part in named if part not in line] == []
    assert not (tmp_path / "out").exists()


def test_a_run_of_ids_alone_knows_nothing_of_new_items(tmp_path_factory, tmp_path, capsys):
    made = small_run(tmp_path_factory)
    file = write_items(tmp_path / "items.jsonl", NEW)
    capsys.readouterr()
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "out", items=file) == 2
    line = one_line(capsys)
    assert "items.jsonl" in line
    assert "item.fusion" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
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
