"""Who a process is, from what Slurm, Kubernetes and GKE set; contradictions and leftovers are refused by name."""

import subprocess
import sys

import pytest

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.parallel.clusters import ADDRESS, COUNT, INDEX, ORIGIN, find, hosts
from dynrec_jax.parallel.processes import ALONE, join, several

# What a task of `srun` finds, here the third of four on two nodes of job 4711; 4711 modulo 4096 is 615.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOBID": "4711",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURMD_NODENAME": "gpu09",
}
SLURM_SAYS = {ADDRESS: "gpu08:62055", COUNT: "4", INDEX: "2"}
# A batch script, and the shell of salloc: tasks are promised, and no step is there.
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[08-09]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
JOBSET = {
    "JOBSET_NAME": "ml1m",
    "REPLICATED_JOB_NAME": "slice",
    "REPLICATED_JOB_REPLICAS": "2",
    "JOB_INDEX": "1",
    "JOB_PARALLELISM": "4",
    "JOB_COMPLETION_INDEX": "2",
}
TPU = {
    "TPU_WORKER_HOSTNAMES": "ml1m-slice-1-0.ml1m,ml1m-slice-1-1.ml1m,ml1m-slice-1-2.ml1m,ml1m-slice-1-3.ml1m",
    "TPU_WORKER_ID": "2",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "ml1m-slice-0-0.ml1m:8080",
}
ONE_SLICE = {"TPU_WORKER_HOSTNAMES": "10.0.0.4,10.0.0.5", "TPU_WORKER_ID": "1"}
JAX = {ADDRESS: "here:1234", COUNT: "4", INDEX: "2"}


def says(environment: dict[str, str]) -> dict[str, str]:
    found = find(environment)
    return {name: found[name] for name in (ADDRESS, COUNT, INDEX)} if found else {}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (JAX, JAX),
        (SLURM, SLURM_SAYS),
        (BATCH, {}),
        (
            {**BATCH, "SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_NUM_TASKS": "1"},
            {},
        ),  # the step of an interactive shell
        ({k: v for k, v in SLURM.items() if "STEP_NUM" not in k} | {"SLURM_NTASKS": "4"}, SLURM_SAYS),
        ({**SLURM, "JAX_COORDINATOR_PORT": "5000"}, {**SLURM_SAYS, ADDRESS: "gpu08:5000"}),
        (JOBSET, {ADDRESS: "ml1m-slice-0-0.ml1m:55527", COUNT: "8", INDEX: "6"}),
        (
            {"JOB_NAME": "job", "JOB_SUBDOMAIN": "net", "JOB_PARALLELISM": "2", "JOB_COMPLETION_INDEX": "0"},
            {ADDRESS: "job-0.net:55527", COUNT: "2", INDEX: "0"},
        ),
        ({"JOB_COMPLETION_INDEX": "3"}, {}),  # pods that have nothing to do with each other
        (
            {
                **JOBSET,
                "JOB_PARALLELISM": "1",
                "REPLICATED_JOB_REPLICAS": "1",
                "JOB_INDEX": "0",
                "JOB_COMPLETION_INDEX": "0",
            },
            {},
        ),
        (TPU, {ADDRESS: "ml1m-slice-0-0.ml1m:8482", COUNT: "8", INDEX: "6"}),
        (ONE_SLICE, {ADDRESS: "10.0.0.4:8482", COUNT: "2", INDEX: "1"}),
        (
            {**ONE_SLICE, "TPU_PROCESS_ADDRESSES": "a:8476,b:8476,c:8476"},
            {ADDRESS: "a:8482", COUNT: "3", INDEX: "1"},
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.4", "MEGASCALE_NUM_SLICES": "1"}, {}),
        ({**JOBSET, **TPU}, {ADDRESS: "ml1m-slice-0-0.ml1m:55527", COUNT: "8", INDEX: "6"}),
        ({**SLURM, **JAX}, JAX),  # they say the same
        ({**SLURM, COUNT: "1"}, {}),  # told to be a process of its own
        ({**SLURM, **TPU, ADDRESS: "gone:1", COUNT: "1", INDEX: "7"}, {}),
        ({COUNT: "", ADDRESS: "", INDEX: ""}, {}),
    ],
)
def test_who_a_process_is(environment: dict[str, str], expected: dict[str, str]):
    assert says(environment) == expected
    assert several(environment) == bool(expected)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        # What an older job, or another one, left in the shell.
        ({ADDRESS: "gone:1234"}, "JAX_COORDINATOR_ADDRESS='gone:1234' is set and JAX_NUM_PROCESSES is not"),
        ({INDEX: "3"}, "JAX_PROCESS_ID='3' is set and JAX_NUM_PROCESSES is not"),
        ({**SLURM, INDEX: "2"}, "JAX_PROCESS_ID"),
        (
            {**SLURM, **JAX, COUNT: "8"},
            "number of processes is 8 by JAX_NUM_PROCESSES and 4 by SLURM_STEP_NUM_TASKS",
        ),
        ({**SLURM, **JAX, INDEX: "0"}, "number of this process is 0 by JAX_PROCESS_ID and 2 by SLURM_PROCID"),
        ({**SLURM, "SLURM_JOBID": "4710"}, "SLURM_JOBID='4710' contradicts SLURM_JOB_ID='4711'"),
        (
            {**SLURM, "SLURM_JOB_NODELIST": "cpu[1-2]"},
            "SLURM_STEP_NODELIST=.* contradicts SLURM_JOB_NODELIST='cpu",
        ),
        ({**SLURM, "SLURMD_NODENAME": "gpu07"}, "SLURMD_NODENAME='gpu07' contradicts SLURM_STEP_NODELIST"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "3"}, "SLURM_STEP_NUM_NODES='3' contradicts SLURM_STEP_NODELIST"),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "gpu[01-09]", "SLURM_STEP_NUM_NODES": "9"},
            "SLURM_STEP_NUM_TASKS='4' contr",
        ),
        ({**SLURM, "SLURM_PROCID": "4"}, "SLURM_PROCID=4: expected 0 to 3, by SLURM_STEP_NUM_TASKS"),
        ({**SLURM, "SLURM_PROCID": ""}, "SLURM_PROCID='': expected a number"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many': expected a number"),
        ({**SLURM, "SLURM_JOB_ID": "²"}, "SLURM_JOB_ID='²': expected a number"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[08-"}, r"'gpu\[08-': expected a node list"),
        ({**SLURM, "JAX_COORDINATOR_PORT": "70000"}, "JAX_COORDINATOR_PORT=70000"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES='2' speaks of several slices"),
        (
            {"MEGASCALE_COORDINATOR_ADDRESS": "gone"},
            "MEGASCALE_COORDINATOR_ADDRESS='gone' speaks of several slices",
        ),
        ({"MEGASCALE_SLICE_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, "MEGASCALE_SLICE_ID='0' speaks"),
        ({**ONE_SLICE, "MEGASCALE_SLICE_ID": "1"}, "MEGASCALE_SLICE_ID='1' and MEGASCALE_NUM_SLICES"),
        (
            {**TPU, "MEGASCALE_SLICE_ID": "2"},
            "MEGASCALE_SLICE_ID=2: expected 0 to 1, by MEGASCALE_NUM_SLICES",
        ),
        ({**TPU, "MEGASCALE_COORDINATOR_ADDRESS": ""}, "MEGASCALE_COORDINATOR_ADDRESS is missing"),
        ({**TPU, "TPU_WORKER_ID": "4"}, "TPU_WORKER_ID=4: expected 0 to 3, by TPU_WORKER_HOSTNAMES"),
        ({**ONE_SLICE, "TPU_WORKER_ID": ""}, "TPU_WORKER_ID='': expected a number"),
        (
            {**JOBSET, **TPU, "MEGASCALE_SLICE_ID": "0"},
            "is 6 by JOB_COMPLETION_INDEX and 2 by MEGASCALE_SLICE_ID",
        ),
        (
            {**JOBSET, **TPU, "MEGASCALE_NUM_SLICES": "4"},
            "is 8 by JOB_PARALLELISM and 16 by MEGASCALE_NUM_SLICES",
        ),
        (
            {**JOBSET, "JOB_COMPLETION_INDEX": "4"},
            "JOB_COMPLETION_INDEX=4: expected 0 to 3, by JOB_PARALLELISM",
        ),
        ({**JOBSET, "JOB_INDEX": "2"}, "JOB_INDEX=2: expected 0 to 1, by REPLICATED_JOB_REPLICAS"),
        ({**JOBSET, "REPLICATED_JOB_NAME": ""}, "REPLICATED_JOB_NAME is missing beside JOBSET_NAME='ml1m'"),
        ({"JOB_PARALLELISM": "2", "JOB_COMPLETION_INDEX": "0", "JOB_NAME": "a"}, "JOB_SUBDOMAIN is missing"),
        ({**SLURM, **ONE_SLICE}, "SLURM_STEP_NUM_TASKS and 2 by TPU_WORKER_HOSTNAMES"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(environment: dict[str, str], named: str):
    with pytest.raises(ConfigError, match=named):
        join(environment)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("node001", ["node001"]),
        ("node001,host2", ["node001", "host2"]),
        ("n[1-3,07],gpu5", ["n1", "n2", "n3", "n07", "gpu5"]),
        ("node[001,007-009],host2", ["node001", "node007", "node008", "node009", "host2"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("a[1-2]b[08-09]c", ["a1b08c", "a1b09c", "a2b08c", "a2b09c"]),
        ("n[9-9]", ["n9"]),
    ],
)
def test_node_lists(named: str, expected: list[str]):
    assert hosts(named) == expected


@pytest.mark.parametrize(
    "named",
    [
        *("", ",n1", "n1,,n2", "n[", "n]1[", "n[]", "n[3-1]", "n[a]", "n[1-]", "n[[1]]", "n[1]]", "n[-1]"),
        *("n[0-99999999999]", "n[0-299]x[0-299]", "n[0-40000],m[0-40000]", "n[٣-٤]"),
    ],
)
def test_what_is_no_node_list(named: str):
    with pytest.raises(ConfigError, match=r"node list|hosts"):
        hosts(named)


def test_a_process_that_waits_for_one_that_was_never_to_come_says_why_it_waits():
    """Consistent leftovers cannot be told from a cluster; what comes of them is told within the time."""
    left = {
        **SLURM,
        "SLURM_PROCID": "1",
        "SLURM_STEP_NODELIST": "localhost,n2",
        "SLURM_JOB_NODELIST": "localhost,n2",
    }
    del left["SLURMD_NODENAME"]
    with pytest.raises(MachineError, match=r"goes by SLURM_STEP_NUM_TASKS and SLURM_PROCID: number 1 of 4"):
        join(left, seconds=0.5)
    assert join({**left, COUNT: "1"}) is ALONE


class TestCommands:
    """The command line, with variables that a cluster sets."""

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        script = "import sys; from dynrec_jax.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr.strip()

    def test_a_verb_of_one_process_in_a_step_of_several_tasks(self, tmp_path):
        prepare = ["prepare", "--source=synthetic:users=9,items=20,seed=0", f"--out={tmp_path / 'dataset'}"]
        status, said = self.run(*prepare, **SLURM)
        assert status == 2
        assert said.startswith(
            "dynrec: prepare runs in one process, and this is one of several (SLURM_STEP_NUM_TASKS"
        )
        assert self.run(*prepare, **SLURM, JAX_NUM_PROCESSES="1")[0] == 0

    def test_tasks_that_are_workers_of_a_sweep(self):
        status, said = self.run("sweep", **SLURM)
        assert (status, said) == self.run("sweep")
        status, said = self.run("sweep", **JAX)
        assert (status, "sweep runs in one process" in said) == (2, True)

    def test_a_contradiction_is_one_line(self):
        assert self.run("--version", MEGASCALE_NUM_SLICES="2")[0] == 0
        status, said = self.run("train", MEGASCALE_NUM_SLICES="2")
        assert status == 2
        assert said.startswith("dynrec: MEGASCALE_NUM_SLICES='2' speaks of several slices")
        assert "\n" not in said


def test_the_origin_is_told():
    assert find(TPU)[ORIGIN].startswith("MEGASCALE_NUM_SLICES × TPU_WORKER_HOSTNAMES and MEGASCALE_SLICE_ID")
