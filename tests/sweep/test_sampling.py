"""Which point a search tries next, and which trials are given up, as a ledger tells them."""

import json
import statistics
from pathlib import Path

import pytest

from dynrec_jax.config import default_config
from dynrec_jax.sweep import choice, integer, over, product, pruned, real, search, when
from dynrec_jax.sweep.definition import Sweep, make
from dynrec_jax.sweep.ledger import (
    COMPLETE,
    PRUNED,
)
from tests.sweep.bench import Bench, done

SPACE = {
    "train.learning_rate": real(1e-4, 1e-2, log=True),
    "model.layers": integer(1, 3),
    "model.block": choice("prenorm", "hstu"),
    "model.time_buckets": when("model.block", "hstu", integer(8, 64, log=True)),
}


@pytest.mark.parametrize(
    "sampler", ["random", "tpe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qmc", "nsgaii"))]
)
def test_a_search_draws_within_its_ranges_whoever_draws(bench: Bench, tmp_path: Path, sampler: str) -> None:
    sweep = make(default_config(), search(SPACE, trials=16, sampler=sampler, seed=2, startup=5))

    def drawn(bench: Bench, workers: int, sweep: Sweep = sweep) -> list[dict]:
        ledgers = [bench.join(sweep) for _ in range(workers)]
        points = []
        while (task := ledgers[len(points) % workers].claim()) is not None:
            points.append(task.point)
            done(ledgers[(len(points) - 1) % workers], task, value=task.point["train.learning_rate"])
        return points

    one = drawn(bench, 1)
    (tmp_path / "other").mkdir()
    assert drawn(Bench(tmp_path / "other"), 3) == one
    assert len(one) == 16
    assert len({json.dumps(point) for point in one}) == 16
    for point in one:
        assert 1e-4 <= point["train.learning_rate"] <= 1e-2
        assert point["model.layers"] in (1, 2, 3)
        assert ("model.time_buckets" in point) == (point["model.block"] == "hstu")
        assert 8 <= point.get("model.time_buckets", 8) <= 64
    assert {point["model.block"] for point in one} == {"prenorm", "hstu"}
    buckets = {point["model.time_buckets"] for point in one if "model.time_buckets" in point}
    assert len(buckets) > 1, "conditions are drawn anew each time"
    if sampler != "random":  # what comes first is drawn at random by some
        (tmp_path / "random").mkdir()
        other = make(default_config(), search(SPACE, trials=16, sampler="random", seed=2, startup=5))
        assert drawn(Bench(tmp_path / "random"), 1, other)[8:] != one[8:]


def test_combinations_that_are_no_configs_are_passed_over(bench: Bench) -> None:
    space = {"model.dim": choice(16, 12), "model.heads": choice(1, 2, 3), "seed": integer(0, 9)}
    sweep = make(default_config(), search(space, trials=20, sampler="random"))
    ledger = bench.join(sweep)
    points = []
    while (task := ledger.claim()) is not None:
        points.append(task.point)
        done(ledger, task)
    assert len(points) == 20
    assert all(point["model.dim"] % point["model.heads"] == 0 for point in points)
    rates = {"model.dim": integer(12, 64), "train.learning_rate": real(0.1, 1.0)}
    ledger = Bench(bench.path / "other").join(make(default_config(), search(rates, trials=5)))
    assert [task.point["model.dim"] % 2 for task in (ledger.claim() for _ in range(5)) if task] == [0] * 5


def test_tpe_learns_from_what_was_measured(tmp_path: Path) -> None:
    def miss(sampler: str) -> float:
        """How far the later half of the trials is from the best rate, 0.3."""
        (tmp_path / sampler).mkdir()
        space = {"train.learning_rate": real(0.001, 1.0)}
        sweep = make(default_config(), search(space, trials=40, sampler=sampler, startup=8))
        ledger = Bench(tmp_path / sampler).join(sweep)
        misses = []
        while (task := ledger.claim()) is not None:
            misses.append(abs(task.point["train.learning_rate"] - 0.3))
            done(ledger, task, value=-misses[-1])
        return statistics.median(misses[20:])

    assert miss("tpe") < 0.6 * miss("random")


def test_a_space_that_is_exhausted_ends_the_search(bench: Bench) -> None:
    sweep = make(
        default_config(), search({"model.layers": choice(1, 2, 3), "model.heads": choice(1, 2)}, trials=50)
    )
    ledger = bench.join(sweep)
    points = []
    while (task := ledger.claim()) is not None:
        points.append(tuple(task.point.values()))
        done(ledger, task)
    assert sorted(points) == [(layers, heads) for layers in (1, 2, 3) for heads in (1, 2)]
    assert ledger.done()


def test_to_ask_whether_all_is_done_takes_no_point_of_a_sequence(tmp_path: Path) -> None:
    def drawn(folder: Path, asked: int) -> list[dict]:
        folder.mkdir()
        space = {"train.learning_rate": real(1e-4, 1e-2), "model.layers": integer(1, 3)}
        ledger = Bench(folder).join(make(default_config(), search(space, trials=5, sampler="qmc")))
        points = []
        while (task := ledger.claim()) is not None:
            points.append(task.point)
            done(ledger, task)
            for _ in range(asked):
                ledger.done()
        return points

    assert drawn(tmp_path / "a", 0) == drawn(tmp_path / "b", 2)


def test_a_search_can_be_extended(bench: Bench) -> None:
    space = {"train.learning_rate": real(1e-4, 1e-2)}
    ledger = bench.join(make(default_config(), search(space, trials=2)))
    for _ in range(2):
        task = ledger.claim()
        assert task is not None
        done(ledger, task)
    assert ledger.claim() is None
    more = bench.join(make(default_config(), search(space, trials=3)))
    task = more.claim()
    assert task is not None
    assert task.number == 2


def config(steps: int):
    c = default_config()
    c.train.steps, c.train.evaluate_every = steps, 5
    return c


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_hopeless_trials_are_given_up(bench: Bench, pruner: str) -> None:
    sweep = make(config(45), pruned(product(over("seed", range(20))), pruner))
    ledger = bench.join(sweep)
    steps = {}
    while (task := ledger.claim()) is not None:
        steps[task.number] = 0
        value = 1.0 - (task.number % 5) / 5  # every fifth is good
        for step in range(5, 50, 5):
            steps[task.number] = step
            if ledger.report(task, step, value):
                ledger.finish(task, PRUNED, step, {"ndcg@10": value}, "behind")
                break
        else:
            done(ledger, task, value)
    rows = ledger.rows()
    assert {row.state for row in rows} == {COMPLETE, PRUNED}
    assert sum(steps.values()) < 0.8 * 20 * 45
    assert max(row.value or 0 for row in rows if row.state == COMPLETE) == 1.0
    assert all(row.state == COMPLETE for row in rows if row.value == 1.0)


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_a_trial_that_was_given_up_stays_so_for_whoever_goes_on_with_it(bench: Bench, pruner: str) -> None:
    sweep = make(config(45), pruned(over("seed", range(20)), pruner))
    ledger = bench.join(sweep)
    while (task := ledger.claim()) is not None:
        value = 1.0 - task.number / 20
        for step in range(5, 50, 5):
            if ledger.report(task, step, value):
                ledger.release(task)  # killed before it could finish
                again = ledger.claim()
                assert again is not None
                assert (again.number, again.given_up, again.best_step) == (task.number, step, 5)
                assert ledger.report(again, step, value)
                assert ledger.report(again, step + 5, 2.0)
                return
        done(ledger, task, value)
    raise AssertionError("none was given up")


def test_the_last_step_gives_nothing_up(bench: Bench) -> None:
    ledger = bench.join(make(config(10), pruned(over("seed", range(12)), "median")))
    while (task := ledger.claim()) is not None:
        assert not ledger.report(task, 10, 1.0 - task.number / 12, last=True)
        done(ledger, task, 1.0 - task.number / 12)
