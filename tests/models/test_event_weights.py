"""Targets that count by their event type, and the types that a model is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.data.event_types import target_types, target_weights
from dynrec_jax.errors import ConfigError
from dynrec_jax.models.bstm import Rows

from .. import tiny

ITEMS, TYPES = 20, ("view", "buy")
EVENTS = [0, 1, 2, 1, 2]


def losses(**changes):
    """The loss of a window of five events and what it is divided by, whole and of each (forward) target alone."""
    model, params, tables = tiny.bstm(ITEMS, event_types=TYPES, model__backward_weight=0.0, **changes)
    batch = tiny.batch([[(1, [3, 7, 1, 9, 4])]], 9)
    batch = batch._replace(events=jnp.asarray([EVENTS + [0] * 4]))
    rows = Rows(items={"item_id": tables["item_id"][batch.items]}, catalogue={"item_id": tables["item_id"]})
    return jax.jit(lambda: model.loss(params, rows, batch, None, jax.random.key(0)))()


def test_a_target_counts_by_its_type():
    alone = {}
    for kind in TYPES:
        total, weight = losses(data__target_events=(kind,))
        alone[kind] = float(total)
        assert weight == EVENTS[1:].count(TYPES.index(kind) + 1)
    both, count = losses()
    assert count == 4
    np.testing.assert_allclose(sum(alone.values()), both, rtol=1e-5)
    total, weight = losses(loss__event_weights=("buy:3", "view:0.5"))
    assert weight == 2 * 3 + 2 * 0.5
    np.testing.assert_allclose(total, 3 * alone["buy"] + 0.5 * alone["view"], rtol=1e-5)


def test_weights_and_targets_are_read_from_the_config():
    config = tiny.config(loss__event_weights=("buy:3",), data__target_events=("buy",))
    assert target_weights(config, TYPES) == (0.0, 0.0, 3.0)
    assert target_types(config, TYPES) == {2}
    assert target_weights(tiny.config(), TYPES) == ()
    assert target_types(tiny.config(), TYPES) is None
    with pytest.raises(ConfigError, match=r"loss\.event_weights: the dataset has no event type 'rent'"):
        target_weights(tiny.config(loss__event_weights=("rent:1",)), TYPES)


@pytest.mark.parametrize("text", ["buy", "buy:", ":3", "buy:much", "buy:-1", "buy:inf", "buy:nan"])
def test_weights_that_are_none_are_refused(text: str):
    with pytest.raises(ConfigError, match=r'expected a type and its weight, such as "purchase:5"'):
        tiny.config(loss__event_weights=(text,))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__time": ("clock",)}, "'clock' is not one of bias, rotary, sinusoidal"),
        ({"model__time": ("rotary",), "model__dim": 6, "model__heads": 2}, "each of 2 heads has 3"),
        ({"model__block": "gru", "model__attention_window": 4}, "a gru has no attention"),
        ({"model__block": "mean", "model__time": ("bias",)}, "a mean has no weights"),
        ({"model__attention_window": 9}, "is more than data.max_length=8"),
        ({"evaluation__test_from": 5}, "validation_from=0 and test_from=5"),
        ({"data__target_events": ("",)}, "expected names of event types"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, told: str):
    with pytest.raises(ConfigError, match=told):
        tiny.config(**changes)
