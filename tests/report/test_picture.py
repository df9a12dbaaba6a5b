"""What the picture shows of a model is ABRA's attention, also on several devices and in a table of another order."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dynrec_jax.batch import History
from dynrec_jax.models.features import Items
from dynrec_jax.models.user_encoder import moments
from dynrec_jax.parallel.table import rows_for, rows_of
from dynrec_jax.report.attention import attention_over, topics_of

from .. import tiny


@pytest.mark.parametrize(("items", "devices"), [(20, 1), (70_000, 2)])
def test_the_inferred_interest_is_the_attention_over_all_items(items: int, devices: int):
    model, params, tables = tiny.bstm(items)
    history = np.array([[3, items, 7, 1, 0, 0, 0, 0]], np.int32)
    run = SimpleNamespace(
        model=model,
        params=params,
        tables=tables,
        dataset=SimpleNamespace(items=items),
        mesh=tiny.mesh(devices, 1, 1),
        items=Items(items),
    )
    found = attention_over(run, History(history))
    table, rows = np.asarray(tables["item_id"], np.float64), rows_for(items)
    vectors = np.asarray(tables["item_id"])[rows_of(history, rows)]
    u = np.asarray(model.user_vectors(params, vectors, moments(History(history))), np.float64)[0]
    scores = u @ table[rows_of(np.arange(1, items + 1), rows)].T * model.abra.scale
    expected = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    assert found.shape == (8, items)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "cells",
    [
        [["War, civil", "Drama"], None, [], ["Drama"]],  # a comma within an element parts nothing
        ["War|Drama", None, "", "Drama"],
    ],
)
def test_an_item_counts_for_the_first_of_itstopics_of(cells: list[Any]):
    table = pa.table({"index": [1, 2, 3, 4], "item_id": ["a", "b", "c", "d"], "genres": cells})
    run: Any = SimpleNamespace(dataset=SimpleNamespace(path="d", items_table=lambda: table))
    names, topic = topics_of(run, None)
    first = "War, civil" if isinstance(cells[0], list) else "War"
    assert names == ["Drama", first, "unknown"]
    assert [names[number] for number in topic] == [first, "unknown", "unknown", "Drama"]
