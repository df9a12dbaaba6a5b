"""The items in a FAISS index: what ABRA's attention scores, to be searched among many, exactly or nearly."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynrec_jax.data.cache import Histories
from dynrec_jax.errors import ConfigError, MachineError, one_line
from dynrec_jax.export.program import VECTORS, Served
from dynrec_jax.parallel.table import rows_for, rows_of
from dynrec_jax.workdir import Run

FILE = "items.faiss"
SAMPLE = 1_000  # users whose lists are compared
BATCH = 256
ADDED = 100_000  # items that are added at a time


def check_installed() -> None:
    """Raises ConfigError where FAISS is not there."""
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError("--formats=faiss: faiss is not installed; pip install 'dynrec-jax[faiss]'")


def make(factory: str, search: str, dim: int) -> Any:
    """An empty index of vectors of `dim` numbers, by inner product.

    Args:
      factory: FAISS's name of it.
      search: parameters of a search; empty for the index's own.
      dim: of the vectors.

    Raises:
      ConfigError: FAISS knows no such index, or no such parameter of it.
    """
    import faiss

    try:
        made = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"--faiss={factory}: FAISS makes no index of that ({_reason(error)}); expected a factory string such as "
            "Flat, IVF256,Flat or HNSW32"
        ) from None
    try:
        if search:
            # FAISS's stubs describe one of the functions of this name, and this call is of another.
            space: Any = faiss.ParameterSpace()
            space.set_index_parameters(made, search)
    except RuntimeError as error:
        raise ConfigError(
            f"--faiss_search={search}: the index has no such parameter ({_reason(error)}); expected one such as "
            "nprobe=8 of an IVF index, efSearch=64 of an HNSW index"
        ) from None
    return made


def _reason(error: RuntimeError) -> str:
    """What FAISS says, without where in its source it says so."""
    return one_line(error).rpartition("Error: ")[2]


def write(
    folder: Path,
    served: Served,
    weights: dict[str, np.ndarray],
    histories: Histories,
    factory: str,
    search: str,
) -> dict[str, Any]:
    """Writes `items.faiss`, of which number j is item j + 1, the one with index j in `item_ids.json`.

    Returns:
      What it is; of some of the dataset's users, `recall`, the share of the k items of the highest inner product that
      it finds, and `listed`, the share of the items that `Served.lists` gives, counts of neighbours included.

    Raises:
      ConfigError: the catalogue is too small for such an index.
    """
    import faiss

    number, dim = served.run.items.number, weights[VECTORS].shape[1]
    made = _filled(make(factory, search, dim), served, weights, factory)
    try:
        faiss.write_index(made, str(folder / FILE))
    except RuntimeError as error:
        raise MachineError(f"{folder / FILE}: cannot be written ({_reason(error)})") from None
    recall, listed, users = _measured(made, served, weights, histories)
    return {
        "file": FILE,
        "factory": factory,
        "search": search,
        "metric": "inner product",
        "items": number,
        "dim": dim,
        "k": served.k,
        "users": users,
        "recall": recall,
        "listed": listed,
    }


def _filled(made: Any, served: Served, weights: dict[str, np.ndarray], factory: str) -> Any:
    number = served.run.items.number
    rows = rows_of(np.arange(1, number + 1), rows_for(number))
    try:
        if not made.is_trained:
            made.train(served.items(weights, rows))
        for start in range(0, number, ADDED):
            made.add(served.items(weights, rows[start : start + ADDED]))
    except RuntimeError as error:
        raise ConfigError(
            f"--faiss={factory}: cannot be made of {number:,} items ({_reason(error)}); choose a smaller one, or Flat"
        ) from None
    return made


def _measured(
    made: Any, served: Served, weights: dict[str, np.ndarray], histories: Histories
) -> tuple[float, float, int]:
    """Recall of the attention's items, of the lists' items, and of how many users."""
    asked = np.flatnonzero(histories.lengths > 0)
    users_U = np.sort(np.random.default_rng(0).permutation(asked)[:SAMPLE])
    programs = (
        jax.jit(served.queries),
        jax.jit(served.nearest),
        jax.jit(lambda *given: served.lists(*given)[0]),
    )
    placed = jax.device_put(weights)
    found, shares = [], []
    for start in range(0, len(users_U), BATCH):
        users_B = users_U[start : start + BATCH]
        inputs = served.read(histories, users_B, histories.lengths[users_B])
        queries, nearest, listed = (np.asarray(program(placed, inputs)) for program in programs)
        each = queries.reshape(-1, made.d)
        ids = made.search(each, served.k)[1] + 1
        found += _shares(ids, nearest.reshape(len(each), -1))
        shares += _shares(ids.reshape(len(users_B), -1), listed)
    return float(np.mean(found)), float(np.mean(shares)), len(users_U)


def _shares(found: np.ndarray, expected: np.ndarray) -> list[float]:
    """Of each row, which share of the expected items was found."""
    pairs = zip(found, expected, strict=True)
    return [float(np.isin(wanted[wanted > 0], row).mean()) for row, wanted in pairs if (wanted > 0).any()]


def told(facts: dict[str, Any], run: Run) -> list[str]:
    """What the user should know of the index."""
    k, abra = facts["k"], run.model.abra
    lines = [
        f"index {facts['factory']}: recall@{k} {facts['recall']:.4f} of exact search, {facts['listed']:.4f} of what is "
        f"recommended, {facts['users']:,} users"
    ]
    if abra.neighbours:
        lines.append(
            "the index leaves out counts of neighbours (model.neighbours): recommend.stablehlo has them"
        )
    if abra.interests > 1:
        lines.append(
            f"a user has {abra.interests} vectors (model.interests): ask the index with each, and take an item's best "
            "score"
        )
    return lines
