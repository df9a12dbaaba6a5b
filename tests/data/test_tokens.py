"""Tokenizers: opened as Hugging Face writes them, trained the same each time, read by transformers, checked."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dynrec_jax.data.tokens import (
    CHUNK,
    SPECIAL,
    check_agrees,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    train_tokenizer,
)
from dynrec_jax.errors import DataError

WORDS = [
    *(
        "bolt",
        "bolts",
        "bolted",
        "nut",
        "nuts",
        "steel",
        "steels",
        "stainless",
        "screw",
        "screws",
        "driver",
        "drivers",
    ),
    *("Größe", "naïve", "12", "40", "mm"),
]


def catalogue(texts: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) + "." for _ in range(texts)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(catalogue(300), 120)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    save_tokenizer(trained, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


VOCABULARY = [*SPECIAL, "hello", "world", "##s", ",", "h", "##i", "Hello"]


def by_hand(tmp_path: Path, **config: object) -> Tokenizer:
    """A folder as the first BERTs had it: a word a line, and perhaps how to read them."""
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", **config})
        )
    return load_tokenizer(tmp_path)


def test_rows_by_hand(tmp_path):
    tokenizer = by_hand(tmp_path)
    ids, lengths = tokenize(tokenizer, ["Hello worlds, hi", "", "world", " \n\t", "zebra hello"], 7)
    # [CLS] hello world ##s , h | ##i is cut off, and [SEP] ends it.
    assert ids.tolist() == [
        [2, 5, 6, 7, 8, 9, 3],
        [0, 0, 0, 0, 0, 0, 0],
        [2, 6, 3, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [2, 1, 5, 3, 0, 0, 0],
    ]
    assert lengths.tolist() == [7, 0, 3, 0, 4]
    assert ids.dtype == lengths.dtype == np.int32


def test_the_case_is_kept_where_the_folder_says_so(tmp_path):
    ids, _ = tokenize(by_hand(tmp_path, do_lower_case=False), ["Hello hello HELLO"], 6)
    assert ids.tolist() == [[2, VOCABULARY.index("Hello"), 5, 1, 3, 0]]


def test_a_text_is_read_alike_wherever_it_stands(trained):
    texts = catalogue(CHUNK + 40, seed=1)
    ids, lengths = tokenize(trained, texts, 12)
    assert ids.shape == (CHUNK + 40, 12)
    assert ((ids != 0).sum(1) == lengths).all()
    assert lengths.max() == 12
    assert lengths.min() < 12
    for row in (0, 7, CHUNK - 1, CHUNK, CHUNK + 39):
        alone, length = tokenize(trained, [texts[row]], 12)
        np.testing.assert_array_equal(alone[0], ids[row])
        assert length[0] == lengths[row]
    narrow, short = tokenize(trained, texts, 5)
    np.testing.assert_array_equal(narrow[:, :4], np.where(lengths[:, None] < 5, ids[:, :4], narrow[:, :4]))
    np.testing.assert_array_equal(short, np.minimum(lengths, 5))
    assert (narrow[lengths >= 5, 4] == 3).all()
    none, zero = tokenize(trained, [], 5)
    assert none.shape == (0, 5)
    assert zero.shape == (0,)


def test_what_the_file_asks_for_of_cutting_and_filling_up_is_left_out(folder):
    asked = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked.enable_truncation(4)
    asked.enable_padding(length=9)
    asked.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("bolt nut steel screw driver bolt").ids) > 4
    assert tokenize(tokenizer, ["bolt"], 8)[1].tolist() == [3]


def test_training_gives_the_same_whatever_the_order_and_the_run():
    # More characters than are kept, many of them equally often, and equally frequent pairs.
    texts = catalogue(60) + ["".join(chr(0x3B1 + (at + k) % 24) for k in range(3)) for at in range(24)]
    found = {train_tokenizer(order, 90).to_str() for order in (texts, texts, texts[::-1], sorted(texts))}
    assert len(found) == 1


def test_a_trained_vocabulary_begins_with_berts_tokens_and_keeps_its_size(trained):
    vocabulary = trained.get_vocab()
    first = sorted(vocabulary, key=vocabulary.__getitem__)[:5]
    assert first == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) <= 120
    # Frequent words are one token each, and words that were never seen are put together.
    assert {"bolt", "stainless", "große", "naive"} <= vocabulary.keys()
    assert "[UNK]" not in trained.encode("NUTBOLT driven 4012.").tokens
    small = train_tokenizer(catalogue(300), 21)
    assert small.get_vocab_size() <= 21
    cased = train_tokenizer(catalogue(300), 120, lowercase=False)
    assert {"Größe", "naïve"} <= cased.get_vocab().keys()


def test_texts_to_train_on_are_needed():
    with pytest.raises(DataError, match="2 texts hold no word; expected some to train a tokenizer on"):
        train_tokenizer(["", " "], 100)
    with pytest.raises(ValueError, match="vocab_size=6: expected at least 7"):
        train_tokenizer(["a b"], 6)


def test_a_saved_folder_is_read_by_us_and_by_transformers(trained, folder, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    texts = [*catalogue(40, seed=2), "Unknown: 漢字 and ÄÖÜ [SEP] x"]
    ids, lengths = tokenize(trained, texts, 10)
    theirs = AutoTokenizer.from_pretrained(folder)(
        texts, truncation=True, max_length=10, padding="max_length", return_tensors="np"
    )
    np.testing.assert_array_equal(theirs["input_ids"], ids)
    np.testing.assert_array_equal(theirs["attention_mask"].sum(1), lengths)
    np.testing.assert_array_equal(tokenize(load_tokenizer(folder), texts, 10)[0], ids)
    (folder / "tokenizer.json").unlink()
    np.testing.assert_array_equal(tokenize(load_tokenizer(folder), texts, 10)[0], ids)


def test_a_tokenizer_that_does_not_go_with_the_weights_is_refused(trained):
    size = trained.get_vocab_size()
    check_agrees(trained, size, 0, "here")
    check_agrees(trained, size + 8, 0, "here")
    with pytest.raises(
        DataError, match=rf"^here: gives token ids up to {size - 1}; .* the weights' {size - 1}$"
    ):
        check_agrees(trained, size - 1, 0, "here")
    with pytest.raises(DataError, match=r"^here: \[PAD\] is token 0; expected 1, as in the weights' config$"):
        check_agrees(trained, size, 1, "here")


@pytest.mark.parametrize("token", ["[PAD]", "[CLS]", "[SEP]"])
def test_a_tokenizer_without_berts_tokens_is_refused(token, folder):
    text = (folder / "tokenizer.json").read_text().replace(token, "<other>")
    (folder / "tokenizer.json").write_text(text)
    other = load_tokenizer(folder)
    with pytest.raises(DataError) as caught:
        check_agrees(other, 1000, 0, "here")
    assert str(caught.value) == f"here: has no token {token}; expected the tokenizer of a BERT"
    with pytest.raises(DataError, match="has no token"):
        tokenize(other, ["bolt"], 8)


def test_missing_and_damaged_files_are_refused(folder, tmp_path):
    def check(at: Path, where: Path, message: str) -> None:
        with pytest.raises(DataError) as caught:
            load_tokenizer(at)
        assert str(caught.value).startswith(f"{where}: {message}")
        assert "expected" in str(caught.value)
        assert "\n" not in str(caught.value)

    check(tmp_path / "none", tmp_path / "none", "no such folder")
    for content in (b"", b"{}", b"\xff\xfe\x00", (folder / "tokenizer.json").read_bytes()[:-40]):
        (folder / "tokenizer.json").write_bytes(content)
        check(folder, folder / "tokenizer.json", "is damaged or no tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    check(folder, folder / "vocab.txt", "is damaged or no tokenizer")
    (folder / "vocab.txt").unlink()
    check(folder, folder, "has neither tokenizer.json nor vocab.txt")


def test_a_frame_needs_room(trained):
    with pytest.raises(ValueError, match="max_tokens=2: expected at least 3"):
        tokenize(trained, ["bolt"], 2)


def test_a_folder_is_replaced_when_it_is_saved_again(folder, tmp_path):
    other = train_tokenizer(["one two three"] * 3, 40)
    shutil.copytree(folder, tmp_path / "copy")
    save_tokenizer(other, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").get_vocab() == other.get_vocab()
