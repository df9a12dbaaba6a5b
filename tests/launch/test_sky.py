"""launch/sky.yaml: what its script calls on a node, and that SkyPilot takes it."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from .false import ROOT, Programs

FILE = ROOT / "launch" / "sky.yaml"
NODES = "10.0.0.1\n10.0.0.2\n10.0.0.3"
HOSTILE = ["--config.a=x y", "--b=$(touch here)", "--c=;touch here", "--d='\"`touch here`", "--e=*"]


@pytest.fixture
def task() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


class Node:
    """One of three nodes."""

    def __init__(self, folder: Path, task: dict[str, Any]):
        self.folder, self.task = folder, task
        self.programs = Programs(folder / "programs")
        (folder / "clone" / "launch").mkdir(parents=True)
        (folder / "clone" / "launch" / "environment.sh").write_text('export ACTIVATED="$DYNREC_EXTRAS"\n')

    def run(self, status: int = 0, **environment: str):
        self.programs.add(
            "dynrec",
            f"print(json.dumps({{k: v for k, v in os.environ.items() if k != 'HF_TOKEN'}})); sys.exit({status})",
        )
        script = self.task["run"].replace("/data/runs", str(self.folder / "runs"))
        given = {
            **self.task["envs"],
            "SKYPILOT_NODE_IPS": NODES,
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NUM_NODES": "3",
        }
        return self.programs.run(["bash", "-c", script], self.folder / "clone", **{**given, **environment})


@pytest.fixture
def node(tmp_path: Path, task: dict[str, Any]) -> Node:
    return Node(tmp_path, task)


def test_what_a_node_starts(node):
    ended = node.run(
        RUN="a b;$(touch here)", DATASET="/data/my $(x)", CONFIG="c.py:d", FLAGS="\n".join(HOSTILE)
    )
    assert ended.returncode == 0, ended.stderr
    workdir = f"--workdir={node.folder}/runs/a b;$(touch here)/run"
    wanted = ["dynrec", "train", "--config=c.py:d", "--config.dataset=/data/my $(x)", workdir, *HOSTILE]
    assert node.programs.calls("dynrec") == [wanted]
    seen = json.loads(ended.stdout)
    assert seen["JAX_COORDINATOR_ADDRESS"] == "10.0.0.1:8482"
    assert (seen["JAX_NUM_PROCESSES"], seen["JAX_PROCESS_ID"], seen["ACTIVATED"]) == ("3", "1", "gpu")
    assert not list(node.folder.rglob("here"))


@pytest.mark.parametrize("run", ["", "..", ".", "../x", "a/../../x", "a/..", "/etc"])
def test_a_run_outside_its_folder_is_refused(node, run):
    ended = node.run(RUN=run)
    assert ended.returncode == 2
    assert "expected a folder below /data/runs" in ended.stderr.replace(
        str(node.folder / "runs"), "/data/runs"
    )
    assert not node.programs.calls()


def test_faults_are_recovered_from_so_many_times_in_a_row(node):
    assert [node.run(status).returncode for status in (0, 2, 75)] == [0, 2, 75]
    met = [node.run(status, RESTARTS="2").returncode for status in (1, 137, 75, 1, 1, 1)]
    assert met == [75, 75, 75, 75, 75, 1]


def test_what_is_recovered_from(task):
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75]
    assert recovery["max_restarts_on_errors"] == 0  # a user's mistake is not tried again


READ = """
import json, sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps({
    "nodes": task.num_nodes, "envs": task.envs, "mounts": list(task.storage_mounts), "spot": resources.use_spot,
    "recovery": resources.job_recovery, "accelerators": resources.accelerators, "run": task.run, "setup": task.setup,
}))
"""


@pytest.mark.slow
def test_skypilot_takes_it(task, tmp_path):
    """Read by SkyPilot itself, in the environment that it is installed in."""
    program = shutil.which("sky")
    if program is None:
        pytest.skip("SkyPilot is not installed (pip install skypilot)")
    python = Path(program).with_name("python")
    own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([python, "-c", READ, FILE], env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert (read["nodes"], read["spot"], read["mounts"]) == (2, True, ["/data"])
    assert read["accelerators"] == {"H100": 8}
    assert {**task["resources"]["job_recovery"], "strategy": None} == read["recovery"]
    assert (read["run"], read["setup"], read["envs"]) == (task["run"], task["setup"], task["envs"])
