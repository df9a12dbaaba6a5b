"""The exported program recommends what evaluation and scoring recommend, for any number of users, in any model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.evaluate.recommender import NonFiniteScores
from dynrec_jax.export.program import USERS, VECTORS, Served
from dynrec_jax.export.runner import Fault, Runner
from dynrec_jax.models import item_encoder
from dynrec_jax.parallel import blocks, stream, table, topk
from dynrec_jax.parallel.table import rows_for, rows_of

from .runs import answers, assert_same, exported, lines, recommended, untrained

TIMED = {
    "model__positions": "relative",
    "model__time": ("bias", "rotary", "sinusoidal"),
    "model__query_time": True,
    "model__events": True,
    "model__neighbours": 1.0,
    "model__shrinkage": 2.0,
}
MODELS = {
    "hops": {"model__hops": 2, "model__block": "hstu", "model__neighbours": 0.5},
    "interests": {
        "model__interests": 3,
        "model__block": "gru",
        "model__layers": 3,
        "model__scan_layers": True,
        "model__normalise": True,
        "model__neighbours": 0.5,
    },
    "ensemble": {
        "item__fusion": "ensemble",
        "item__attributes": ("a",),
        "model__normalise": True,
        "model__dtype": "bfloat16",
    },
}


@pytest.fixture(scope="module")
def timed(timed_dataset: Dataset, cache_dir: Path) -> Histories:
    return Histories(timed_dataset, cache_dir)


def test_a_program_takes_any_number_of_users(tiny_dataset: Dataset, histories: Histories, tmp_path: Path):
    run = untrained(tiny_dataset)
    folder = exported(run, tmp_path / "out", k=20, filter_seen=True)
    expected = recommended(run, histories, 20, True)
    assert (expected.ids == 0).any(), "some have seen nearly everything"
    users, runner = lines(histories), Runner(folder)
    assert len(users) % 7, "the last batch is filled up"
    for batch_size in (1, 7, 512):
        assert_same(list(runner.run(users, batch_size)), expected, run.item_ids.to_pylist())


@pytest.mark.parametrize(
    "name",
    ["hops", *(pytest.param(name, marks=pytest.mark.slow) for name in ("interests", "ensemble"))],
)
def test_a_program_is_the_model(tiny_dataset: Dataset, histories: Histories, tmp_path: Path, name: str):
    run = untrained(tiny_dataset, **MODELS[name])
    runner = Runner(exported(run, tmp_path / "out"))
    assert_same(answers(runner, lines(histories)), recommended(run, histories), run.item_ids.to_pylist())


def test_times_types_and_the_moment_of_the_request_are_inputs(
    timed_dataset: Dataset, timed: Histories, tmp_path: Path
):
    run = untrained(timed_dataset, **TIMED)
    runner = Runner(exported(run, tmp_path / "out"))
    users, items, expected = lines(timed), run.item_ids.to_pylist(), recommended(run, timed)
    plain = answers(runner, users)
    assert_same(plain, expected, items)

    def changed(lines: list[Any]) -> bool:
        return all(one["scores"] != other["scores"] for one, other in zip(lines, plain, strict=True))

    later = answers(runner, users, at=1_600_900_000)
    assert changed(later)
    asked = answers(runner, [{**user, "at": 1_600_900_000} for user in users], at=1_600_000_000)
    assert asked == later, "a user's own moment goes before that of all"
    assert answers(runner, [{**user, "at": None} for user in users], at=1_600_900_000) == later
    assert answers(runner, [{"user_id": "nobody", "item_ids": [], "times": [], "events": []}]) == []
    assert runner.empty_users == 1
    with pytest.raises(Fault, match="user number 1: times go back; expected the oldest event first"):
        answers(runner, [{**users[0], "times": users[0]["times"][::-1]}])
    untold = answers(runner, [{**user, "events": ["unheard of"] * len(user["events"])} for user in users])
    assert untold == answers(runner, [{**user, "events": None} for user in users])
    assert changed(untold)


def test_a_table_in_strips_gives_the_lists_of_one_in_order(
    tiny_dataset: Dataset, histories: Histories, tmp_path: Path, monkeypatch
):
    """Large tables have another order of rows: the same vectors by item, lying otherwise, are the same lists."""
    changes = {"model__hops": 1, "model__neighbours": 1.0}
    plain = Runner(exported(untrained(tiny_dataset, **changes), tmp_path / "plain"))
    expected = answers(plain, lines(histories))
    for module in (table, topk, blocks, stream, item_encoder):
        monkeypatch.setattr(module, "STRIPED_FROM", 256)
    rows, number = rows_for(tiny_dataset.items), tiny_dataset.items
    assert rows_of(np.arange(number), rows).max() > number, "another order"
    striped = Runner(exported(untrained(tiny_dataset, **changes), tmp_path / "striped"))
    assert {"name": "vectors", "shape": [rows, 8], "dtype": "float32"} in striped.manifest["weights"]
    found = answers(striped, lines(histories))
    for one, other in zip(found, expected, strict=True):
        assert one["item_ids"] == other["item_ids"]
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-5, atol=1e-5)


def test_weights_that_are_no_numbers_are_refused(tiny_dataset: Dataset, tmp_path: Path):
    run = untrained(tiny_dataset)
    run.tables["item_id"] = run.tables["item_id"].at[3].set(np.nan)
    with pytest.raises(NonFiniteScores, match="not finite"):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_hold_what_is_served_and_no_more(tiny_dataset: Dataset):
    changes: dict[str, Any] = {"item__fusion": "ensemble", "item__attributes": ("a",)}
    names = set(Served(untrained(tiny_dataset, **changes), 5, False).weights())
    assert {name.split("/")[0] for name in names} == {USERS, VECTORS}
    assert {tuple(name.split("/")[1:3]) for name in names if "/" in name} == {
        ("id", "user"),
        ("text", "user"),
    }
