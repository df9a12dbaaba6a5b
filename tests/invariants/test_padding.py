"""Id 0 is padding: never an item, never recommended, and its row never moves."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.models.model import make_bstm
from dynrec_jax.train.loop import setup
from dynrec_jax.train.step import Inputs

from .. import tiny

ITEMS = 11


def test_id_0_is_never_recommended_even_where_its_row_would_win():
    model, params, tables = tiny.bstm(ITEMS)
    history = np.array([[3, 5, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
    # Padding and the rows behind the last item get the user's own direction, many times as long as any item.
    u_BxD = model.last_vector(params, tables["item_id"][history], History(jnp.asarray(history)))
    table = tables["item_id"].at[0].set(1e3 * u_BxD[0]).at[ITEMS + 1 :].set(1e3 * u_BxD[0])
    answer = model.abra.recommend(u_BxD, table, jnp.asarray([[3, 5, 3], [1, 2, 4]]), ITEMS)
    ids = np.asarray(answer.ids)
    assert set(ids[0, :9]) == set(range(1, ITEMS + 1)) - {3, 5}
    assert set(ids[1, :8]) == set(range(1, ITEMS + 1)) - {1, 2, 4}
    # What is left of a list is filled with "none", which no score can be taken for.
    for row, left in ((0, 9), (1, 8)):
        assert (ids[row, left:] == 0).all()
        assert np.isneginf(np.asarray(answer.scores)[row, left:]).all()


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_the_row_of_padding_never_changes(kind: str):
    c = tiny.config(loss__kind=kind, train__weight_decay=0.3, train__warmup=0.0)
    made = setup(c, make_bstm(c, ITEMS), tiny.mesh(1, 1, 1))
    state, step = made.fresh(), made.step
    before = np.asarray(state.tables["item_id"])
    batch = tiny.batch([[(1, [1, 2, 3, 1])], [(2, [9, 10, 11])]], 9)
    for _ in range(3):
        state, _ = step(state, Inputs(batch))
    after = np.asarray(state.tables["item_id"])
    assert np.array_equal(after[0], before[0])
    assert not before[0].any()
    assert np.array_equal(after[ITEMS + 1 :], before[ITEMS + 1 :])
    assert not np.array_equal(after[[1, 2, 3, 9, 10, 11]], before[[1, 2, 3, 9, 10, 11]])
