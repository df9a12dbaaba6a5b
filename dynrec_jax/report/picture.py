"""`python -m dynrec_jax.report.picture`: one user's interests over time, from a trained run.

At every event of a history, ABRA's attention over the catalogue is summed by a column of the items (topic, genre):
what the model would recommend at that moment. On the synthetic source the planted interests stand beside it.
"""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dynrec_jax import workdir as workdirs
from dynrec_jax.data import synthetic
from dynrec_jax.data.cache import Histories
from dynrec_jax.errors import ConfigError, DataError, report_errors
from dynrec_jax.evaluate.oracle import synthetic_spec
from dynrec_jax.evaluate.recommender import Recommender
from dynrec_jax.models.user_encoder import moments
from dynrec_jax.parallel.mesh import row_pieces
from dynrec_jax.parallel.table import lookup, rows_of
from dynrec_jax.report.interests import draw_interests
from dynrec_jax.workdir import Run

COLUMNS = ("topic", "genres", "genre", "category", "class")
SEPARATORS = {"class": " "}  # between the values of a cell, where it is not a comma or a bar


def main(arguments: list[str]) -> int:
    """Parses flags and draws; returns the exit status."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string("out", None, "PNG to write", flag_values=values)
    flags.DEFINE_string(
        "user",
        None,
        "whose interests; default: the longest history that the model reads whole",
        flag_values=values,
    )
    flags.DEFINE_string(
        "column",
        None,
        f"column of the items to sum by; default: the first of {', '.join(COLUMNS)}",
        flag_values=values,
    )
    return report_errors(lambda: _run(values, arguments))


def _run(values: flags.FlagValues, arguments: list[str]) -> None:
    try:
        values(["picture", *arguments])
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    if not values.workdir or not values.out:
        raise ConfigError("--workdir and --out are needed: a run folder, and the PNG to write")
    draw(workdirs.open(values.workdir), Path(values.out), values.user, values.column)
    print(values.out)


def draw(run: Run, out: Path, user: str | None = None, column: str | None = None) -> None:
    """Draws one user's interests.

    Raises:
      DataError: the dataset has no times, no column to sum by, or no such user.
    """
    if not run.dataset.has_times:
        raise DataError(f"{run.dataset.path}: has no times; there is no time axis to draw interests over")
    names, topic_N = _topics(run, column)
    histories = Histories(run.dataset, run.config.data.cache_dir)
    number = _choose(run, histories, user)
    user = histories.ids_of(np.array([number]))[0]
    length = run.config.data.max_length
    windows = histories.windows(np.array([number]), histories.lengths[[number]], length)
    real_L = windows.items[0] > 0
    times = windows.times[0][real_L].astype(np.int64) + int(run.dataset.first_time or 0)
    inferred_LxT = _inferred(run, windows.items)[real_L] @ np.eye(len(names))[topic_N]
    planted = _planted(run, user, times, names)
    title = f"User {user}: {len(times)} events, {run.dataset.items:,} items in {len(names)} topics"
    draw_interests(out, times, planted, inferred_LxT, names, title)


def _topics(run: Run, column: str | None) -> tuple[list[str], np.ndarray]:
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


def _choose(run: Run, histories: Histories, user: str | None) -> int:
    if user is None:
        within = np.where(histories.lengths <= run.config.data.max_length, histories.lengths, 0)
        return int(within.argmax())
    ids = histories.ids_of(np.arange(histories.users))
    if user not in ids:
        raise DataError(f"--user={user}: no such user among the {len(ids):,} of {run.dataset.path}")
    return ids.index(user)


def _inferred(run: Run, items_1xL: np.ndarray) -> np.ndarray:
    """[L, N], ABRA's attention over the catalogue after every event of one history."""
    model, items = run.model, run.dataset.items

    recommender = Recommender(model, run.mesh, 1, 1, False, items=run.items)
    vectors_RxD, table_RxD = recommender.vectors(run.params, run.tables)

    @jax.jit
    def attention(params: Any, vectors_RxD: Any, v_RxD: Any, items_BxL: jax.Array) -> jax.Array:
        v_BxLxD = lookup(vectors_RxD, items_BxL)
        u_LxD = model.user_vectors(params, v_BxLxD, moments(items_BxL))[0]
        q_LxD = model.abra.query(u_LxD, v_RxD)
        row_N = rows_of(jnp.arange(1, items + 1), v_RxD.shape[0])
        s_LxN = (q_LxD @ v_RxD.T * model.abra.scale)[:, row_N]
        return jax.nn.softmax(s_LxN, axis=-1)

    # As many histories as lie over the devices; all but the first are empty.
    items_BxL = np.pad(items_1xL, ((0, row_pieces(run.mesh) - 1), (0, 0)))
    with jax.set_mesh(run.mesh):
        return np.asarray(attention(run.params, vectors_RxD, table_RxD, jnp.asarray(items_BxL)), np.float64)


def _planted(run: Run, user: str, times: np.ndarray, names: list[str]) -> np.ndarray | None:
    spec = synthetic_spec(run.dataset)
    if spec is None:
        return None
    shares_PxT = synthetic.interests(spec, user, times)
    known = {name: i for i, name in enumerate(synthetic.topic_names(spec))}
    return np.stack([shares_PxT[:, known[name]] for name in names], axis=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
