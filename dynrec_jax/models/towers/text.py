"""The tower of an item's text: vectors of a frozen BERT, computed once, or of one that is trained with the rest."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from dynrec_jax.config import tunes_text
from dynrec_jax.data.cache import default_cache_dir
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.tokens import (
    check_agrees,
    has_words,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    train_tokenizer,
)
from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.files import write_whole
from dynrec_jax.models.bert import Bert
from dynrec_jax.models.bert_config import CONFIG, BertConfig, read_config
from dynrec_jax.models.bert_weights import read_weights, resolve, weights_hash
from dynrec_jax.models.encode import encode_items
from dynrec_jax.models.text_encoder import TEXT, TextEncoder
from dynrec_jax.models.towers.tower import Job, Tower, centred
from dynrec_jax.models.towers.vectors import VectorTower

FOLDER = (
    "bert"  # of a run folder: BERT's config, tokenizer, and the weights that training starts from, if any
)
VERSION = 1  # of how vectors are made


class TextSource(NamedTuple):
    """The text of items and what reads it.

    Attributes:
      encoder: BERT.
      ids: int32[N, T], tokens; row i - 1 is item i.
      lengths: int32[N], tokens of each.
      weights: BERT's weights to begin with; None for random ones.
    """

    encoder: TextEncoder
    ids: np.ndarray
    lengths: np.ndarray
    weights: Any

    def followed_by(self, other: "TextSource") -> "TextSource":
        """With the items of another behind its own."""
        ids, lengths = np.concatenate([self.ids, other.ids]), np.concatenate([self.lengths, other.lengths])
        return self._replace(ids=ids, lengths=lengths)


def read(job: Job) -> Iterator[Tower]:
    """The tower, where the config names text columns.

    Raises:
      ConfigError: there is no such column.
      DataError: the BERT folder is not what it must be.
    """
    item = job.config.item
    if not item.text:
        return
    if item.text_mode == "tuned":
        width = read_config(_folder(job)).hidden_size
        yield Tower("text", functools.partial(VectorTower, TEXT), {}, ((TEXT, width, "float32"),))
        return
    known = frozen_vectors(dataclasses.replace(job, items=job.dataset.items_table()))
    values = frozen_vectors(job) if job.new else known
    yield Tower("text", functools.partial(VectorTower, TEXT), {TEXT: centred(values, known)})


def texts_of(config: ml_collections.ConfigDict, items: pa.Table, dataset: Dataset) -> list[str]:
    """The text of each item: its columns in the order of the config; empty where an item has none.

    Raises:
      ConfigError: the dataset has no such column, or one of vectors.
    """
    own = dataset.items_table()
    columns = []
    for name in config.item.text:
        if name not in own.column_names[2:]:
            there = ", ".join(own.column_names[2:]) or "none"
            raise ConfigError(f"config.item.text: {dataset.path} has no item column {name!r}; found {there}")
        kind = own.column(name).type
        if pa.types.is_list(kind) and not pa.types.is_string(kind.value_type):
            raise ConfigError(f"config.item.text: item column {name!r} is {kind}; expected text")
        if name not in items.column_names:
            continue
        columns.append([_plain(value) for value in items.column(name).to_pylist()])
    if not columns:
        return [""] * items.num_rows
    return [" ".join(filter(None, values)) for values in zip(*columns, strict=True)]


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(value) if isinstance(value, list) else str(value)


def text_source(job: Job) -> TextSource:
    """Tokens of the items and the encoder that reads them.

    Raises:
      ConfigError: a text column is not there; texts are longer than BERT's positions.
      DataError: the BERT folder is not what it must be.
    """
    item, folder = job.config.item, _folder(job)
    bert = read_config(folder)
    tokenizer = load_tokenizer(folder)
    check_agrees(tokenizer, bert.vocab_size, bert.pad_token_id, str(folder))
    _check_sizes(job.config, bert, folder)
    ids, lengths = tokenize(tokenizer, texts_of(job.config, job.items, job.dataset), item.text_tokens)
    tuned = tunes_text(job.config)
    module = Bert(
        bert,
        dtype=jnp.dtype(job.config.model.dtype),
        remat=job.config.model.remat != "none",
        frozen_below=item.text_from if tuned else 0,
        dropout=item.text_dropout if tuned else 0.0,
    )
    weights = read_weights(folder, bert) if item.bert else None
    return TextSource(TextEncoder(module, item.text_pooling), ids, lengths, weights)


def columns(config: ml_collections.ConfigDict) -> set[str]:
    """The text columns that a config names."""
    return set(config.item.text)


def check(job: Job) -> None:
    """Raises ConfigError or DataError for all that can be wrong with text, before work starts."""
    config, item = job.config, job.config.item
    if not item.text:
        return
    if not has_words(texts_of(config, job.items, job.dataset)):
        raise ConfigError(
            f"config.item.text: no item of {job.dataset.path} has any text in {', '.join(item.text)}; name other "
            "columns"
        )
    if not item.bert:
        if item.text_from > item.text_layers:
            raise ConfigError(
                f"config.item.text_from: {item.text_from}; expected {item.text_layers} (item.text_layers) at most"
            )
        return
    folder = _folder(job)
    bert = read_config(folder)
    check_agrees(load_tokenizer(folder), bert.vocab_size, bert.pad_token_id, str(folder))
    _check_sizes(config, bert, folder)
    read_weights(folder, bert)


def _check_sizes(config: ml_collections.ConfigDict, bert: BertConfig, folder: Path) -> None:
    if config.item.text_tokens > bert.max_position_embeddings:
        raise ConfigError(
            f"config.item.text_tokens: {config.item.text_tokens}, and {folder} has "
            f"{bert.max_position_embeddings} positions; expected no more"
        )
    if config.item.text_from > bert.num_hidden_layers:
        raise ConfigError(
            f"config.item.text_from: {config.item.text_from}, and {folder} has {bert.num_hidden_layers} layers"
        )


def check_text_mesh(job: Job, mesh: Mesh) -> None:
    """Raises ConfigError where a BERT that is trained does not divide over a mesh."""
    if not tunes_text(job.config):
        return
    item = job.config.item
    heads, width, hidden, where = item.text_heads, item.text_dim, 4 * item.text_dim, "the BERT to be made"
    if item.bert:
        bert = read_config(_folder(job))
        heads, width, hidden, where = (
            bert.num_attention_heads,
            bert.hidden_size,
            bert.intermediate_size,
            item.bert,
        )
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for name, number in (("heads", heads), ("hidden units", hidden)):
        if number % tensor:
            raise ConfigError(f"config.mesh.tensor: {tensor} does not divide the {number} {name} of {where}")
    if width % fsdp:
        raise ConfigError(f"config.mesh.fsdp: {fsdp} does not divide the width of {where}, {width}")


def keep_text_model(config: ml_collections.ConfigDict, dataset: Dataset, run_folder: Path) -> None:
    """Brings BERT's config, tokenizer and first weights into a run folder, which then needs nothing else.

    Raises:
      MachineError: the disk is full.
    """
    target = run_folder / FOLDER
    if config.item.fusion == "id" or not config.item.text or target.exists():
        return
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=run_folder))
        try:
            if config.item.bert:
                _copy(resolve(config.item.bert), temporary)
            else:
                _from_scratch(config, dataset, temporary)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise MachineError(f"{target}: BERT cannot be kept there ({error})") from None


def _copy(source: Path, target: Path) -> None:
    for pattern in ("*.json", "*.safetensors", "vocab.txt"):
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _from_scratch(config: ml_collections.ConfigDict, dataset: Dataset, folder: Path) -> None:
    item = config.item
    texts = texts_of(config, dataset.items_table(), dataset)
    tokenizer = train_tokenizer(texts, item.text_vocabulary)
    save_tokenizer(tokenizer, folder)
    bert = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=item.text_dim,
        num_hidden_layers=item.text_layers,
        num_attention_heads=item.text_heads,
        intermediate_size=4 * item.text_dim,
        max_position_embeddings=item.text_tokens,
    )
    write_whole(folder / CONFIG, bert.to_json())


def _folder(job: Job) -> Path:
    kept = None if job.folder is None else job.folder / FOLDER
    return kept if kept is not None and kept.exists() else resolve(job.config.item.bert)


# --- vectors of a frozen BERT ----------------------------------------------------------------------------------


def frozen_vectors(job: Job) -> np.ndarray:
    """float32[N, E] of the items' texts, from a file beside the dataset, which is made where it is not there yet.

    Raises:
      MachineError: it can be written neither there nor in the cache.
    """
    folder = _folder(job)
    texts = texts_of(job.config, job.items, job.dataset)
    key = _key(job.config, texts, folder)
    places = [
        job.dataset.path.with_name(f"{job.dataset.path.name}.vectors"),
        Path(job.config.data.cache_dir or default_cache_dir()) / "vectors",
    ]
    for place in places:
        if (place / f"{key}.npy").is_file():
            return np.load(place / f"{key}.npy", mmap_mode="r", allow_pickle=False)
    source, failed = text_source(job), ""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            return _write(place / f"{key}.npy", source, job.say)
        except OSError as error:
            failed = f"{place}: vectors of texts cannot be written ({error}); set --cache_dir"
    raise MachineError(failed)


def _key(config: ml_collections.ConfigDict, texts: list[str], folder: Path) -> str:
    """A hash of all that the vectors depend on."""
    whole = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        whole.update(len(raw).to_bytes(8, "little") + raw)
    tokenizer = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
        if (folder / name).is_file()
    ]
    settings = [VERSION, config.item.text_tokens, config.item.text_pooling, config.model.dtype]
    whole.update(json.dumps([weights_hash(folder), tokenizer, settings]).encode())
    return whole.hexdigest()[:40]


def _write(path: Path, source: TextSource, say: Callable[[str], None]) -> np.ndarray:
    """Computes and writes vectors under a temporary name first."""
    shape = len(source.ids), source.encoder.width
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".npy", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        mesh = Mesh(np.array(jax.local_devices()).reshape(1, -1, 1, 1), ("slice", "data", "fsdp", "tensor"))
        for items, vectors in encode_items(
            source.encoder, source.weights, source.ids, source.lengths, mesh, say
        ):
            out[items - 1] = np.asarray(vectors)
        out.flush()
        del out
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r", allow_pickle=False)
