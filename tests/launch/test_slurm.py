"""launch/slurm.sbatch on a real Slurm: two nodes, one run of two processes; what is killed goes on by itself."""

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrec_jax.parallel import clusters

from .. import commands
from ..invariants.runs import assert_same_arrays, lines, saved
from . import slurm_cluster
from .slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
STEPS = 200

# What the detection makes of the variables that it finds.
FIND = (
    "import json, os, sys; sys.path.insert(0, sys.argv[1]); from dynrec_jax.parallel.clusters import find; "
    "print(json.dumps(find(os.environ)))"
)
ASK = [sys.executable, "-c", FIND, str(ROOT)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.started() as cluster:
        yield cluster


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the script takes for a clone: it only looks for the folder's environment."""
    folder = tmp_path / "a clone; $(touch here)"
    shutil.copytree(ROOT / "launch", folder / "launch")
    return folder


def activate(path: Path, lines: str) -> Path:
    path.write_text(lines)
    return path


def own_environment(path: Path) -> Path:
    """A file to source that leads to this interpreter and this package, on one CPU device a process."""
    first = Path(sys.executable).parent
    return activate(
        path,
        f"export PATH={shlex.quote(str(first))}:$PATH PYTHONPATH={shlex.quote(str(ROOT))}\n"
        "export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1\n",
    )


def false_dynrec(folder: Path, body: str) -> Path:
    """A file to source after which `dynrec` is a script with this body."""
    (folder / "bin").mkdir()
    (folder / "bin" / "dynrec").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "bin" / "dynrec").chmod(0o755)
    return activate(folder / "activate", f"export PATH={shlex.quote(str(folder / 'bin'))}:$PATH\n")


def losses(workdir: Path) -> list[tuple[int, float]]:
    """Of every step that was logged, in the order of the file."""
    return [(line["step"], line["loss"]) for line in lines(workdir) if "loss" in line]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    assert commands.dynrec("prepare", source=commands.SOURCE, out=folder / "dataset", shards=4) == 0
    return commands.experiment(
        folder / "experiment.py",
        folder / "dataset",
        train__steps=STEPS,
        train__checkpoint_every=20,
        train__evaluate_every=STEPS,
        model__dropout=0.2,
    )


def train(cluster: Cluster, experiment: Path, clone: Path, name: str) -> tuple[str, Path]:
    """A job that trains, as a user submits it, and its run folder."""
    workdir = experiment.parent / name
    arguments = ["train", f"--config={experiment}", f"--workdir={workdir}"]
    own = own_environment(experiment.parent / "activate")
    # What another job left behind would make every process wait for ones that never come.
    stale = {"JAX_PROCESS_ID": "5", "JAX_NUM_PROCESSES": "9", "MEGASCALE_NUM_SLICES": "3"}
    log = experiment.parent / f"{name}.log"
    job = cluster.submit(SCRIPT, arguments, clone, log, DYNREC_ACTIVATE=str(own), SLURM_WAIT="10", **stale)
    return job, workdir


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a job that nothing happened to."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "launch", clone / "launch")
    job, workdir = train(cluster, experiment, clone, "undisturbed")
    facts = cluster.ended(job, 300.0)
    said = workdir.with_suffix(".log").read_text()
    assert facts["JobState"] == "COMPLETED", said
    assert facts["Restarts"] == "0"
    assert "attempt 1, on n[1-2]" in said
    assert losses(workdir)[-1][0] == STEPS
    return workdir


@pytest.mark.parametrize("killed", ["process", "daemon of the step"])
def test_a_run_that_loses_a_node_is_queued_again_and_ends_the_same(
    cluster, experiment, clone, undisturbed, killed
):
    job, workdir = train(cluster, experiment, clone, f"killed {killed}")
    cluster.until(lambda: len(saved(workdir)) > 0, 300.0, "no checkpoint")
    at_work = slurm_cluster.processes(job, "n2", "dynrec train")
    daemon = slurm_cluster.steps_daemon(job, "n2", at_work[0])
    for pid in at_work if killed == "process" else [daemon, *at_work]:
        os.kill(pid, signal.SIGKILL)
    facts = cluster.ended(job, 400.0)
    said = workdir.with_suffix(".log").read_text()
    assert facts["JobState"] == "COMPLETED", said
    assert facts["Restarts"] == "1"
    assert "attempt 2, on n[1-2]" in said
    assert losses(workdir) == losses(undisturbed)
    last = f"checkpoints/{STEPS}"
    assert_same_arrays(workdir / last, undisturbed / last, killed)
    assert not list(clone.glob("*.faults"))


class TestEnds:
    """What the job does by the exit status of `dynrec`, which is a script here."""

    def job(self, cluster: Cluster, clone: Path, body: str, **environment: str) -> tuple[str, Path]:
        log = clone.parent / "job.log"
        own = false_dynrec(clone.parent, body)
        return cluster.submit(
            SCRIPT, ["train", "--x=a b;$(y)"], clone, log, DYNREC_ACTIVATE=str(own), **environment
        ), log

    def test_preempted_once(self, cluster, clone):
        job, log = self.job(
            cluster, clone, '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] && exit 75; printf "%s|" "$@"'
        )
        facts = cluster.ended(job, 240.0)
        assert facts["JobState"] == "COMPLETED", log.read_text()
        assert facts["Restarts"] == "1"
        assert log.read_text().count("train|--x=a b;$(y)|") == 2  # one of each node

    def test_a_mistake(self, cluster, clone):
        job, log = self.job(cluster, clone, "exit 2")
        facts = cluster.ended(job, 120.0)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), (
            log.read_text()
        )

    def test_faults_are_started_again_so_many_times(self, cluster, clone):
        job, log = self.job(cluster, clone, "exit 1", DYNREC_RESTARTS="1")
        facts = cluster.ended(job, 240.0)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "1"), (
            log.read_text()
        )
        assert "more than 1 faults in a row" in log.read_text()

    def test_cancelled(self, cluster, clone):
        body = "trap 'exit 75' TERM; echo up; for _ in $(seq 600); do sleep 0.1; done"
        job, log = self.job(cluster, clone, body)
        cluster.until(lambda: log.exists() and log.read_text().count("up\n") == 2, 60.0, "it does not run")
        cluster.run("scancel", job)
        facts = cluster.ended(job, 120.0)
        cluster.until(lambda: "not queued again" in log.read_text(), 30.0, "the job does not say what it did")
        assert facts["JobState"] == "CANCELLED", log.read_text()
        assert cluster.facts(job)["Restarts"] == "0"

    def test_before_the_time_limit_it_saves_and_goes_on(self, cluster, clone):
        body = (
            '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0\n'
            "trap 'exit 75' TERM; for _ in $(seq 600); do sleep 0.1; done"
        )
        # A minute's limit less 55 seconds: Slurm looks at limits every half minute.
        job, log = self.job(cluster, clone, body, SBATCH_TIMELIMIT="1", SBATCH_SIGNAL="TERM@55")
        facts = cluster.ended(job, 240.0)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log.read_text()
        assert "ended with status 75" in log.read_text()

    def test_the_variables_are_those_that_are_read(self, cluster, clone):
        """Of tasks and of the batch script, by the detection itself."""
        (clone.parent / "said").mkdir()
        python = shlex.join(ASK)
        said = shlex.quote(str(clone.parent / "said"))
        job, log = self.job(cluster, clone, f'{python} > {said}/"$SLURM_PROCID"')
        with (clone.parent / "activate").open("a") as file:
            file.write(f"{python} > {said}/batch\n")
        facts = cluster.ended(job, 120.0)
        assert facts["JobState"] == "COMPLETED", log.read_text()
        port = clusters.SLURM_PORTS[int(job) % 4096]
        for index in range(2):
            told = json.loads((clone.parent / "said" / str(index)).read_text())
            assert told[clusters.ADDRESS] == f"n1:{port}"
            assert (told[clusters.COUNT], told[clusters.INDEX]) == ("2", str(index))
        assert json.loads((clone.parent / "said" / "batch").read_text()) == {}


def test_what_runs_without_srun_or_as_one_task_is_one_process(cluster: Cluster):
    two = ["--nodes=2", "--ntasks=2"]
    assert json.loads(cluster.run("salloc", "--quiet", *two, *ASK)) == {}
    assert json.loads(cluster.run("srun", "--nodes=1", "--ntasks=1", *ASK)) == {}
    told = [json.loads(line) for line in cluster.run("srun", *two, *ASK).splitlines()]
    assert {(one[clusters.COUNT], one[clusters.INDEX]) for one in told} == {("2", "0"), ("2", "1")}
    # One task of an allocation of several.
    nested = ["srun", "--nodes=1", "--ntasks=1", *ASK]
    assert json.loads(cluster.run("salloc", "--quiet", *two, *nested)) == {}


@pytest.mark.parametrize("named", ["n1", "n[1-3,07],gpu5", "a[1-2]b[08-10]", "n[001-003,7],m[1,3]"])
def test_node_lists_are_read_as_slurm_reads_them(cluster: Cluster, named: str):
    assert clusters.hosts(named) == cluster.run("scontrol", "show", "hostnames", named).split()
