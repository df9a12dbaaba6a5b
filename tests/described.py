"""Items that are described: texts, attributes and vectors so small that a test makes and compiles them in seconds."""

import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.data.tokens import save_tokenizer, train_tokenizer
from dynrec_jax.models.bert import Bert
from dynrec_jax.models.bert_config import BertConfig
from dynrec_jax.models.features import Items
from dynrec_jax.models.text_encoder import TEXT, TextEncoder
from dynrec_jax.models.towers.attributes import AttributeTower
from dynrec_jax.models.towers.text import TextSource
from dynrec_jax.models.towers.tower import Tower, Values, centred
from dynrec_jax.models.towers.vectors import VectorTower
from dynrec_jax.parallel.mesh import place_same
from dynrec_jax.train.state import TrainState

GOLDEN = Path(__file__).parent / "models" / "golden" / "tiny"
TOKENS = 16
BERT = BertConfig(
    vocab_size=30,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=TOKENS,
)


def text_source(items: int, dropout: float = 0.0, frozen_below: int = 0, **sizes: Any) -> TextSource:
    """Random tokens of N items and a small BERT to read them; every third item has none."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, TOKENS + 1, items)
    lengths[2::3] = 0
    inside = np.arange(TOKENS) < lengths[:, None]
    ids = np.where(inside, rng.integers(1, BERT.vocab_size, inside.shape), 0)
    module = Bert(dataclasses.replace(BERT, **sizes), frozen_below=frozen_below, dropout=dropout)
    return TextSource(TextEncoder(module, "mean"), ids.astype(np.int32), lengths.astype(np.int32), None)


def text_tower() -> Tower:
    """Of a BERT that is trained with the rest."""
    made = ((TEXT, BERT.hidden_size, "float32"),)
    return Tower("text", functools.partial(VectorTower, TEXT), {}, made)


def attribute_tower(items: int) -> Tower:
    """Three of 200 attributes, so that hardly any two items have the same; every second item has none."""
    rng = np.random.default_rng(6)
    values = rng.integers(1, 201, (items, 3)).astype(np.int32)
    values[1::2] = 0
    make = functools.partial(AttributeTower, "attributes:a", 200)
    return Tower("attributes_a", make, {"attributes:a": Values(values)})


def vector_tower(items: int, known: int | None = None) -> Tower:
    """Vectors of five numbers; every fifth item has none. The mean is that of the first `known`."""
    values = np.random.default_rng(7).normal(size=(items, 5)).astype(np.float32)
    values[4::5] = 0
    make = functools.partial(VectorTower, "vector:v")
    return Tower("vector0_v", make, {"vector:v": centred(values, values[:known])})


def items(number: int, **text: Any) -> Items:
    """N items with text that is trained, and attributes."""
    return Items(number, (text_tower(), attribute_tower(number)), text_source(number, **text))


def dataset(
    folder: Path, log: Sequence[str], rows: Sequence[Mapping[str, Any]], triples: str = "", shards: int = 4
) -> Dataset:
    """A dataset folder `folder/dataset`: a user a line, what describes the items, and a knowledge graph."""
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in log))
    write_items(folder / "items.jsonl", rows)
    (folder / "graph.tsv").write_text(triples)
    options = PrepareOptions(
        source=f"sequences:{folder / 'log.txt'}",
        out=folder / "dataset",
        items=folder / "items.jsonl",
        triples=folder / "graph.tsv" if triples else None,
        shards=shards,
    )
    return prepare(options, Console(file=io.StringIO()))


def write_items(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Items as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bert_folder(path: Path, texts: Sequence[str]) -> Path:
    """The tiny BERT that PyTorch saved, with a tokenizer trained on `texts`."""
    shutil.copytree(GOLDEN, path)
    save_tokenizer(train_tokenizer(texts, 60), path)
    return path


def state(template: TrainState, unseen: Sequence[int] = (), seed: int = 1) -> TrainState:
    """A state of an abstract one's shapes without compiling anything: weights and rows are random, all else zeros.

    The rows of padding and of `unseen` items are zeros too.
    """
    rng = np.random.default_rng(seed)

    def random(path: Any, leaf: Any) -> Any:
        # About what training starts from: norms near one, the rest small.
        centre = 1.0 if jax.tree_util.keystr(path).endswith("['scale']") else 0.0
        return centre + (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    made = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
    params, tables = (jax.tree_util.tree_map_with_path(random, tree) for tree in (made.params, made.tables))
    for table in tables.values():
        table[[0, *unseen]] = 0
    made = made._replace(params=params, tables=tables)
    return jax.tree.map(lambda x, leaf: place_same(leaf.sharding, np.asarray(x)), made, template)
