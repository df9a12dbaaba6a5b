"""Served is trained, with times: the loss is that of the lists which scoring makes at the time of each target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.models.bstm import Rows

from .. import tiny

ITEMS, TYPES = 20, ("view", "buy")
WINDOW, TIMES, EVENTS = [3, 7, 1, 9, 4], [5, 90, 4_000, 4_000, 300_000], [1, 2, 0, 1, 2]
CASES = {
    "asked": {"model__query_time": True},
    "untold": {},
    "hstu": {"model__query_time": True, "model__block": "hstu", "model__positions": "relative"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_scores_at_the_time_of_each_target(case: str):
    sight = {"model__time": ("bias", "rotary", "sinusoidal"), "model__events": True, **CASES[case]}
    model, params, tables = tiny.bstm(ITEMS, event_types=TYPES, model__backward_weight=0.0, **sight)
    params, table = tiny.shaken(params, scale=0.1), tables["item_id"]
    batch = tiny.batch([[(1, WINDOW)]], 9)
    told = (jnp.asarray([values + [0] * 4], jnp.int32) for values in (TIMES, EVENTS))
    batch = batch._replace(**dict(zip(("times", "events"), told, strict=True)))
    # After each prefix, asked for at the time of what follows.
    keep = np.arange(8) < np.arange(1, 5)[:, None]
    ends = [
        np.where(keep, np.array(values + [0] * 3), 0).astype(np.int32) for values in (WINDOW, TIMES, EVENTS)
    ]
    asked = jnp.asarray(TIMES[1:], jnp.int32) if model.sight.query_time else None

    @jax.jit
    def run():
        rows = Rows(items={"item_id": table[batch.items]}, catalogue={"item_id": table})
        trained = model.loss(params, rows, batch, None, jax.random.key(0))[0]
        history = History(*map(jnp.asarray, ends), asked)
        none = jnp.zeros((4, 1), jnp.int32)
        served = model.recommend(params, table[ends[0]], history, model.ready(table), none, ITEMS)
        return trained, served.ids, served.scores

    trained, ids, scores = (np.asarray(x) for x in run())
    log_share = scores - np.log(np.exp(scores.astype(np.float64)).sum(axis=1, keepdims=True))
    targets = np.array(WINDOW[1:])[:, None]
    np.testing.assert_allclose(trained, -log_share[ids == targets].sum(), rtol=1e-5)
