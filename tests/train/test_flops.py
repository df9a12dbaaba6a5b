"""Operations of a step: counted by hand, and on the traced program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dynrec_jax.batch import History
from dynrec_jax.models.user_encoder import moments
from dynrec_jax.train import loop
from dynrec_jax.train.flops import Cost, Utilisation, training_cost

from .. import tiny

ITEMS = 25
K = 6  # negatives

# By hand, D 8: query, key, value and out have 8 x 8 weights each; "prenorm" has three matrices of 8 x 24, "seed" two
# of 8 x 32. Two operations a weight; 2 x 8 for each item that is scored; and all of it three times.
PRENORM, SEED = 2 * (4 * 64 + 3 * 192), 2 * (4 * 64 + 2 * 256)
FULL, SAMPLED = 16 * ITEMS, 16 * (K + 1)


@pytest.mark.parametrize(
    ("changes", "target", "pair"),
    [
        ({"backward": 0.0}, 3 * (PRENORM + FULL), 3 * 32),
        ({}, 2 * 3 * (PRENORM + FULL), 2 * 3 * 32),
        ({"model__forward_weight": 0.0}, 3 * (PRENORM + FULL), 3 * 32),
        ({"model__layers": 3, "backward": 0.0}, 3 * (3 * PRENORM + FULL), 3 * 3 * 32),
        ({"model__block": "seed"}, 2 * 3 * (SEED + FULL), 2 * 3 * 32),
        ({"loss__kind": "sampled"}, 2 * 3 * (PRENORM + SAMPLED), 2 * 3 * 32),
        ({"model__hops": 2, "backward": 0.0}, 3 * (PRENORM + FULL + 2 * 32 * ITEMS), 3 * 32),
    ],
)
def test_the_cost_is_that_counted_by_hand(changes: dict[str, Any], target: int, pair: int):
    weight = changes.get("backward", 0.5)
    given = {name: value for name, value in changes.items() if name != "backward"}
    model, params, _ = tiny.bstm(ITEMS, model__backward_weight=weight, loss__negatives=K, **given)
    assert training_cost(model, params, K) == Cost(target, pair)
    assert training_cost(model, jax.eval_shape(lambda: params), K) == Cost(target, pair)


def products(jaxpr: Any) -> int:
    """Operations of all matrix products in a traced program, those of loops and inner functions too."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left, (out,) = equation.invars[0].aval.shape, equation.outvars
            total += 2 * out.aval.size * int(np.prod([left[axis] for axis in contracted]))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += sum(times * products(inner) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("block", ["prenorm", "seed"])
@pytest.mark.parametrize("events", [1, 5])
def test_the_cost_of_the_encoder_is_that_of_the_traced_program(block: str, events: int):
    """One window without padding. The program computes both halves of the attention, n x n pairs."""
    model, params, _ = tiny.bstm(ITEMS, model__block=block, model__layers=2, model__backward_weight=0.0)
    at = moments(History(jnp.ones((1, events), jnp.int32)))
    rows = jnp.zeros((1, events, model.abra.dim))
    traced = products(jax.make_jaxpr(model.user_vectors)(params, rows, at).jaxpr)
    cost = training_cost(model, params, K)
    scores = 3 * FULL * events
    assert 3 * traced == cost.of(events, events**2) - scores


def test_the_peak_is_that_of_all_processes_and_one_unknown_makes_the_share_unknown(
    monkeypatch: pytest.MonkeyPatch, given_peak: float
):
    model, params, _ = tiny.bstm(ITEMS)
    config = tiny.config()
    state = loop.TrainState(None, params, None, None, None)

    class Three:
        def __init__(self, *others: float | None):
            self.others = others

        def exchange(self, own: float | None) -> list[float | None]:
            return [own, *self.others]

    found = loop.utilisation(config, model, state, Three(2e12, 3e12))  # type: ignore[arg-type]
    assert found is not None
    assert found.peak == given_peak + 5e12
    cost = training_cost(model, params, config.loss.negatives)
    assert found.share(10, 30, 0.5) == (10 * cost.target + 30 * cost.pair) / 0.5 / 6e12
    assert loop.utilisation(config, model, state, Three(2e12, None)) is None  # type: ignore[arg-type]


def test_a_share_above_all_of_the_peak_is_not_claimed():
    """The peak was measured while the machine was busy."""
    half = Utilisation(Cost(target=2.0, pair=1.0), peak=40.0)
    assert half.share(targets=3, attended=14, seconds=1.0) == 0.5
    assert half.share(targets=3, attended=14, seconds=0.5) == 1.0
    assert half.share(targets=3, attended=14, seconds=0.49) is None
