"""What a model thinks a user wants, moment by moment: ABRA's attention over the catalogue, summed by topics."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynrec_jax.batch import History
from dynrec_jax.data import synthetic
from dynrec_jax.errors import DataError
from dynrec_jax.evaluate.oracle import synthetic_spec
from dynrec_jax.evaluate.recommender import Recommender
from dynrec_jax.models.user_encoder import moments
from dynrec_jax.parallel.mesh import row_pieces
from dynrec_jax.parallel.table import lookup, rows_of
from dynrec_jax.workdir import Run

COLUMNS = ("topic", "genres", "genre", "category", "class")
SEPARATORS = {"class": " "}  # between the values of a cell, where it is not a comma or a bar


def topics_of(run: Run, column: str | None) -> tuple[list[str], np.ndarray]:
    """Topic names and, for item i + 1, the number of its topic; of several values the first counts."""
    table = run.dataset.items_table()
    wanted = (column,) if column else COLUMNS
    name = next((c for c in wanted if c in table.column_names), None)
    if name is None:
        raise DataError(
            f"{run.dataset.path}: items have the columns {', '.join(table.column_names)}; name one with --column"
        )
    separator = SEPARATORS.get(name, r"\||, ")
    first = [_first(value, separator) for value in table.column(name).to_pylist()]
    names = sorted(set(first))
    place = {topic: i for i, topic in enumerate(names)}
    return names, np.array([place[topic] for topic in first])


def _first(value: Any, separator: str) -> str:
    """The first of a cell's values, which are a set or written one after the other."""
    if isinstance(value, list):
        return str(value[0]) if value else "unknown"
    return re.split(separator, str(value or "unknown"))[0]


def attention_over(run: Run, history: History) -> np.ndarray:
    """[L, N], ABRA's attention over the catalogue after every event of one history."""
    model, items = run.model, run.dataset.items

    recommender = Recommender(model, run.mesh, 1, 1, False, items=run.items)
    vectors_RxD, table_RxD = recommender.vectors(run.params, run.tables)

    @jax.jit
    def attention(params: Any, vectors_RxD: Any, v_RxD: Any, history: History) -> jax.Array:
        v_BxLxD = lookup(vectors_RxD, history.items)
        u_LxD = model.user_vectors(params, v_BxLxD, moments(history))[0]
        q_LxD = model.abra.query(u_LxD, v_RxD)
        row_N = rows_of(jnp.arange(1, items + 1), v_RxD.shape[0])
        s_LxN = model.abra.logits(q_LxD, v_RxD)[:, row_N]
        return jax.nn.softmax(s_LxN, axis=-1)

    # As many histories as lie over the devices; all but the first are empty.
    more = row_pieces(run.mesh) - 1
    whole = jax.tree.map(lambda x: jnp.asarray(np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))), history)
    with jax.set_mesh(run.mesh):
        return np.asarray(attention(run.params, vectors_RxD, table_RxD, whole), np.float64)


def planted_interests(run: Run, user: str, times: np.ndarray, names: list[str]) -> np.ndarray | None:
    """[P, K], the true share of each topic at each time, where the source knows it."""
    spec = synthetic_spec(run.dataset)
    if spec is None:
        return None
    shares_PxT = synthetic.interests(spec, user, times)
    known = {name: i for i, name in enumerate(synthetic.topic_names(spec))}
    if not known.keys() >= set(names):  # another column than that of the topics
        return None
    return np.stack([shares_PxT[:, known[name]] for name in names], axis=1)
