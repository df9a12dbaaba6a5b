import json
from pathlib import Path

import pytest

from dynrec_jax.config import default_config
from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.sweep import choice, over, pruned, search
from dynrec_jax.sweep.definition import Sweep, make
from dynrec_jax.sweep.ledger import COMPLETE, FAILED, MOST_DEATHS, RUNNING, WAITING, Task
from dynrec_jax.sweep.shards import ShardLedger, parse

METRICS = {"ndcg@10": 0.25, "mrr": 0.125}


def grid(points: int = 7) -> Sweep:
    return make(default_config(), over("seed", range(points)))


def end(ledger: ShardLedger) -> None:
    """What the end of its process does."""
    for file in ledger._held.values():
        file.close()
    ledger._held.clear()


def do_all(ledger: ShardLedger) -> list[int]:
    found = []
    while (task := ledger.claim()) is not None:
        found.append(task.number)
        ledger.beat(task, 3.0)
        ledger.finish(task, COMPLETE, 5, METRICS)
    return found


def test_shards_are_numbers_apart_and_together_everything(tmp_path: Path) -> None:
    parts = [do_all(ShardLedger(grid(), tmp_path, index, 3)) for index in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    rows = ShardLedger(grid(), tmp_path, 0, 3).rows()
    assert [row.state for row in rows] == [COMPLETE] * 7
    assert (rows[3].value, rows[3].step, rows[3].seconds, rows[3].folder) == (0.25, 5, 3.0, "trials/0003")


def test_what_has_ended_is_not_done_again_and_what_was_given_back_is(tmp_path: Path) -> None:
    ledger = ShardLedger(grid(2), tmp_path, 0, 1)
    task = ledger.claim()
    assert task == Task(0, {"seed": 0}, 1, "trials/0000")
    again = ShardLedger(grid(2), tmp_path, 0, 1)
    other = again.claim()
    assert other is not None
    assert other.number == 1, "the first one is held"
    assert not again.done()
    ledger.release(task)
    back = again.claim()
    assert back == Task(0, {"seed": 0}, 2, "trials/0000")
    assert [row.state for row in again.rows()] == [RUNNING, RUNNING]
    again.finish(back, FAILED, None, {}, "the loss is NaN")
    again.finish(other, COMPLETE, None, {})
    rows = again.rows()
    assert [row.state for row in rows] == [FAILED, FAILED]
    assert "nothing was measured" in rows[1].reason
    assert again.done()
    assert again.claim() is None


def test_the_rest_waits(tmp_path: Path) -> None:
    do_all(ShardLedger(grid(3), tmp_path, 1, 2))
    assert [row.state for row in ShardLedger(grid(3), tmp_path, 0, 2).rows()] == [WAITING, COMPLETE, WAITING]


def test_a_trial_that_kills_its_workers_fails_at_last_and_the_rest_goes_on(tmp_path: Path) -> None:
    for attempt in range(MOST_DEATHS):
        ledger = ShardLedger(grid(2), tmp_path, 0, 1)
        task = ledger.claim()
        assert task is not None
        assert (task.number, task.attempt) == (0, attempt + 1)
        assert ledger.rows()[0].attempts == attempt + 1
        end(ledger)
    ledger = ShardLedger(grid(2), tmp_path, 0, 1)
    task = ledger.claim()
    assert task is not None
    assert task.number == 1
    assert ledger.rows()[0].state == FAILED
    assert f"{MOST_DEATHS} times" in ledger.rows()[0].reason
    end(ledger)


def test_attempts_that_were_given_back_or_left_a_checkpoint_are_no_deaths(tmp_path: Path) -> None:
    for attempt in range(3 * MOST_DEATHS):
        ledger = ShardLedger(grid(1), tmp_path, 0, 1)
        task = ledger.claim()
        assert task is not None
        assert task.attempt == attempt + 1
        if attempt % 3 == 0:
            ledger.release(task)
        elif attempt % 3 == 1:
            (tmp_path / task.folder / "checkpoints" / str(attempt)).mkdir(parents=True)
        end(ledger)


def test_a_damaged_result_is_told(tmp_path: Path) -> None:
    ledger = ShardLedger(grid(1), tmp_path, 0, 1)
    for text in ("{", json.dumps({"state": "complete"}), "[]"):
        (tmp_path / "results" / "0000.json").write_text(text)
        with pytest.raises(DataError, match=r"0000\.json: damaged"):
            ledger.rows()


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0", "0/0", "1/2/3", "", "1.0/2"])
def test_no_shard(text: str) -> None:
    with pytest.raises(ConfigError, match="expected i/n"):
        parse(text)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no folder can be made"):
        ShardLedger(grid(1), tmp_path / "file" / "sweep", 0, 1)


def test_what_must_know_of_others_is_not_divided(tmp_path: Path) -> None:
    for found in (search({"model.layers": choice(1, 2)}, 2), pruned(over("seed", [1, 2]), "median")):
        with pytest.raises(ConfigError, match="divides a plain grid"):
            ShardLedger(make(default_config(), found), tmp_path, 0, 2)
