"""What describes items, and cannot be used, through the command line: one line that names it, and no run folder."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.data.tokens import save_tokenizer, train_tokenizer

from .commands import digest, dynrec, experiment, one_line

GOLDEN = Path(__file__).parent / "models" / "golden" / "tiny"
TITLES = ["red boat", "red sail", "blue boat", "blue wave", "warm bread", "warm oven", "new pan", "new dough"]
FROZEN = {"item__text": ("title",), "item__bert": "bert"}
TUNED = {"item__text": ("title",), "item__text_mode": "tuned", "item__text_dim": 8}
IMAGES = {"item__vectors": ("image",)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a dataset of eight items, and a BERT with a tokenizer that goes with it."""
    folder = tmp_path_factory.mktemp("bad_text")
    rng = random.Random(0)
    lines = [" ".join([f"u{user}", *(f"i{n}" for n in rng.sample(range(8), 5))]) for user in range(12)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    rows = [
        {
            "item_id": f"i{number}",
            "title": title,
            "blank": "",
            "unreadable": "\ufffd \ufffd",
            "maker": f"maker {number}",
            "image": [rng.random() for _ in range(3)],
        }
        for number, title in enumerate(TITLES)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"sequences:{folder / 'log.txt'}"
    assert (
        dynrec("prepare", source=source, items=folder / "items.jsonl", out=folder / "dataset", shards=4) == 0
    )
    shutil.copytree(GOLDEN, folder / "bert")
    save_tokenizer(train_tokenizer(TITLES, 60), folder / "bert")
    return folder


@pytest.fixture
def at(prepared, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a dataset and a BERT of its own."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(at: Path, **changes: Any) -> Path:
    keys = {"item__fusion": "both", "item__text_tokens": 8, "evaluation__metric": "mrr", **changes}
    return experiment(at / "experiment.py", at / "dataset", **keys)


def refused(at: Path, capsys, *named: str, **changes: Any) -> None:
    """Training exits with 2 and one line that has `named` in it; nothing is made, beside the dataset neither."""
    path = config(at, **changes)
    before = digest(at)
    capsys.readouterr()
    assert dynrec("train", config=path, workdir="run") == 2
    line = one_line(capsys)
    assert [part for part in named if part not in line] == []
    assert digest(at) == before


@pytest.mark.parametrize("changes", [FROZEN, TUNED, {**FROZEN, "item__text_mode": "tuned"}, IMAGES])
def test_without_a_fault_a_run_begins(changes, at, monkeypatch):
    """So that what follows is refused for its one fault alone."""
    from dynrec_jax.train import loop

    monkeypatch.setattr(loop, "train", lambda *_: {"step": 0})
    assert dynrec("train", config=config(at, **changes), workdir="run") == 0
    assert (at / "run" / "config.json").is_file()
    assert (at / "run" / "bert" / "config.json").is_file() == ("item__text" in changes)


def another_network(bert: Path) -> None:
    found = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**found, "model_type": "roberta"}))


def cut_short(bert: Path) -> None:
    raw = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def pickle_alone(bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")


def more_words(bert: Path) -> None:
    save_tokenizer(train_tokenizer([f"{title} wonderful thing" for title in TITLES], 100), bert)


def no_tokenizer(bert: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (bert / name).unlink()


@pytest.mark.parametrize("mode", ["frozen", "tuned"])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (shutil.rmtree, ["bert", "no such"]),
        (another_network, ["bert/config.json", "'roberta'"]),
        (cut_short, ["bert/model.safetensors", "damaged"]),
        (pickle_alone, ["pytorch_model.bin", "pickle"]),
        (more_words, ["bert", "the weights' 60"]),
        (no_tokenizer, ["bert", "tokenizer.json"]),
    ],
)
def test_a_bert_folder_that_is_not_what_it_must_be(fault: Callable[[Path], None], named, mode, at, capsys):
    fault(at / "bert")
    refused(at, capsys, *named, **FROZEN, item__text_mode=mode)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({**FROZEN, "item__text": ("title", "name")}, ["item.text", "'name'", "title"]),
        ({**FROZEN, "item__text": ("blank",)}, ["item.text", "no item", "blank"]),
        ({**TUNED, "item__text": ("blank",)}, ["item.text", "no item", "blank"]),
        ({**TUNED, "item__text": ("unreadable",)}, ["item.text", "no item", "unreadable"]),
        ({**FROZEN, "item__text": ("image",)}, ["item.text", "'image'", "expected text"]),
        ({**FROZEN, "item__text_tokens": 21}, ["item.text_tokens", "21", "bert", "20 positions"]),
        (
            {**FROZEN, "item__text_mode": "tuned", "item__text_from": 3},
            ["item.text_from", "3", "bert", "2 layers"],
        ),
        ({**TUNED, "item__text_from": 3, "item__text_layers": 2}, ["item.text_from", "3", "expected 2"]),
        ({**FROZEN, "item__bert": ""}, ["item.bert", "item.text_mode=tuned"]),
        ({**FROZEN, "item__fusion": "id"}, ["item.text", "item.fusion=id"]),
        ({**IMAGES, "item__fusion": "id"}, ["item.vectors", "item.fusion=id"]),
        ({}, ["item.fusion", "'both'", "item.text"]),
        ({"item__attributes": ("brand",)}, ["item.attributes", "'brand'", "title"]),
        ({"item__attributes": ("maker",)}, ["item.attributes", "'maker'", "shared"]),
        ({"item__vectors": ("picture",)}, ["item.vectors", "'picture'", "image"]),
        ({"item__vectors": ("title",)}, ["item.vectors", "'title'", "lists of numbers"]),
        ({"item__triples": True}, ["item.triples", "dataset", "--triples"]),
        ({**IMAGES, "data__cold_items": 1.0}, ["data.cold_items", "1.0"]),
    ],
)
def test_a_config_that_asks_for_what_is_not_there(changes, named, at, capsys):
    refused(at, capsys, *named, **changes)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"item_id": "i0", "v": [0.5, 1]}\n{"item_id": "i1", "v": [0.5]}\n', ["items.jsonl:2", "'v'"]),
        (b'{"item_id": "i0", "v": "a"}\n{"item_id": "i1", "v": "Jos\xe9"}\n', ["items.jsonl:2", "UTF-8"]),
    ],
)
def test_prepare_refuses_a_file_of_items(raw, named, at, capsys):
    (at / "items.jsonl").write_bytes(raw)
    before = digest(at)
    capsys.readouterr()
    assert dynrec("prepare", source="sequences:log.txt", items="items.jsonl", out="other") == 2
    line = one_line(capsys)
    assert [part for part in named if part not in line] == []
    assert digest(at) == before
