"""`dynrec explain`: what it prints and writes, words of the data shown as they are, and mistakes told in one line."""

import dataclasses
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.explain.explainer import Event, Explanation
from dynrec_jax.explain.tell import picture_of, table_of

from ..commands import Made, dynrec, one_line, small_run

EVIL = "[red]x[/red] [/] $\\frac{1}$ \x1b[31m\nnext $"
WRITTEN = {"user", "item", "score", "rank", "method", "baseline", "events", "rest", "residual"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_run(tmp_path_factory)


@pytest.fixture(scope="module")
def user(made: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    stored = Histories(open_dataset(made.dataset), tmp_path_factory.mktemp("cache"))
    return stored.ids_of(np.array([int(stored.lengths.argmax())]))[0]


def evil(**changes: object) -> Explanation:
    """An explanation of an item, user and events with such words."""
    shares = (2.0, 0.5, -1.0)
    events = tuple(
        Event(4 - i, EVIL, EVIL if i else None, 1_700_000_000 + i, EVIL, share, 100 * share / 3.5)
        for i, share in enumerate(shares)
    )
    plain = Explanation(
        EVIL, EVIL, EVIL, 2.25, 1, True, 0.5, 2, "deletion", 0.5, "no history", events, 7, 0.25
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_a_table_and_both_files(made, user, tmp_path, capsys):
    files = {"out": tmp_path / "why.json", "picture": tmp_path / "why.png"}
    assert dynrec("explain", workdir=made.workdir, user=user, top=3, **files) == 0
    printed = capsys.readouterr().out
    found = json.loads(files["out"].read_text())
    assert found.keys() >= WRITTEN
    assert found["user"] == user
    assert len(found["events"]) == 3
    shares = sum(event["share"] for event in found["events"])
    assert found["baseline"] + shares + found["rest"] + found["residual"] == pytest.approx(found["score"])
    for event in found["events"]:
        assert event["item_id"] in printed
    assert "5 others" in printed
    assert f"written to {files['picture']}" in printed.replace("\n", "")
    assert imread(files["picture"]).std() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["why.json", "why.png"]


def test_the_check_prints_and_writes_how_faithful_methods_are(made, tmp_path, capsys):
    out = tmp_path / "check.json"
    assert dynrec("explain", workdir=made.workdir, check=4, steps=4, out=out) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["users"] == 4
    assert list(found["methods"]) == ["last events", "auto", "deletion", "gradients"]
    for name, method in found["methods"].items():
        assert name.split()[0] in printed
        ratio, loss = method["ratio"]["logit"], method["loss"]["logit"]["mean"]
        chance = found["random"]["logit"]
        if chance["low"] > 0:
            assert ratio["mean"] == pytest.approx(loss / chance["mean"])
        else:
            assert ratio is None


def test_words_of_the_data_are_no_markup():
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    console.print(table_of(evil(), 2))
    text = console.file.getvalue()
    assert (
        text.count("[red]x[/red] [/] $\\frac{1}$ ?[31m next $") == 8
    )  # three above, two and three in the rows
    assert "\x1b" not in text
    assert "1 others" in text
    for part in ("+2.0000", "57.1 %", "-1.0000", "interest 2", "in the history already", "7 older events"):
        assert part in text


def test_ids_are_whole_on_a_narrow_terminal():
    event = Event(1, 70 * "#", 70 * "@", None, None, 1.0, 100.0)
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    console.print(table_of(evil(events=(event,)), 2))
    text = console.file.getvalue()
    assert [text.count(letter) for letter in "#@…"] == [70, 70, 0]


def test_words_of_the_data_are_no_formula():
    words = []

    def keep(figure: Figure, *args: object, **named: object) -> None:
        save(figure, *args, **named)
        labels = figure.axes[0].get_yticklabels()
        words.extend((label.get_text(), label.get_parse_math()) for label in labels)

    save = Figure.savefig
    with mock.patch.object(Figure, "savefig", keep):
        drawn = picture_of(evil(), 2)
    assert drawn.startswith(b"\x89PNG")
    assert [parsed for _, parsed in words] == [False] * 3
    assert words[1][0].startswith("[red]x[/red] [/] $\\frac{1}$ ?[31m next $")


def test_letters_without_a_shape_are_no_warning():
    assert picture_of(evil(title="映画 🎬", user="用户"), 3).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"user": "u1", "out": "no/folder/why.json"}, "--out=no/folder/why.json"),
        ({"user": "u1", "picture": "."}, "--picture=."),
        ({"user": "u1", "out": "a", "picture": "a"}, "--picture=a: is --out too"),
        ({"check": 5, "user": "u1"}, "--check: is of many users; leave --user out"),
        ({"check": 1}, "--check=1"),
        ({"check": 5, "top": 3}, "--check: is of many users; leave --top out"),
        ({"user": "u1", "out": "/dev/null"}, "--out=/dev/null: no file can be written there"),
        ({"user": "u1", "step": "first"}, "--step=first"),
        ({}, "--user is missing"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_the_run_is_opened(
    given, named, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert dynrec("explain", workdir="nowhere", **given) == 2
    assert named in one_line(capsys)
    assert list(Path.cwd().iterdir()) == []


def test_a_user_who_is_not_there_is_told_in_one_line(made, user, tmp_path, capsys):
    assert dynrec("explain", workdir=made.workdir, user=f"{user}0", out=tmp_path / "why.json") == 2
    assert f"user '{user}0': is none of the 60 users" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []
