"""Items that came after training, in a world where the text alone says whom they are for."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynrec_jax import workdir as workdirs

from ..commands import Made, digest, dynrec, experiment, one_line, small_run

WORDS = {
    "sea": ["boat", "wave", "harbour", "sail", "anchor", "gull"],
    "cook": ["pan", "flour", "oven", "spice", "dough", "knife"],
    "space": ["rocket", "orbit", "comet", "lunar", "star", "probe"],
}
EACH = 8  # old items of a topic
TOPICS = list(WORDS)
OLD = {topic: [f"{topic}{number}" for number in range(EACH)] for topic in TOPICS}
# Ids that look like numbers or like nothing, and sort before and after the old ones.
NEW = {"sea": "007", "cook": "null", "space": "~new"}
ALL_OLD = {item for items in OLD.values() for item in items}


def histories() -> dict[str, list[str]]:
    """Users who have taken all old items of one topic, so that of it a new one alone is left."""
    rng = random.Random(5)
    return {
        f"{topic}-user{number:02d}": rng.sample(OLD[topic], EACH) for number in range(20) for topic in TOPICS
    }


def described(topic: str, rng: random.Random) -> dict[str, Any]:
    """A title of the topic's words, beside sets and vectors that say nothing of it."""
    return {
        "title": " ".join(rng.sample(WORDS[topic], 4)),
        "genres": rng.sample(["a", "b", "c", "d"], 2),
        "image": [rng.gauss(0, 1) for _ in range(3)],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def new_rows() -> list[dict[str, Any]]:
    rng = random.Random(6)
    return [{"item_id": item, **described(topic, rng)} for topic, item in NEW.items()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Made:
    """A run whose items are their ids and their text, by a BERT that is trained with the rest."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "log.txt").write_text("".join(f"{user} {' '.join(own)}\n" for user, own in histories().items()))
    rng = random.Random(7)
    rows = [{"item_id": item, **described(topic, rng)} for topic in TOPICS for item in OLD[topic]]
    items = write(folder / "items.jsonl", rows)
    made = Made(folder / "dataset", folder / "workdir", folder / "experiment.py")
    source = f"sequences:{folder / 'log.txt'}"
    assert dynrec("prepare", source=source, items=items, out=made.dataset, shards=4) == 0
    changes = {
        "item__fusion": "both",
        "item__id_dropout": 0.5,
        "item__text": ("title",),
        "item__text_mode": "tuned",
        "item__text_tokens": 8,
        "item__text_dim": 8,
        "item__text_layers": 1,
        "item__text_rate": 1.0,
        "item__text_dropout": 0.0,
        "evaluation__metric": "ndcg@10",
        "train__steps": 120,
        "train__checkpoint_every": 120,
        "train__evaluate_every": 120,
        "train__batch_size": 16,
    }
    experiment(made.experiment, made.dataset, **changes)
    assert dynrec("train", config=made.experiment, workdir=made.workdir) == 0
    return made


@pytest.fixture(scope="module")
def new_items(tmp_path_factory) -> Path:
    """The new items; two rows more are items of the dataset, told of as if they were of another topic."""
    rng = random.Random(8)
    known = [{"item_id": OLD[topic][0], **described("cook", rng)} for topic in ("sea", "space")]
    return write(tmp_path_factory.mktemp("items") / "new.jsonl", [*known[:1], *new_rows(), *known[1:]])


@pytest.fixture(scope="module")
def lists(world, new_items, tmp_path_factory) -> Path:
    """All that is left for each user, with the new items."""
    out = tmp_path_factory.mktemp("lists") / "out"
    before = digest(world.workdir), digest(world.dataset)
    assert score(world, out, items=new_items) == 0
    assert (digest(world.workdir), digest(world.dataset)) == before
    return out


@pytest.fixture(scope="module")
def plain(world, lists, tmp_path_factory) -> Path:
    """The same without the new items, asked for after them."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert score(world, out) == 0
    return out


def score(made: Made, out: Path, **values: Any) -> int:
    return dynrec("score", "filter_seen", workdir=made.workdir, out=out, **{"k": 3 * EACH, **values})


def read(out: Path) -> dict[str, list[str]]:
    table = pq.read_table(out)
    assert table.schema.field("item_ids").type == pa.list_(pa.string())
    return dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))


def topic_of(user: str) -> str:
    return user.partition("-")[0]


def test_a_new_item_comes_first_for_those_whom_its_text_is_for(lists):
    found = read(lists)
    assert found.keys() == histories().keys()
    for user, items in found.items():
        assert items[0] == NEW[topic_of(user)]
        # All that was not seen is offered, the new items of other topics too, by the ids of the file.
        assert len(items) == len(set(items))
        assert set(items) == (ALL_OLD - set(OLD[topic_of(user)])) | set(NEW.values())


def test_without_the_file_the_lists_are_those_of_the_dataset(lists, plain):
    """New items change nothing of what the others score, and stay in no folder of the run's."""
    both, old = (pd.read_parquet(out).set_index("user_id") for out in (lists, plain))
    assert list(both.index) == list(old.index)
    for user, row in old.iterrows():
        assert set(row["item_ids"]) == ALL_OLD - set(OLD[topic_of(str(user))])
        found = dict(zip(both.loc[user, "item_ids"], both.loc[user, "scores"], strict=True))
        np.testing.assert_allclose(
            [found[item] for item in row["item_ids"]], row["scores"], rtol=0, atol=1e-5
        )


def test_a_new_item_has_no_id_of_its_own(world, new_items):
    old, run = workdirs.open(world.workdir), workdirs.open(world.workdir, items=new_items)
    assert run.item_ids.to_pylist() == [*sorted(ALL_OLD), *sorted(NEW.values())]
    table_RxD, known_RxD = (np.asarray(each.tables["item_id"]) for each in (run, old))
    own = 1 + len(ALL_OLD)
    np.testing.assert_array_equal(table_RxD[:own], known_RxD[:own])
    assert known_RxD[1:own].any(axis=1).all()
    assert not table_RxD[own:].any()


def test_histories_may_hold_new_items(world, new_items, lists, tmp_path, capsys):
    """One new item alone says which topic it is; known items are left out of the file, and that is said."""
    rows = [(f"{topic}-stranger", [item]) for topic, item in NEW.items()]
    rows += [(user, own) for user, own in histories().items() if user.endswith("00")]
    rows += [("sea-lost", [*OLD["sea"], "no-such-item"])]
    users, own = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_ids": own}), tmp_path / "users.parquet")
    capsys.readouterr()
    assert score(world, tmp_path / "out", items=new_items, users=tmp_path / "users.parquet") == 0
    told = capsys.readouterr().err
    assert "3 new items are recommended too" in told
    assert "2 items of --items are the dataset's and were left out" in told
    assert "1 events of unknown items left out" in told
    found, before = read(tmp_path / "out"), read(lists)
    assert list(found) == list(users)
    for topic, item in NEW.items():
        shown = found[f"{topic}-stranger"]
        assert item not in shown
        assert set(shown[:EACH]) == set(OLD[topic])
        assert found[f"{topic}-user00"] == before[f"{topic}-user00"]
    assert found["sea-lost"][0] == NEW["sea"]


def test_a_job_goes_on_with_its_own_items_alone(world, new_items, lists, plain, tmp_path, capsys):
    rows = new_rows()
    rows[0]["title"] = "knife oven"
    other = write(tmp_path / "other.jsonl", rows)
    for out, items in ((lists, {"items": other}), (lists, {}), (plain, {"items": new_items})):
        before = digest(out)
        capsys.readouterr()
        assert score(world, out, **items) == 2
        assert str(out) in one_line(capsys)
        assert digest(out) == before
    # The order of the rows and what the model leaves out are no other items.
    same = write(tmp_path / "same.jsonl", new_rows()[::-1])
    before = digest(lists)
    assert score(world, lists, items=same) == 0
    assert "1 parts in" in (told := capsys.readouterr().out)
    assert "(1 were there already)" in told
    assert digest(lists) == before


def test_a_file_may_know_less_and_more_than_the_dataset(world, lists, tmp_path):
    """Columns that the model does not read are not looked at, whatever they hold; one that it reads is enough."""
    rows = [
        {"item_id": row["item_id"], "title": row["title"], "genres": odd, "odd": odd, "place": "here"}
        for row, odd in zip(new_rows(), ["x", [1.5], {"y": 2}], strict=True)
    ]
    items = write(tmp_path / "new.jsonl", rows)
    assert score(world, tmp_path / "out", items=items) == 0
    assert read(tmp_path / "out") == read(lists)


def test_a_rule_is_on_columns_that_the_model_does_not_read_too(world, tmp_path):
    rows = [{**row, "genres": [genre]} for row, genre in zip(new_rows(), "aab", strict=True)]
    items = write(tmp_path / "new.jsonl", rows)
    rule = "list_contains(genres, 'a')"
    assert score(world, tmp_path / "out", items=items, where=rule, k=5) == 0
    shown = {item for own in read(tmp_path / "out").values() for item in own}
    assert shown & set(NEW.values()) == {NEW["sea"], NEW["cook"]}


REFUSED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "no column of the model": (
        [{"item_id": "new", "genres": ["a"], "name": "boat"}],
        ["genres, name", "title"],
    ),
    "no new item": (
        [{"item_id": OLD["sea"][0], "title": "boat"}, {"item_id": OLD["cook"][1], "title": "pan"}],
        ["all of its 2 items"],
    ),
    "sets for text": ([{"item_id": "new", "title": ["boat", "sail"]}], ["'title'", "set", "expected text"]),
    "nothing in the model's column": (
        [{"item_id": "new", "title": " "}],
        ["none of its 1 new items", "title"],
    ),
    "no id": ([{"title": "boat"}], ["item_id"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_meant_is_refused(name, world, tmp_path, capsys):
    rows, named = REFUSED[name]
    items = write(tmp_path / "new.jsonl", rows)
    capsys.readouterr()
    assert score(world, tmp_path / "out", items=items) == 2
    line = one_line(capsys)
    assert str(items) in line
    assert [part for part in named if part not in line] == []
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_refused(world, tmp_path, capsys):
    for items in (tmp_path / "nowhere.jsonl", tmp_path):
        assert score(world, tmp_path / "out", items=items) == 2
        assert str(items) in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_longer_than_the_catalogue_with_the_new_items_is_refused(world, new_items, tmp_path, capsys):
    assert score(world, tmp_path / "out", items=new_items, k=3 * EACH + 4) == 2
    assert "27 items" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_of_ids_alone_is_refused(tmp_path_factory, new_items, tmp_path, capsys):
    run = small_run(tmp_path_factory)
    capsys.readouterr()
    assert score(run, tmp_path / "out", items=new_items) == 2
    line = one_line(capsys)
    assert [part for part in (str(new_items), "ids alone", "item.fusion") if part not in line] == []
    assert not (tmp_path / "out").exists()
