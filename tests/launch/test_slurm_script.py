"""launch/slurm.sbatch without Slurm: what it calls, and what it does about an exit status."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from .false import HOSTILE, ROOT, Programs, activate

SCRIPT = ROOT / "launch" / "slurm.sbatch"
STEP = ["srun", "--kill-on-bad-exit=0", "--wait=60", "--export=ALL", "dynrec"]


class Job:
    """A job of one clone that Slurm has given a number."""

    def __init__(self, folder: Path):
        self.folder = folder / "clone with a space"
        shutil.copytree(ROOT / "launch", self.folder / "launch")
        self.programs = Programs(folder / "programs")
        self.activate = activate(folder)
        self.state("RUNNING")
        self.programs.add("scontrol")

    def state(self, state: str) -> None:
        self.programs.add("squeue", f"print({state!r})")

    def run(self, status: int, *arguments: str, **environment: str):
        self.programs.add(
            "srun",
            f"print(json.dumps({{k: v for k, v in os.environ.items() if k != 'HF_TOKEN'}})); sys.exit({status})",
        )
        given = {
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "DYNREC_ACTIVATE": str(self.activate),
            **environment,
        }
        return self.programs.run(["bash", SCRIPT, *arguments], self.folder.parent, **given)

    @property
    def requeued(self) -> list[list[str]]:
        return self.programs.calls("scontrol")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_arguments_reach_every_process_as_they_are(job):
    ended = job.run(0, "train", *HOSTILE)
    assert ended.returncode == 0, ended.stderr
    assert job.programs.calls("srun") == [[*STEP, "train", *HOSTILE]]
    assert not job.requeued
    assert sorted(path.name for path in job.folder.iterdir()) == [
        "launch"
    ]  # nothing ran, nothing was written


def test_leftovers_of_another_job_are_cleared(job):
    stale = {"JAX_COORDINATOR_ADDRESS": "gone:1", "JAX_NUM_PROCESSES": "9", "JAX_PROCESS_ID": "3"}
    ended = job.run(
        0, "train", **stale, JAX_COORDINATOR_PORT="1", MEGASCALE_NUM_SLICES="2", JAX_PLATFORMS="cpu"
    )
    seen = json.loads(ended.stdout)
    assert not {name for name in seen if name.startswith("MEGASCALE_")}
    assert {name for name in seen if name.startswith("JAX_")} == {"JAX_PLATFORMS"}
    assert seen["ACTIVATED"] == "yes"


@pytest.mark.parametrize("status", [0, 2])
def test_what_is_done_or_wrong_is_not_started_again(job, status):
    assert job.run(status, "train").returncode == status
    assert not job.requeued


def test_preemptions_are_queued_again_without_end(job):
    for attempt in range(4):
        assert job.run(75, "train", SLURM_RESTART_COUNT=str(attempt), DYNREC_RESTARTS="0").returncode == 75
    assert job.requeued == [["scontrol", "requeue", "17"]] * 4


@pytest.mark.parametrize("status", [1, 134, 137])
def test_faults_are_queued_again_so_many_times_in_a_row(job, status):
    for _ in range(2):
        job.run(status, "train", DYNREC_RESTARTS="2")
    job.run(75, "train", DYNREC_RESTARTS="2")  # it has got on: counted from 0
    for _ in range(2):
        job.run(status, "train", DYNREC_RESTARTS="2")
    assert len(job.requeued) == 5
    ended = job.run(status, "train", DYNREC_RESTARTS="2")
    assert ended.returncode == status
    assert len(job.requeued) == 5
    assert "more than 2 faults in a row" in ended.stderr
    assert not list(job.folder.glob("*.faults"))


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", ""])
def test_a_job_that_was_cancelled_is_not_queued_again(job, state):
    job.state(state)
    ended = job.run(75, "train")
    assert ended.returncode == 75
    assert not job.requeued
    assert "not queued again" in ended.stderr


def test_calls_that_cannot_work_are_refused(job, tmp_path):
    for arguments, environment in (
        ([], {}),
        (["train"], {"SLURM_SUBMIT_DIR": str(tmp_path)}),
        (["train"], {"DYNREC_RESTARTS": "many"}),
    ):
        ended = job.run(0, *arguments, **environment)
        assert ended.returncode == 2
        assert ended.stderr.startswith("slurm: ")
    assert not job.programs.calls()


def test_dry_run(job):
    flags = ["train", "--config=experiments/ml1m.py", "--workdir=runs/a b;$(touch here)"]
    ended = job.run(0, *flags, DRY_RUN="1", DYNREC_ACTIVATE="", SLURM_SUBMIT_DIR=str(job.folder))
    assert ended.returncode == 0, ended.stderr
    assert not job.programs.calls()
    shown = ended.stdout.replace(str(job.folder).replace(" ", "\\ "), "CLONE")
    assert shown == (Path(__file__).parent / "golden" / "slurm.txt").read_text()
    line = next(line for line in ended.stdout.splitlines() if line.startswith("run "))
    assert shlex.split(line)[1:] == [*STEP, *flags]
