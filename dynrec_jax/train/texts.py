"""What BERT reads at each step, where it is trained with the rest: the distinct items of the batch, by length."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dynrec_jax.batch import PAD, Batch
from dynrec_jax.data.pipeline import BatchSource
from dynrec_jax.models.text_encoder import Text, Tokens
from dynrec_jax.models.towers.text import TextSource

SAMPLED = 16  # steps that sizes are planned by
SPARE = 1.05  # times what these need: a step that needs more is compiled anew
MULTIPLE = 8


class Read(NamedTuple):
    """What a step reads: a batch, and the text of its items."""

    batch: Batch
    text: Text


class TextBatches:
    """`BatchSource` with the text of each batch's distinct items.

    Texts lie in three widths, the longest one quarter, half and all of `item.text_tokens`; how many there are of each
    is planned, so that steps have the same shapes.

    Attributes:
      planned: items of each width, shortest first.
    """

    def __init__(self, source: BatchSource, text: TextSource, pieces: int):
        """`pieces`: the items of each width divide by it: devices that share this part of a batch, times parts."""
        self._source = source
        self._text = text
        longest = text.ids.shape[1]
        self._widths = sorted({min(-(-longest // n // 8) * 8 or 8, longest) for n in (4, 2, 1)})
        self._multiple = math.lcm(MULTIPLE, pieces)
        steps = range(min(SAMPLED, len(source)))
        needs = np.max([self._counts(source[step]) for step in steps], axis=0)
        self.planned = [self._rounded(math.ceil(need * SPARE)) for need in needs]

    def plan(self, sizes: Sequence[int]) -> None:
        """Items of each width that a step has, unless it needs more."""
        self.planned = list(sizes)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, step: Any) -> Read:
        batch = self._source[step]
        return Read(batch, self._read(self._distinct(batch)))

    def sizes(self, step: int) -> list[int]:
        """See `BatchSource`: rows, and items of each width."""
        text = self._read(self._distinct(self._source[step]))
        return [*self._source.sizes(step), *(len(tokens.items) for tokens in text)]

    def grown(self, read: Read, sizes: Sequence[int]) -> Read:
        """See `BatchSource`."""
        text = tuple(_filled(tokens, size) for tokens, size in zip(read.text, sizes[1:], strict=True))
        return Read(self._source.grown(read.batch, sizes), text)

    def _distinct(self, batch: Batch) -> np.ndarray:
        """Items of a batch that have text, each once, those with short texts first."""
        items = np.unique(batch.items)
        items = items[items != PAD]
        lengths = self._text.lengths[items - 1]
        return items[np.argsort(lengths, kind="stable")][(lengths == 0).sum() :]

    def _counts(self, batch: Batch) -> list[int]:
        lengths = self._text.lengths[self._distinct(batch) - 1]
        ends = np.searchsorted(lengths, self._widths, side="right")
        return np.diff(ends, prepend=0).tolist()

    def _rounded(self, count: int) -> int:
        return max(-(-count // self._multiple), 1) * self._multiple

    def _read(self, items: np.ndarray) -> Text:
        """The longest texts in the widest part, and so on: what does not fit in a part goes to the next wider one."""
        lengths = self._text.lengths[items - 1]
        parts: list[Tokens] = []
        end = len(items)
        for width, size in zip(reversed(self._widths), reversed(self.planned), strict=True):
            must = end - int(np.searchsorted(lengths[:end], self._below(width), side="right"))
            left = sum(self.planned[: self._widths.index(width)])
            taken = min(max(must, end - left), end) if width != self._widths[0] else end
            parts.append(self._tokens(items[end - taken : end], width, size))
            end -= taken
        return tuple(reversed(parts))

    def _below(self, width: int) -> int:
        """The next smaller width; no text is shorter than 1."""
        at = self._widths.index(width)
        return self._widths[at - 1] if at else 0

    def _tokens(self, items: np.ndarray, width: int, size: int) -> Tokens:
        tokens = Tokens(
            items.astype(np.int32), self._text.ids[items - 1, :width], self._text.lengths[items - 1]
        )
        return _filled(tokens, size if len(items) <= size else self._rounded(len(items)))


def _filled(tokens: Tokens, size: int) -> Tokens:
    short = size - len(tokens.items)
    return Tokens(*(np.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1))) for x in tokens)) if short else tokens
