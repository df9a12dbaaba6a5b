"""ABRA's scores are the training logits: their softmax cross entropy is the training loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.models.bstm import Rows

from .. import tiny

ITEMS = 30


@pytest.mark.parametrize(
    "changes", [{}, {"model__normalise": True, "model__temperature": 0.07}, {"model__hops": 2}]
)
def test_the_softmax_of_the_served_scores_gives_the_training_loss(changes: dict[str, object]):
    model, params, tables = tiny.bstm(ITEMS, model__backward_weight=0.0, **changes)
    table_RxD = tables["item_id"]
    window = [4, 11, 30, 2, 2, 17]
    batch = tiny.batch([[(1, window)]], 9)
    rows = Rows(items={"item_id": table_RxD[batch.items]}, catalogue={"item_id": table_RxD})
    total, targets = jax.jit(lambda: model.loss(params, rows, batch, None, jax.random.key(0)))()

    # Serve after each prefix, with the whole catalogue as the list.
    prefixes = np.zeros((5, 8), np.int32)
    for t in range(5):
        prefixes[t, : t + 1] = window[: t + 1]

    def serve() -> tuple[jax.Array, jax.Array]:
        catalogue = model.ready(model.catalogue(params, tables))
        none = jnp.zeros((5, 1), jnp.int32)
        answer = model.recommend(
            params, table_RxD[prefixes], History(jnp.asarray(prefixes)), catalogue, none, ITEMS
        )
        return answer.ids, answer.scores

    ids, scores = (np.asarray(x) for x in jax.jit(serve)())
    loss = 0.0
    for t in range(5):
        logit = dict(zip(ids[t].tolist(), scores[t].astype(np.float64), strict=True))
        assert sorted(logit) == list(range(1, ITEMS + 1))
        loss += np.log(sum(np.exp(s) for s in logit.values())) - logit[window[t + 1]]
    assert int(targets) == 5
    np.testing.assert_allclose(float(total), loss, rtol=2e-6)
