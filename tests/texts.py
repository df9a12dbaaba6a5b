"""Items with texts of random tokens and a BERT so small that a test compiles it in a second."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.models.bert import Bert
from dynrec_jax.models.bert_config import BertConfig
from dynrec_jax.models.features import Items
from dynrec_jax.models.text_encoder import TEXT, Text, TextEncoder, Tokens
from dynrec_jax.models.towers.text import TextSource
from dynrec_jax.models.towers.tower import Tower
from dynrec_jax.models.towers.vectors import VectorTower
from dynrec_jax.parallel.mesh import feed, place_rows, place_same
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import in_rows, rows_for

WIDTH, TOKENS, WORDS = 16, 8, 40


def source(number: int, frozen_below: int = 0, dropout: float = 0.2, layers: int = 1) -> TextSource:
    """Texts of 0 to 8 tokens; every seventh item has none."""
    rng = np.random.default_rng(7)
    config = BertConfig(WORDS, WIDTH, layers, 8, 24, TOKENS)
    bert = Bert(config, frozen_below=frozen_below, dropout=dropout)
    lengths = rng.integers(1, TOKENS + 1, number).astype(np.int32)
    lengths[::7] = 0
    ids = rng.integers(1, WORDS, (number, TOKENS)).astype(np.int32)
    return TextSource(TextEncoder(bert, "mean"), ids, lengths, None)


def items(number: int, **changes: Any) -> Items:
    """Items whose only tower is a text that BERT, trained with the rest, reads."""
    tower = Tower("text", functools.partial(VectorTower, TEXT), {}, ((TEXT, WIDTH, "float32"),))
    return Items(number, (tower,), source(number, **changes))


def seen(number: int, mesh: Mesh) -> jax.Array:
    """int32[R, 1]: the items of `one_step`'s batch, and two thirds of the others."""
    from .invariants import one_step  # which makes its items here

    known = np.arange(number + 1) % 3 > 0
    known[np.asarray(one_step.whole_batch().items)] = True
    known[0] = False
    return place_same(
        sharding(mesh, "items", None), in_rows(known, rows_for(number)).astype(np.int32)[:, None]
    )


def placed(known: Items, mesh: Mesh, process: int) -> Text:
    """The text of `one_step`'s batch in two widths; each process brings that of its part."""
    from .invariants import one_step

    if known.text is None:
        return ()
    own = feed(mesh, process)
    batch = np.asarray(one_step.whole_batch().items)
    rows = slice(own.part * 8 // own.parts, (own.part + 1) * 8 // own.parts)
    distinct = np.unique(batch[rows])
    distinct = distinct[distinct > 0]
    text = cut(known.text, distinct, (4, TOKENS), (40, 40))
    return jax.tree.map(functools.partial(place_rows, mesh), text)


def cut(text: TextSource, chosen: np.ndarray, widths: tuple[int, ...], sizes: tuple[int, ...]) -> Text:
    """Items with text in parts of these widths, filled up to these sizes."""
    parts, below = [], 0
    for width, size in zip(widths, sizes, strict=True):
        lengths = text.lengths[chosen - 1]
        here = chosen[(lengths > below) & (lengths <= width)]
        short = size - len(here)
        parts.append(
            Tokens(
                np.pad(here, (0, short)).astype(np.int32),
                np.pad(text.ids[here - 1, :width], ((0, short), (0, 0))),
                np.pad(text.lengths[here - 1], (0, short)),
            )
        )
        below = width
    return tuple(parts)
