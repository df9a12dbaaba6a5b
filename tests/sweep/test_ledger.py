"""The ledger in a database: leases, with workers that are threads or objects of this process."""

import contextlib
import subprocess
import sys
import threading

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from dynrec_jax.errors import ConfigError
from dynrec_jax.files import held
from dynrec_jax.sweep import life
from dynrec_jax.sweep.ledger import (
    COMPLETE,
    FAILED,
    MOST_DEATHS,
    RUNNING,
    WAITING,
    Lost,
    Task,
)
from dynrec_jax.sweep.storage import Storage
from dynrec_jax.sweep.study import LEASE
from tests.sweep.bench import ELSEWHERE, Bench, done, grid


def test_every_point_is_given_out_once(bench: Bench) -> None:
    sweep = grid(12)
    found: list[Task] = []

    def work() -> None:
        ledger = bench.join(sweep)
        while (task := ledger.claim()) is not None:
            found.append(task)
            done(ledger, task)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(task.number for task in found) == list(range(12))
    assert sorted(task.point["seed"] for task in found) == list(range(12))
    ledger = bench.join(sweep)
    assert ledger.done()
    assert [row.state for row in ledger.rows()] == [COMPLETE] * 12
    assert {row.attempts for row in ledger.rows()} == {1}


def test_rows_tell_how_trials_stand(bench: Bench) -> None:
    ledger = bench.join(grid())
    first, second = ledger.claim(), ledger.claim()
    assert first is not None
    assert second is not None
    ledger.report(first, 5, 0.25)
    ledger.report(first, 10, 0.125)
    ledger.beat(first, 7.5)
    ledger.finish(second, FAILED, None, {}, "the loss is NaN")
    rows = ledger.rows()
    assert [row.state for row in rows] == [RUNNING, FAILED, WAITING, WAITING]
    assert (rows[0].value, rows[0].step, rows[0].seconds, rows[0].attempts) == (0.25, 10, 7.5, 1)
    assert rows[1].reason == "the loss is NaN"
    assert not ledger.done()


def test_what_is_alive_is_left_alone_and_what_was_given_back_is_taken(bench: Bench) -> None:
    sweep = grid(1)
    one, other = bench.join(sweep), bench.join(sweep)
    task = one.claim()
    assert task is not None
    assert other.claim() is None
    assert not other.done()
    one.release(task)
    again = other.claim()
    assert again == Task(0, {"seed": 0}, 2, "trials/0000")
    with pytest.raises(Lost):
        one.report(task, 5, 0.1)
    done(other, again)
    assert other.done()


def test_a_trial_whose_process_ended_on_this_machine_is_taken_at_once(bench: Bench) -> None:
    sweep = grid(1)
    ledger = bench.join(sweep)
    ledger.claim()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        bench.holder(
            ledger, 0, {"machine": life.machine(), "pid": child.pid, "started": life.started(child.pid)}
        )
        assert ledger.claim() is None
        child.kill()
    task = ledger.claim()
    assert task is not None
    assert task.attempt == 2


def test_another_process_of_the_same_number_is_not_the_holder() -> None:
    assert not life.is_dead(life.own())
    assert life.is_dead({**life.own(), "started": life.own()["started"] - 1})
    assert not life.is_dead({**life.own(), "machine": "another"})


def test_a_trial_elsewhere_is_taken_after_the_grace_period_without_a_sign(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, now = grid(1), [1000.0]
    monkeypatch.setattr("dynrec_jax.sweep.study.time.monotonic", lambda: now[0])
    ledger = bench.join(sweep, grace=10.0)
    task = ledger.claim()
    assert task is not None
    bench.holder(ledger, 0, ELSEWHERE)
    assert ledger.claim() is None  # seen for the first time, whatever its own clock says
    now[0] += 9.0
    assert ledger.claim() is None
    trial = ledger._all()[0]
    lease = {**trial.user_attrs[LEASE], "beat": 1}
    ledger.storage.trials.set_trial_user_attr(trial._trial_id, LEASE, lease)
    now[0] += 9.0
    assert ledger.claim() is None  # a new sign of life
    now[0] += 10.5
    again = ledger.claim()
    assert again is not None
    # Its folder is left alone: whoever shows no sign of life may still wake up.
    assert (again.attempt, again.folder, again.source) == (2, "trials/0000-2", "trials/0000")


def test_the_longer_grace_period_of_two_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, now = grid(1), [1000.0]
    monkeypatch.setattr("dynrec_jax.sweep.study.time.monotonic", lambda: now[0])
    patient, hasty = bench.join(sweep, grace=100.0), bench.join(sweep, grace=1.0)
    patient.claim()
    bench.holder(patient, 0, ELSEWHERE)
    assert hasty.claim() is None
    now[0] += 99.0
    assert hasty.claim() is None
    now[0] += 2.0
    assert hasty.claim() is not None


def test_after_the_database_was_gone_signs_of_life_are_waited_for_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("dynrec_jax.sweep.study.time.monotonic", lambda: now[0])
    monkeypatch.setattr("dynrec_jax.sweep.storage.time.sleep", lambda seconds: None)
    ledger = bench.join(grid(1), grace=10.0)
    ledger.claim()
    bench.holder(ledger, 0, ELSEWHERE)
    assert ledger.claim() is None
    now[0] += 60.0
    whole, calls = ledger._all, iter([True])

    def gone() -> list:
        if next(calls, False):
            raise OperationalError("select", {}, Exception("server closed"))
        return whole()

    monkeypatch.setattr(ledger, "_all", gone)
    assert ledger.claim() is None, "nobody could show a sign of life"
    now[0] += 10.5
    assert ledger.claim() is not None


def test_a_claim_whose_answer_was_lost_is_not_made_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = bench.join(grid(3))
    monkeypatch.setattr("dynrec_jax.sweep.storage.time.sleep", lambda seconds: None)
    create, calls = ledger.storage.trials.create_new_trial, iter([True])

    def create_and_lose(*arguments, **more):
        made = create(*arguments, **more)
        if next(calls, False):
            raise OperationalError("commit", {}, Exception("server closed"))
        return made

    monkeypatch.setattr(ledger.storage.trials, "create_new_trial", create_and_lose)
    task = ledger.claim()
    assert task is not None
    assert task.number == 0
    assert [row.state for row in ledger.rows()] == [RUNNING, WAITING, WAITING]


def test_a_lock_that_was_lost_after_the_work_does_not_repeat_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = bench.join(grid(3))
    lock = ledger.storage._lock

    @contextlib.contextmanager
    def broken():
        with lock():
            yield
        raise OperationalError("commit", {}, Exception("server closed"))

    monkeypatch.setattr(ledger.storage, "_lock", broken)
    task = ledger.claim()
    assert task is not None
    assert [row.state for row in ledger.rows()] == [RUNNING, WAITING, WAITING]


def test_without_the_lock_a_point_is_still_given_out_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = grid(3)
    one, other = bench.join(sweep), bench.join(sweep)
    for ledger in (one, other):
        monkeypatch.setattr(ledger.storage, "_lock", contextlib.nullcontext)
    create, between = one.storage.trials.create_new_trial, []

    def create_later(*arguments, **more):
        if not between:
            between.append(other.claim())  # what the lock would have kept away
        return create(*arguments, **more)

    monkeypatch.setattr(one.storage.trials, "create_new_trial", create_later)
    tasks = [one.claim(), *between, one.claim()]
    assert [task.point["seed"] for task in tasks if task] == [1, 0, 2]
    assert one.claim() is None
    assert sorted(row.point["seed"] for row in one.rows()) == [0, 1, 2]


def test_trials_of_somebody_else_in_the_study_are_left_alone(bench: Bench) -> None:
    ledger = bench.join(grid(2))
    study = optuna.load_study(study_name="test", storage=bench.address)
    study.enqueue_trial({"seed": 7})
    tasks = [ledger.claim(), ledger.claim()]
    assert [task.point["seed"] for task in tasks if task] == [0, 1]
    assert ledger.claim() is None
    for task in tasks:
        assert task is not None
        ledger.report(task, 5, 0.5)
        done(ledger, task)
    assert ledger.done()
    assert [row.state for row in ledger.rows()] == [COMPLETE, COMPLETE]


def test_seconds_of_all_attempts_are_added_up(bench: Bench) -> None:
    ledger = bench.join(grid(1))
    for _ in range(3):
        task = ledger.claim()
        assert task is not None
        ledger.beat(task, 2.0)
        ledger.beat(task, 5.0)
        ledger.release(task)
    assert ledger.rows()[0].seconds == 15.0


def test_whoever_lost_a_trial_can_write_nothing(bench: Bench) -> None:
    sweep = grid(1)
    ledger = bench.join(sweep)
    old = ledger.claim()
    assert old is not None
    bench.holder(ledger, 0, {**life.own(), "started": 0})
    new = ledger.claim()
    assert new is not None
    ledger.report(new, 5, 0.3)
    for write in (
        lambda: ledger.report(old, 10, 0.9),
        lambda: ledger.beat(old, 1.0),
        lambda: ledger.finish(old, COMPLETE, 10, {"ndcg@10": 0.9}),
    ):
        with pytest.raises(Lost):
            write()
    ledger.release(old)  # of what is not its own, nothing is given back
    assert ledger.claim() is None
    done(ledger, new, 0.4)
    with pytest.raises(Lost):
        done(ledger, new, 0.9)
    assert ledger.rows()[0].value == 0.4


def test_a_folder_that_a_stopped_process_holds_is_left_to_it(bench: Bench) -> None:
    sweep = grid(1)
    ledger = bench.join(sweep)
    task = ledger.claim()
    assert task is not None
    folder = bench.path / task.folder
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "checkpoints" / "5" / "state").write_text("weights")
    (folder / "config.json").write_text("{}")
    bench.holder(ledger, 0, {**life.own(), "started": 0})
    with held(folder):
        again = ledger.claim()
    assert again is not None
    assert (again.folder, again.source) == ("trials/0000-2", "trials/0000")
    with pytest.raises(Lost):
        ledger.beat(task, 1.0)
    # Killed before it had copied anything, it leaves the first folder to be copied by the next one.
    bench.holder(ledger, 0, ELSEWHERE)
    third = bench.join(sweep, grace=0.0)
    assert third.claim() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynrec_jax.sweep.study.time.monotonic", lambda: 1e9)
        again = third.claim()
    assert again is not None
    assert (again.folder, again.source) == ("trials/0000-3", "trials/0000")


def test_a_trial_that_kills_its_workers_fails_at_last_and_says_so(bench: Bench) -> None:
    ledger = bench.join(grid(1))
    for _ in range(MOST_DEATHS):
        assert ledger.claim() is not None
        bench.holder(ledger, 0, {**life.own(), "started": 0})
    assert ledger.claim() is None
    row = ledger.rows()[0]
    assert row.state == FAILED
    assert f"{MOST_DEATHS} times" in row.reason
    assert ledger.done()


def test_deaths_that_left_a_new_checkpoint_do_not_count(bench: Bench) -> None:
    ledger = bench.join(grid(1))
    for number in range(MOST_DEATHS + 3):
        task = ledger.claim()
        assert task is not None
        (bench.path / task.folder / "checkpoints" / str(number)).mkdir(parents=True)
        bench.holder(ledger, 0, {**life.own(), "started": 0})
    assert ledger.rows()[0].state == RUNNING


def test_another_sweep_of_the_same_name_is_refused(bench: Bench) -> None:
    bench.join(grid(2)).claim()
    with pytest.raises(ConfigError, match="2 trials -> 3"):
        bench.join(grid(3))


def test_somebody_elses_study_is_refused(bench: Bench) -> None:
    Storage(bench.address)
    study = optuna.create_study(storage=bench.address, study_name="test")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ConfigError, match="is no sweep of ours"):
        bench.join(grid(2))


def test_nothing_measured_is_a_failure(bench: Bench) -> None:
    ledger = bench.join(grid(1))
    task = ledger.claim()
    assert task is not None
    ledger.finish(task, COMPLETE, None, {})
    assert ledger.rows()[0].state == FAILED
