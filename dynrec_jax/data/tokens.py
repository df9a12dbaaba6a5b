"""Text to token ids: a BERT's tokenizer, opened, trained, saved, and compared with the weights it goes with."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from dynrec_jax.errors import DataError, one_line
from dynrec_jax.files import write_whole

TOKENIZER, TOKENIZER_CONFIG, VOCABULARY = "tokenizer.json", "tokenizer_config.json", "vocab.txt"
PAD, UNKNOWN, START, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHUNK = 1_000  # texts whose encodings are held at a time, some 200 bytes a token
ALPHABET = 1_000  # characters that a trained vocabulary has at most


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: `tokenizer.json` or, in old folders, `vocab.txt`.

    Truncation and padding that the file asks for are switched off: `tokenize` has its own.

    Raises:
      DataError: the folder or its files are missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a tokenizer ({TOKENIZER} or {VOCABULARY})")
    if (folder / TOKENIZER).is_file():
        path, read = folder / TOKENIZER, _from_json
    elif (folder / VOCABULARY).is_file():
        path, read = folder / VOCABULARY, _from_vocabulary
    else:
        raise DataError(
            f"{folder}: has neither {TOKENIZER} nor {VOCABULARY}; expected the tokenizer of a BERT"
        )
    try:
        tokenizer = read(path)
    except Exception as error:  # what tokenizers raises is of the type Exception itself
        raise DataError(
            f"{path}: is damaged or no tokenizer ({one_line(error)[:200]}); expected a BERT's"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def _from_vocabulary(path: Path) -> Tokenizer:
    # Else it remarks that PyTorch, which is not used, is not there.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import BertTokenizer  # takes a second, and most folders do without

    return BertTokenizer.from_pretrained(path.parent, local_files_only=True).backend_tokenizer


def check_agrees(tokenizer: Tokenizer, vocab_size: int, pad_token_id: int, where: str) -> None:
    """Refuses a tokenizer that does not go with a BERT's weights.

    Args:
      tokenizer: what `load_tokenizer` or `train_tokenizer` gives.
      vocab_size: rows of the weights' word embeddings.
      pad_token_id: by the weights' config.
      where: what the message names, the tokenizer's folder.

    Raises:
      DataError: it can give an id that the weights do not have, has another id for padding, or no [CLS] and [SEP].
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise DataError(
            f"{where}: gives token ids up to {highest}; expected less than the weights' {vocab_size}"
        )
    ids = _special_ids(tokenizer, where)
    if ids[PAD] != pad_token_id:
        raise DataError(
            f"{where}: {PAD} is token {ids[PAD]}; expected {pad_token_id}, as in the weights' config"
        )


def _special_ids(tokenizer: Tokenizer, where: str) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    frame = (PAD, START, END)
    missing = [token for token in frame if token not in vocabulary]
    if missing:
        raise DataError(f"{where}: has no token {' and no '.join(missing)}; expected the tokenizer of a BERT")
    return {token: vocabulary[token] for token in frame}


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32[N, T] of texts, framed by [CLS] and [SEP], and their lengths int32[N].

    T is `max_tokens`, whatever the texts: a text's row does not depend on the others. A longer text is cut, and [SEP]
    ends it all the same; behind a shorter one is padding. A text that gives no token, as an empty one, has length 0 and
    is all padding.

    Args:
      tokenizer: what `load_tokenizer` or `train_tokenizer` gives.
      texts: N of them.
      max_tokens: at least 3: one token between the two of the frame.
    """
    if max_tokens < 3:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 3, one token in its frame")
    special = _special_ids(tokenizer, "the tokenizer")
    ids_NxT = np.full((len(texts), max_tokens), special[PAD], np.int32)
    lengths_N = np.zeros(len(texts), np.int32)
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        for row, encoding in enumerate(tokenizer.encode_batch_fast(chunk, add_special_tokens=False), start):
            ids = encoding.ids[: max_tokens - 2]
            if ids:
                lengths_N[row] = len(ids) + 2
                ids_NxT[row, : len(ids) + 2] = [special[START], *ids, special[END]]
    return ids_NxT, lengths_N


def train_tokenizer(texts: Sequence[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """A WordPiece tokenizer with BERT's special tokens, [PAD] = 0, trained on a catalogue's text.

    The same texts in any order give the same tokenizer.

    Args:
      texts: read twice.
      vocab_size: tokens at most.
      lowercase: also takes accents off, as BERT's uncased ones do.

    Raises:
      DataError: no text has a word in it.
    """
    blank = _wordpiece({token: at for at, token in enumerate(SPECIAL)}, lowercase)
    often = _characters(blank, texts)
    if not often:
        raise DataError(f"{len(texts)} texts hold no word; expected some to train a tokenizer on")
    room = (vocab_size - len(SPECIAL)) // 2
    if room < 1:
        raise ValueError(f"vocab_size={vocab_size}: expected at least {len(SPECIAL) + 2}")
    commonest = sorted(often, key=lambda c: (-often[c], c))[: min(ALPHABET, room)]
    # The trainer numbers the pieces "##c" as it meets them, in an order that differs from run to run, and breaks ties
    # by number. Named beforehand, they have the same ones always; characters to leave out are chosen here too. So any
    # word of these characters can be put together, seen or not.
    pieces = [f"##{c}" for c in sorted(commonest) if len(_words(blank, f"a{c}a")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *pieces],
        initial_alphabet=commonest,
        limit_alphabet=len(commonest),
        show_progress=False,
    )
    blank.train_from_iterator(texts, trainer, length=len(texts))
    return _wordpiece(blank.get_vocab(), lowercase)


def has_words(texts: Iterable[str]) -> bool:
    """Whether a text has anything in it that a BERT reads: some characters are dropped before it is cut into words."""
    blank = _wordpiece({token: at for at, token in enumerate(SPECIAL)}, lowercase=True)
    return any(_words(blank, text) for text in texts)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def _characters(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each character stands in a word of the texts."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_words(tokenizer, text))
    often: Counter[str] = Counter()
    for word, times in words.items():
        for character in word:
            often[character] += times
    return often


def _wordpiece(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's tokenizer with a vocabulary of one's own."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    start, end = vocabulary[START], vocabulary[END]
    tokenizer.post_processor = processors.BertProcessing((END, end), (START, start))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `vocab.txt`, which transformers' AutoTokenizer reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tokenizer.get_vocab()
    normalizer: dict[str, Any] = json.loads(tokenizer.to_str())["normalizer"] or {}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer.get("lowercase", False),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)),
    }
    write_whole(
        folder / VOCABULARY, "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
    )
    write_whole(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")
    write_whole(folder / TOKENIZER, tokenizer.to_str(pretty=True))
