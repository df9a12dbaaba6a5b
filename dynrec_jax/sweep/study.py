"""The ledger that any number of workers share, and that outlives them: a study of Optuna's in a database.

A trial is Optuna's, in the state RUNNING until it has ended; a lease among its attributes says which process holds it.
The holder shows a sign of life every few seconds. A lease whose process has ended on this machine, that was given back,
or that has shown no sign of life for the grace period by the watcher's own clock, is taken over by the next worker, who
goes on from the trial's checkpoints. Everything happens under the storage's lock, and whoever has lost a lease finds
out before anything is recorded: a stopped process that wakes up again writes nothing.
"""

import contextlib
import copy
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dynrec_jax.errors import ConfigError
from dynrec_jax.files import is_held
from dynrec_jax.sweep import life, sampling
from dynrec_jax.sweep.definition import Sweep, difference, from_plain, larger, plain_point
from dynrec_jax.sweep.ledger import (
    COMPLETE,
    FAILED,
    KILLER,
    MOST_DEATHS,
    PRUNED,
    RUNNING,
    UNMEASURED,
    WAITING,
    Lost,
    Row,
    Task,
    folder_name,
)
from dynrec_jax.sweep.space import Grid, Point
from dynrec_jax.sweep.storage import Storage

# Attributes: of a study the definition, of a trial the others.
DEFINITION, LEASE, POINT, IDENTITY, METRICS, REASON = (
    "sweep",
    "lease",
    "point",
    "identity",
    "metrics",
    "reason",
)
STEP_OF_BEST, GIVEN_UP, TWICE = "step_of_best", "given_up", "twice"
PART = 16_000  # characters of an attribute: MySQL's hold 65,535 bytes
STATES = {
    TrialState.COMPLETE: COMPLETE,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
    TrialState.RUNNING: RUNNING,
    TrialState.WAITING: WAITING,
}
ENDED = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


class StudyLedger:
    """A ledger in a database.

    Attributes:
      sweep: what is tried; of a search, with the largest number of trials that somebody has asked for before.
      storage: the database.
    """

    def __init__(
        self,
        sweep: Sweep,
        storage: Storage,
        name: str,
        workdir: Path,
        grace: float,
        say: Callable[[str], None] = lambda line: None,
    ):
        """Joins the sweep of that name, or begins it.

        Args:
          sweep: what is tried.
          storage: the database.
          name: of the sweep, in the database.
          workdir: the sweep's folder.
          grace: seconds without a sign of life after which a trial is taken over.
          say: is told of a database that does not answer.

        Raises:
          ConfigError: there is another sweep of that name; the message names the difference.
        """
        self.sweep, self.storage = sweep, storage
        self._workdir, self._grace, self._say = workdir, grace, say
        # The last sign of life of others' leases, and when it was new.
        self._seen: dict[int, tuple[Any, float]] = {}
        self._identities: dict[str, str] = {}
        self._drawn = -1  # trials there were when the space was found to have no more
        self._study = self._patiently(lambda: self._joined(name))

    def _patiently(self, work: Callable[[], Any]) -> Any:
        def say(line: str) -> None:
            self._seen.clear()  # while the database was gone, nobody could show a sign of life
            self._say(line)

        return self.storage.patiently(work, say)

    def _joined(self, name: str) -> int:
        trials = self.storage.trials
        try:
            study = trials.get_study_id_from_name(name)
        except KeyError:
            study = trials.create_new_study([optuna.study.StudyDirection.MAXIMIZE], name)
        where = f"--storage={self.storage}: the study {name}"
        stored = _definition(trials.get_study_user_attrs(study), where)
        if stored is None:  # it is new, or its maker was killed, or it is somebody's own
            if trials.get_all_trials(study, deepcopy=False):
                raise ConfigError(
                    f"{where} is no sweep of ours; choose another --workdir, whose name it takes"
                )
        else:
            if changed := difference(stored, self.sweep.plain()):
                raise ConfigError(
                    f"{where} is another sweep ({'; '.join(changed)}); choose another --workdir, or the old values"
                )
            self.sweep = larger(stored, self.sweep)
        if stored != self.sweep.plain():
            text = json.dumps(self.sweep.plain())
            parts = [text[at : at + PART] for at in range(0, len(text), PART)]
            for number, part in enumerate(parts):
                trials.set_study_user_attr(study, f"{DEFINITION} {number}", part)
            trials.set_study_user_attr(study, DEFINITION, len(parts))  # last: with it, the others count
        return study

    def claim(self) -> Task | None:
        """As `Ledger`: a trial whose worker has gone, or a new one."""
        claim = secrets.token_hex(8)
        return self._patiently(lambda: self._claim(claim))

    def _claim(self, claim: str) -> Task | None:
        known = self._all()
        for trial in known:
            if trial.state != TrialState.RUNNING:
                continue
            if trial.user_attrs[LEASE]["claim"] == claim:  # recorded, though the answer was lost
                return _task(trial)
            if self._is_free(trial) and (task := self._taken_over(trial, claim)):
                return task
        return self._new(known, claim)

    def _all(self) -> list[FrozenTrial]:
        """The sweep's trials; others that somebody has put into the study are none, nor is what was begun twice."""
        trials = self.storage.trials.get_all_trials(self._study, deepcopy=False)
        return [each for each in trials if LEASE in each.user_attrs and TWICE not in each.user_attrs]

    def _is_free(self, trial: FrozenTrial) -> bool:
        lease = trial.user_attrs[LEASE]
        if _is_over(lease):
            return True
        sign = lease["claim"], lease["beat"]
        now = time.monotonic()
        if self._seen.get(trial.number, (None, 0.0))[0] != sign:
            self._seen[trial.number] = sign, now
        # Its holder shows signs of life as often as its own grace period asks for.
        return now - self._seen[trial.number][1] > max(self._grace, lease["grace"])

    def _taken_over(self, trial: FrozenTrial, claim: str) -> Task | None:
        lease = copy.deepcopy(trial.user_attrs[LEASE])
        progress = self._progress(lease["source"] or lease["folder"])
        deaths = 0 if lease["released"] or progress != lease["progress"] else lease["deaths"] + 1
        if deaths >= MOST_DEATHS:
            self._end(trial._trial_id, FAILED, KILLER.format(deaths))
            return None
        if not _is_over(lease) or is_held(self._workdir / lease["folder"]):
            # It may wake up and write. Where its own folder was to be copied first, that is done from the same source.
            if not lease["source"] or (self._workdir / lease["folder"]).exists():
                lease["source"] = lease["folder"]
            lease["folder"] = folder_name(trial.number, lease["attempt"] + 1)
        lease |= {
            **self._held(claim, lease["attempt"] + 1),
            "deaths": deaths,
            "progress": progress,
            "before": lease["seconds"],
        }
        self.storage.trials.set_trial_user_attr(trial._trial_id, LEASE, lease)
        return _task(self.storage.trials.get_trial(trial._trial_id))

    def _held(self, claim: str, attempt: int) -> dict[str, Any]:
        return {
            "claim": claim,
            "holder": life.own(),
            "attempt": attempt,
            "beat": 0,
            "grace": self._grace,
            "released": False,
        }

    def _progress(self, folder: str) -> list[str]:
        with contextlib.suppress(OSError):
            return sorted(path.name for path in (self._workdir / folder / "checkpoints").iterdir())
        return []

    def _new(self, known: list[FrozenTrial], claim: str) -> Task | None:
        found = self._next(known)
        if found is None:
            return None
        point, trial, attributes = found
        known_attributes = self.storage.trials.get_study_system_attrs(self._study)
        for key, value in attributes.items():
            if known_attributes.get(key) != value:
                self.storage.trials.set_study_system_attr(self._study, key, value)
        identity = self._identity(point)
        lease = {
            **self._held(claim, 1),
            "folder": folder_name(len(self.storage.trials.get_all_trials(self._study, deepcopy=False))),
            "source": "",
            "seconds": 0.0,
            "before": 0.0,
            "deaths": 0,
            "progress": [],
        }
        trial.user_attrs = {POINT: plain_point(point), IDENTITY: identity, LEASE: lease}
        # One transaction: the trial is there with its lease, or it is not.
        made = self.storage.trials.create_new_trial(self._study, template_trial=trial)
        # Whoever has lost the lock without knowing, as when its connection was cut, may have begun what another has.
        same = [each for each in self._all() if each.user_attrs[IDENTITY] == identity]
        if same[0]._trial_id != made:
            self.storage.trials.set_trial_user_attr(made, TWICE, True)
            self.storage.trials.set_trial_state_values(made, TrialState.FAIL)
            return self._new(self._all(), claim)
        return _task(self.storage.trials.get_trial(made))

    def _next(self, known: list[FrozenTrial]) -> tuple[Point, FrozenTrial, dict[str, Any]] | None:
        """The next point, Optuna's trial of it, and what the sampler keeps if it is taken; None where there is none."""
        if isinstance(self.sweep.what, Grid):
            begun = {trial.user_attrs[IDENTITY] for trial in known}
            left = [point for point in self.sweep.what.points if self._identity(point) not in begun]
            return (left[0], sampling.trial_of(self.sweep, left[0]), {}) if left else None
        if len(known) >= self.sweep.total or self._drawn == len(known):
            return None
        attributes = self.storage.trials.get_study_system_attrs(self._study)
        begun = {trial.user_attrs[IDENTITY] for trial in known}
        try:
            return sampling.draw(self.sweep, known, begun, attributes)
        except sampling.Drawn:
            self._drawn = len(known)
            return None

    def _identity(self, point: Point) -> str:
        key = json.dumps(plain_point(point), sort_keys=True)
        if key not in self._identities:
            self._identities[key] = self.sweep.identity(point)
        return self._identities[key]

    def done(self) -> bool:
        """As `Ledger`; of a search also where its space has no more points."""

        def ended() -> bool:
            known = self._all()
            return all(trial.state.is_finished() for trial in known) and self._next(known) is None

        return self._patiently(ended)

    def beat(self, task: Task, seconds: float) -> None:
        """As `Ledger`."""

        def shown() -> None:
            trial = self._own(task)
            lease = copy.deepcopy(trial.user_attrs[LEASE])
            lease["beat"] += 1
            lease["seconds"] = round(lease["before"] + seconds, 1)
            self.storage.trials.set_trial_user_attr(trial._trial_id, LEASE, lease)

        self._patiently(shown)

    def report(self, task: Task, step: int, value: float, last: bool = False) -> bool:
        """As `Ledger`; a trial that was given up once stays so, whoever goes on with it."""

        def reported() -> bool:
            trial = self._own(task)
            if GIVEN_UP in trial.user_attrs:
                return True
            self.storage.trials.set_trial_intermediate_value(trial._trial_id, step, value)
            if last:
                return False
            known = self._all()
            place = [each.number for each in known].index(task.number)
            given_up, kept = sampling.hopeless(self.sweep, known, place)
            if given_up:  # before what the pruner keeps: with that alone, it would not be asked again
                self.storage.trials.set_trial_user_attr(trial._trial_id, GIVEN_UP, step)
            for key, each in kept.items():
                if trial.system_attrs.get(key) != each:
                    self.storage.trials.set_trial_system_attr(trial._trial_id, key, each)
            return given_up

        return self._patiently(reported)

    def finish(
        self, task: Task, state: str, step: int | None, metrics: dict[str, float], reason: str = ""
    ) -> None:
        """As `Ledger`; the state comes last, so that whoever sees it sees everything."""

        def finished() -> None:
            trial = self._own(task)
            self._end(trial._trial_id, state, reason, step, metrics)

        self._patiently(finished)

    def _end(
        self,
        trial: int,
        state: str,
        reason: str,
        step: int | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        trials = self.storage.trials
        value = (metrics or {}).get(self.sweep.metric)
        if state == COMPLETE and value is None:
            state, reason = FAILED, UNMEASURED
        trials.set_trial_user_attr(trial, METRICS, metrics or {})
        trials.set_trial_user_attr(trial, STEP_OF_BEST, step)
        if reason:
            trials.set_trial_user_attr(trial, REASON, reason)
        trials.set_trial_state_values(trial, ENDED[state], None if value is None else [value])

    def release(self, task: Task) -> None:
        """As `Ledger`."""

        def given_back() -> None:
            with contextlib.suppress(Lost):
                trial = self._own(task)
                lease = {**trial.user_attrs[LEASE], "released": True}
                self.storage.trials.set_trial_user_attr(trial._trial_id, LEASE, lease)

        self._patiently(given_back)

    def _own(self, task: Task) -> FrozenTrial:
        trial = next(each for each in self._all() if each.number == task.number)
        lease = trial.user_attrs[LEASE]
        if trial.state.is_finished() or lease["attempt"] != task.attempt or lease["holder"] != life.own():
            raise Lost(f"trial {task.number}: another worker has taken it over")
        return trial

    def rows(self) -> list[Row]:
        """As `Ledger`; those of a grid that nobody has begun are waiting."""
        found = [_row(trial, self.sweep.metric) for trial in self._patiently(self._all)]
        if isinstance(self.sweep.what, Grid):
            begun = {self._identity(row.point) for row in found}
            left = [point for point in self.sweep.what.points if self._identity(point) not in begun]
            after = max((row.number for row in found), default=-1) + 1
            found += [Row(number, WAITING, point) for number, point in enumerate(left, after)]
        return found


def _is_over(lease: dict[str, Any]) -> bool:
    """Whether its holder certainly writes nothing any more."""
    return lease["released"] or life.is_dead(lease["holder"])


def _task(trial: FrozenTrial) -> Task:
    lease, reported = trial.user_attrs[LEASE], trial.intermediate_values
    best = max(reported, key=lambda step: (reported[step], -step), default=None)
    given_up = trial.user_attrs.get(GIVEN_UP)
    return Task(
        trial.number, _point(trial), lease["attempt"], lease["folder"], lease["source"], given_up, best
    )


def _definition(attributes: dict[str, Any], where: str) -> dict[str, Any] | None:
    """A sweep as a study's attributes hold it; None where there is none."""
    if DEFINITION not in attributes:
        return None
    try:
        parts = [attributes[f"{DEFINITION} {number}"] for number in range(attributes[DEFINITION])]
        stored = json.loads("".join(parts))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{where} is no sweep of this version; choose another --workdir") from None
    from_plain(stored, where)
    return stored


def _point(trial: FrozenTrial) -> Point:
    stored = json.loads(json.dumps(trial.user_attrs[POINT]))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}


def _row(trial: FrozenTrial, metric: str) -> Row:
    attributes, reported = trial.user_attrs, trial.intermediate_values
    metrics = attributes.get(METRICS) or {}
    value, step = metrics.get(metric), attributes.get(STEP_OF_BEST)
    if not trial.state.is_finished():
        value, step = max(reported.values(), default=None), max(reported, default=None)
    lease = attributes[LEASE]
    return Row(
        number=trial.number,
        state=STATES[trial.state],
        point=_point(trial),
        value=value,
        step=step,
        metrics=metrics,
        seconds=lease["seconds"],
        attempts=lease["attempt"],
        reason=attributes.get(REASON, ""),
        folder=lease["folder"],
    )
