"""Items like those that a user took last, by the words that describe them: TF-IDF and the cosine.

A word of an item weighs `(1 + log tf) · log(N / df)`; a user is the sum of the vectors of the last 50 items, each
`2^(-ago / h)` of its length.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import scipy.sparse as sparse

from dynrec_jax.batch import PAD
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.kinds import SET, TEXT
from dynrec_jax.evaluate.baselines.learned import Learning, Scorer, Unable, recent
from dynrec_jax.evaluate.recommender import HistorySource

WORD = re.compile(r"\w+")
LATEST = 50  # events of a history
HALF_LIVES = (3.0, 10.0, 50.0)  # events, h


def content(learning: Learning) -> Mapping[str, Scorer]:
    """For several half-lives; raises Unable where nothing but ids is known of the items."""
    vectors = tf_idf(learning.histories.dataset)
    return {f"half-life of {half:g} events": _scorer(vectors, half) for half in HALF_LIVES}


def tf_idf(dataset: Dataset) -> sparse.csr_matrix:
    """float64[N, words], rows of unit length; of zeros where an item has no words."""
    kinds = {name: kind for name, kind in dataset.item_column_kinds.items() if kind in (TEXT, SET)}
    if not kinds:
        raise Unable("the items have neither text nor attributes")
    numbers: dict[str, int] = {}
    rows: list[int] = []
    columns: list[int] = []
    for item, words in enumerate(_words(dataset, kinds)):
        rows += [item] * len(words)
        columns += [numbers.setdefault(word, len(numbers)) for word in words]
    shape = (dataset.items, max(len(numbers), 1))
    counts = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=shape).tocsr()
    counts.sum_duplicates()
    frequency = np.bincount(counts.indices, minlength=shape[1])
    counts.data = (1 + np.log(counts.data)) * np.log(dataset.items / np.maximum(frequency, 1))[counts.indices]
    length = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(1.0 / np.where(length > 0, length, 1.0)) @ counts)


def _words(dataset: Dataset, kinds: dict[str, str]) -> Iterator[list[str]]:
    """Of each item: words of its texts, and its attributes as they are, each with its column's name."""
    table = dataset.items_table().select(list(kinds))
    for row in table.to_pylist():
        words: list[str] = []
        for name, kind in kinds.items():
            value = row[name]
            if value and kind == TEXT:
                words += WORD.findall(value.lower())
            elif value:
                words += [f"{name}={attribute}" for attribute in value]
        yield words


def _scorer(vectors_NxW: sparse.csr_matrix, half: float) -> Scorer:
    def score(source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        items_BxM, ago_BxM = recent(source, users_B, ends_B, LATEST)
        rows, columns = np.nonzero(items_BxM != PAD)
        weight = 0.5 ** (ago_BxM[rows, columns] / half)
        taken = sparse.coo_matrix(
            (weight, (rows, items_BxM[rows, columns] - 1)), shape=(len(users_B), vectors_NxW.shape[0])
        )
        return np.asarray(((taken.tocsr() @ vectors_NxW) @ vectors_NxW.T).todense())

    return score
