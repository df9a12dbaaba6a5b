"""A folder with a database, and what tests of the ledger do with it."""

from pathlib import Path

from dynrec_jax.config import default_config
from dynrec_jax.sweep import life, over
from dynrec_jax.sweep.definition import Sweep, make
from dynrec_jax.sweep.ledger import (
    COMPLETE,
    Task,
)
from dynrec_jax.sweep.storage import Storage
from dynrec_jax.sweep.study import LEASE, StudyLedger


def grid(points: int = 4) -> Sweep:
    return make(default_config(), over("seed", range(points)))


class Bench:
    """A folder with a database, and workers that join."""

    def __init__(self, path: Path):
        self.path = path
        self.address = f"sqlite:///{path / 'sweep.db'}"

    def join(self, sweep: Sweep, grace: float = 60.0) -> StudyLedger:
        return StudyLedger(sweep, Storage(self.address), "test", self.path, grace)

    def holder(self, ledger: StudyLedger, number: int, holder: life.Identity) -> None:
        """Makes a lease look like that of another process."""
        trial = ledger._all()[number]
        lease = {**trial.user_attrs[LEASE], "holder": holder}
        ledger.storage.trials.set_trial_user_attr(trial._trial_id, LEASE, lease)


ELSEWHERE = {"machine": "another", "pid": 1, "started": 1}


def done(ledger: StudyLedger, task: Task, value: float = 0.5) -> None:
    ledger.finish(task, COMPLETE, 10, {"ndcg@10": value})
