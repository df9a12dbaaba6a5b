import json

import numpy as np
import pytest

from dynrec_jax.config import default_config
from dynrec_jax.errors import ConfigError
from dynrec_jax.sweep import choice, integer, over, product, pruned, real, search, when
from dynrec_jax.sweep.definition import Sweep, difference, from_plain, larger, make
from dynrec_jax.sweep.space import Grid, Search


def base():
    c = default_config()
    c.train.steps = 40
    return c


def test_numpy_values_and_lists_become_what_configs_hold() -> None:
    sweep = make(
        base(), product(over("train.learning_rate", np.geomspace(1e-3, 1e-2, 2)), [{"model.time": ["bias"]}])
    )
    assert isinstance(sweep.what, Grid)
    assert [type(point["train.learning_rate"]) for point in sweep.what.points] == [float, float]
    assert sweep.config_of(sweep.what.points[0]).model.time == ("bias",)


def test_points_that_make_the_same_config_are_tried_once() -> None:
    points = [{"seed": 0}, {"seed": 1}, {"seed": 1, "train.steps": 40}, {"train.steps": 40}]
    assert make(base(), points).what.points == [{"seed": 0}, {"seed": 1}]


def test_a_trial_changes_its_config_alone() -> None:
    config = base()
    before = config.to_json()
    assert make(config, [{"model.dim": 32}]).config_of({"model.dim": 32}).model.dim == 32
    assert config.to_json() == before


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([{"train.learning_ratee": 1.0}], "unknown key train.learning_ratee"),
        ([{"train": 1.0}], "unknown key train"),
        ([], "nothing to try"),
        (3, "returned int"),
        ("seed", "returned str"),
        ([{"seed": 0}, 1], "1 is no point"),
        ([{"seed": 0.5}], "expected a value of type int"),
        (
            [{"model.dim": 33, "model.heads": 2}],
            "model.dim=33, model.heads=2: config.model.dim: 33 does not divide",
        ),
        ([{"dataset": "other"}], "could not be compared"),
        ([{"evaluation.filter_seen": False}], "could not be compared"),
        (search({"train.learning_rate": real(-1, 1)}, 3), "train.learning_rate"),
        (search({"model.dim": choice(32, 33)}, 3), "33 does not divide"),
        ([{"model.layers": True}], "expected a value of type int"),
        (
            search(
                {"model.block": choice("prenorm", "gru"), "model.hop": when("model.block", "gru", choice(1))},
                3,
            ),
            "hop",
        ),
        (
            search(
                {"model.block": choice("prenorm", "hstu"), "seed": when("model.block", "hstu", choice("a"))},
                3,
            ),
            "expected a value of type int",
        ),
    ],
)
def test_a_mistake_in_the_space_is_found_before_any_trial(found, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make(base(), found)


@pytest.mark.parametrize(
    "found",
    [
        pruned(product(over("seed", range(2)), over("model.time", [(), ("bias",)])), "median"),
        search(
            {
                "train.learning_rate": real(1e-4, 1e-2, log=True),
                "model.layers": integer(1, 3),
                "model.block": choice("prenorm", "hstu"),
                "model.time": when("model.block", ["hstu"], choice((), ("bias",))),
            },
            trials=5,
            sampler="random",
            pruner="hyperband",
            seed=3,
        ),
    ],
)
def test_a_sweep_comes_back_from_json_as_it_was(found) -> None:
    sweep = make(base(), found)
    back = from_plain(json.loads(json.dumps(sweep.plain())), "here")
    assert back.what == sweep.what
    assert back.base.to_json() == sweep.base.to_json()
    assert difference(sweep.plain(), back.plain()) == []


def test_damaged_data_is_no_sweep() -> None:
    good = make(base(), over("seed", range(2))).plain()
    drawn = make(base(), search({"seed": integer(0, 5)}, 2)).plain()
    assert from_plain(good, "here").total == from_plain(drawn, "here").total == 2
    damaged = (
        *({}, [], None, {"format": 1}, {"format": 2, "config": {}}, {**good, "config": []}),
        *({**good, "grid": [5]}, {**good, "grid": []}, {**good, "grid": {"a": 1}}, {**good, "pruner": "no"}),
        *({**drawn, "space": [["seed", 5]]}, {**drawn, "space": []}, {**drawn, "trials": "x"}),
    )
    for stored in damaged:
        with pytest.raises(ConfigError, match="here: holds no sweep"):
            from_plain(stored, "here")


def test_differences_are_named() -> None:
    def plain(found, **changes) -> dict:
        config = base()
        config.update_from_flattened_dict(changes)
        return make(config, found).plain()

    one = over("seed", range(2))
    assert difference(plain(one), plain(one)) == []
    assert difference(plain(one), plain(one, **{"train.learning_rate": 0.5})) == [
        "config.train.learning_rate: 0.008 -> 0.5"
    ]
    assert difference(plain(one), plain(one, **{"logging.every": 7, "dataset": "moved"})) == []
    assert difference(plain(one), plain(over("seed", range(3)))) == ["2 trials -> 3"]
    assert difference(plain(one), plain([{"seed": 0}, {"seed": 4}])) == ["trial 1: seed: 1 -> 4"]
    ranges = [search({"train.learning_rate": real(1e-4, high)}, trials=4) for high in (1e-2, 1e-1)]
    assert difference(plain(ranges[0]), plain(ranges[1])) == [
        "train.learning_rate: real(low=0.0001, high=0.01, log=False) -> real(low=0.0001, high=0.1, log=False)"
    ]
    assert difference(plain(one), plain(ranges[0])) == ["a grid -> a search"]
    more = search({"train.learning_rate": real(1e-4, 1e-2)}, trials=9)
    assert difference(plain(ranges[0]), plain(more)) == []  # it is gone on with
    assert difference(plain(more), plain(ranges[0])) == []
    assert larger(plain(more), make(base(), ranges[0])).total == 9
    assert larger(plain(ranges[0]), make(base(), more)).total == 9


def test_the_longest_trial_bounds_what_hyperband_deals_out() -> None:
    assert make(base(), over("train.steps", [10, 70])).most_steps == 70
    assert make(base(), search({"train.steps": integer(10, 90)}, 2)).most_steps == 90
    assert make(base(), search({"seed": integer(0, 9)}, 2)).most_steps == 40
    assert isinstance(make(base(), search({"seed": integer(0, 9)}, 2)).what, Search)
    assert isinstance(Sweep(base(), Grid([{}])).total, int)
