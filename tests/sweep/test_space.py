import itertools

import pytest

from dynrec_jax.sweep import choice, integer, over, product, pruned, real, search, when, zip_


def test_product_of_a_zip_and_seeds_is_every_combination_in_order() -> None:
    points = product(
        zip_("model.dim", [64, 128], "train.learning_rate", [2e-3, 1e-3]), over("seed", range(3))
    )
    expected = [
        {"model.dim": dim, "train.learning_rate": rate, "seed": seed}
        for (dim, rate), seed in itertools.product([(64, 2e-3), (128, 1e-3)], range(3))
    ]
    assert points == expected


def test_a_product_of_nothing_changes_nothing() -> None:
    assert product() == [{}]
    assert product(over("seed", [1, 2])) == [{"seed": 1}, {"seed": 2}]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: zip_("a", [1, 2], "b", [3]), "a 2, b 1"),
        (lambda: zip_("a", [1], "a", [3]), "given twice"),
        (lambda: zip_("a"), "in turn"),
        (lambda: zip_(), "in turn"),
        (lambda: product(over("a", [1]), over("a", [2])), "a is set by two grids"),
        (lambda: over("model.block", "hstu"), "expected a list"),
        (lambda: real(1, 0), "not empty"),
        (lambda: real(0, 1, log=True), "more than 0"),
        (lambda: real(0, float("inf")), "not empty"),
        (lambda: integer(1, 8, step=2, log=True), "step"),
        (lambda: choice(), "no values"),
        (lambda: when("a", [], real(0, 1)), "no values"),
        (lambda: when("a", 1, when("b", 1, real(0, 1))), "within"),
        (lambda: search({}, 3), "no keys"),
        (lambda: search({"a": real(0, 1)}, 0), "trials=0"),
        (lambda: search({"a": real(0, 1)}, 1, sampler="grid"), "tpe, random"),
        (lambda: search({"a": real(0, 1)}, 1, pruner="best"), "median"),
        (lambda: search({"a": 3}, 1), "expected real"),
        (lambda: search({"a": when("b", 1, real(0, 1)), "b": choice(1, 2)}, 1), "not drawn before"),
        (lambda: pruned([{}], "best"), "median"),
        (lambda: integer(1.5, 4), "whole numbers"),
        (lambda: when("a", 1, 5), "expected real"),
        (lambda: search({"a": choice(1, 2), "b": when("a", 7, real(0, 1))}, 1), "never drawn"),
    ],
)
def test_a_mistake_is_told(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
