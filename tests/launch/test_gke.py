"""launch/gke/render.py: manifests that Kubernetes and JobSet take, whose words reach `dynrec` as they are."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynrec_jax.parallel.clusters import ADDRESS, COUNT, INDEX, find

from .false import HOSTILE, ROOT, Programs

SCRIPT = ROOT / "launch" / "gke" / "render.py"
HERE = Path(__file__).parent
GIVEN = ["--name=ml1m", "--repository=https://example.org/dynrec_jax.git", "--commit=0123abc", "--claim=runs"]
TRAIN = ["--", "train", "--config=experiments/ml1m.py", "--workdir=/data/runs/ml1m"]
SLICES = ["--slices=2", "--topology=4x8", "--spot", "--queue=team", "--priority=low", "--namespace=research"]
XPK = ["--xpk", "--cluster=pods", "--zone=us-west4-a", "--tpu_type=v5litepod-16"]


def rendered(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def manifest(*arguments: str) -> dict[str, Any]:
    done = rendered(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pod_of(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("golden", "arguments"),
    [
        ("gke_slice.json", [*GIVEN, *TRAIN]),
        ("gke_slices.json", [*GIVEN, *SLICES, *TRAIN]),
        ("xpk.txt", [*GIVEN, *XPK, *TRAIN]),
    ],
)
def test_what_is_printed(golden: str, arguments: list[str]):
    assert rendered(*arguments).stdout == (HERE / "golden" / golden).read_text()


@pytest.mark.parametrize("more", [[], SLICES])
def test_jobset_takes_it(more: list[str]):
    """By the schema of JobSet's v1alpha2 in jobset.json, without its Jobs."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((HERE / "jobset.json").read_text())
    made = manifest(*GIVEN, *more, *TRAIN)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(made, schema)
    for path, wrong in (
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "replicatedJobs", 0, "replica"), 2),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
    ):
        broken = json.loads(json.dumps(made))
        at = broken
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


@pytest.mark.parametrize("more", [[], SLICES])
def test_kubernetes_takes_its_jobs(more: list[str]):
    """By Kubernetes' own schema, which refuses fields that it does not know."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((HERE / "kubernetes_job.json").read_text())
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        **manifest(*GIVEN, *more, *TRAIN)["spec"]["replicatedJobs"][0]["template"],
    }
    jsonschema.validate(job, schema)
    for name, wrong in (("podFailurePolicies", {}), ("parallelism", "4"), ("completionMode", 1)):
        broken = {**job, "spec": {**job["spec"], name: wrong}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_the_rules_of_a_set_are_those_of_its_pods():
    """Messages as Kubernetes words them; what no rule of a Job matches is a fault, which is counted."""
    spec = manifest(*GIVEN, *TRAIN)["spec"]
    rules = spec["failurePolicy"]["rules"]

    def action(message: str) -> str:
        for rule in rules:
            assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
            if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return "RestartJobSet"

    of = "Container dynrec for pod default/ml1m-slice-0-1-x failed with exit code {} matching FailJob rule at index {}"
    assert action(of.format(2, 0)) == "FailJobSet"
    assert action(of.format(75, 1)) == "RestartJobSetAndIgnoreMaxRestarts"
    taken = "Pod default/ml1m-slice-0-1-x has condition DisruptionTarget matching FailJob rule at index 2"
    assert action(taken) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(of.format(12, 0)) == action(of.format(22, 0)) == action(of.format(1, 9)) == "RestartJobSet"
    pods = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule.get("onExitCodes", {}).get("values") for rule in pods] == [[2], [75], None]
    names = {container["name"] for container in pod_of(manifest(*GIVEN, *TRAIN))["containers"]}
    assert {rule["onExitCodes"]["containerName"] for rule in pods[:2]} == names


@pytest.mark.parametrize(
    ("more", "hosts", "slices"), [([], 4, 1), (SLICES, 8, 2), (["--topology=2x2x4"], 4, 1)]
)
def test_the_processes_are_the_hosts_of_all_slices(more: list[str], hosts: int, slices: int):
    """Each pod's variables as JobSet and Kubernetes fill them in, read by the detection."""
    made = manifest(*GIVEN, *more, *TRAIN)
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], replicated["replicas"]) == (hosts, hosts, slices)
    met = []
    for index in range(slices):
        annotations = {
            "jobset-name": made["metadata"]["name"],
            "replicatedjob-name": replicated["name"],
            "replicatedjob-replicas": str(slices),
            "job-index": str(index),
        }
        for pod in range(hosts):
            environment = {"JOB_COMPLETION_INDEX": str(pod)}
            for variable in pod_of(made)["containers"][0]["env"]:
                path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
                name = re.fullmatch(r"metadata\.annotations\['jobset\.sigs\.k8s\.io/(.*)'\]", path)
                environment[variable["name"]] = annotations[name[1]] if name else variable["value"]
            found = find(environment)
            assert found[ADDRESS] == "ml1m-slice-0-0.ml1m:55527"
            assert found[COUNT] == str(hosts * slices)
            met.append(int(found[INDEX]))
    assert met == list(range(hosts * slices))


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command: `$$` is `$`, `$(NAME)` a variable where there is one."""

    def one(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text, flags=re.DOTALL)


class TestWords:
    """The container's command, run here with programs that only write down how they were called."""

    @pytest.fixture
    def programs(self, tmp_path) -> Programs:
        programs = Programs(tmp_path / "programs")
        programs.add("dynrec")
        # What is checked out is a folder with an environment that is ready.
        made = "if sys.argv[1] == 'checkout': os.mkdir('launch'); open('launch/environment.sh', 'w').close()"
        programs.add("git", f"if sys.argv[1] == 'init': os.makedirs(sys.argv[-1])\n{made}")
        return programs

    def test_in_a_pod(self, programs, tmp_path):
        train = ["train", "--workdir=/data/a b;$(touch here)", *HOSTILE]
        (container,) = pod_of(manifest(*GIVEN, "--", *train))["containers"]
        variables = {"HOME": "wrong", "touch here": "wrong"}
        words = [expanded(word, variables) for word in [*container["command"], *container["args"]]]
        at = words.index(next(word for word in words if "git init" in word))
        words[at] = words[at].replace("/tmp/dynrec", str(tmp_path / "dynrec"))
        ended = programs.run(words, tmp_path, JAX_NUM_PROCESSES="7")
        assert ended.returncode == 0, ended.stderr
        assert programs.calls("dynrec") == [["dynrec", *train]]
        address = ["https://example.org/dynrec_jax.git", "0123abc"]
        assert programs.calls("git")[1] == ["git", "fetch", "--quiet", "--depth=1", *address]
        assert not list(tmp_path.rglob("here"))

    def test_in_the_command_of_xpk(self, programs, tmp_path):
        programs.add("xpk")
        printed = rendered(*GIVEN, *XPK, "--", "train", *HOSTILE).stdout
        ended = programs.run(["bash", "-c", printed], tmp_path)
        assert ended.returncode == 0, ended.stderr
        ((_, *words),) = programs.calls("xpk")
        (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
        assert command.isascii()
        assert command.isprintable()
        self.run(expanded(command, {"HOME": "wrong", "touch here": "wrong"}), programs, tmp_path)

    @pytest.mark.slow
    def test_in_the_manifest_that_xpk_writes(self, programs, tmp_path):
        """XPK's own dry run, which asks gcloud nothing."""
        if shutil.which("xpk") is None:
            pytest.skip("XPK is not installed (pip install xpk)")
        printed = rendered(*GIVEN, *XPK, "--", "train", *HOSTILE).stdout
        dry = printed.replace("create ", "create --dry-run --skip-validation --project=lab ", 1)
        ended = programs.run(["bash", "-c", dry], tmp_path, HOME=str(tmp_path))
        assert ended.returncode == 0, ended.stderr
        text = ended.stdout[ended.stdout.index("apiVersion: jobset") :]
        jobset = yaml.safe_load(text[: text.index("\n[XPK]")])
        (replicated,) = jobset["spec"]["replicatedJobs"]
        (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
        self.run(expanded(container["command"][-1], {"HOME": "wrong"}), programs, tmp_path)

    def run(self, command: str, programs: Programs, folder: Path) -> None:
        own = command.replace("/tmp/dynrec", str(folder / "dynrec"))
        ended = programs.run(["bash", "-c", own], folder)
        assert ended.returncode == 0, ended.stderr
        assert programs.calls("dynrec") == [["dynrec", "train", *HOSTILE]]
        assert not list(folder.rglob("here"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--name=My run", *GIVEN[1:], *TRAIN], "--name='My run': expected lower-case letters"),
        (["--name=../x", *GIVEN[1:], *TRAIN], "--name='../x'"),
        (["--name=a\n", *GIVEN[1:], *TRAIN], "--name='a"),
        (["--name=" + "a" * 41, *GIVEN[1:], *TRAIN], "40 at most"),
        ([*GIVEN, "--commit=main", *TRAIN], "--commit='main': expected a commit's hash"),
        ([*GIVEN, "--repository=-x", *TRAIN], "--repository='-x'"),
        ([*GIVEN, "--topology=4", *TRAIN], "--topology='4'"),
        ([*GIVEN, "--topology=3x3", *TRAIN], "--topology=3x3 is no multiple of --chips=4"),
        ([*GIVEN, "--slices=2", "--topology=2x2", *TRAIN], "GKE joins slices of several hosts only"),
        ([*GIVEN, "--slices=0", *TRAIN], "--slices=0: expected 1 to 1024"),
        ([*GIVEN, "--restarts=-1", *TRAIN], "--restarts=-1"),
        ([*GIVEN, "--claim=a b", *TRAIN], "--claim='a b'"),
        ([*GIVEN, "--queue=a:b", *TRAIN], "--queue='a:b'"),
        ([*GIVEN, "--image=a b", *TRAIN], "--image='a b'"),
        ([*GIVEN, "--slices=two", *TRAIN], "invalid int value"),
        ([*GIVEN, "--unknown", *TRAIN], "unrecognized arguments: --unknown"),
        (GIVEN, "no verb"),
        ([*GIVEN, "--xpk", *TRAIN], "--xpk needs --cluster"),
        ([*GIVEN, "--", "train", "--workdir=runs/x"], "--workdir='runs/x' would be lost with the pods"),
        ([*GIVEN, "--", "train", "--workdir", "runs/x"], "--workdir='runs/x' would be lost with the pods"),
        ([*GIVEN, "--", "train", "--workdir=/data/../etc"], "--workdir='/data/../etc'"),
        ([*GIVEN, "--", "train", "--workdir=/data/a/../b"], "--workdir='/data/a/../b'"),
        ([*GIVEN, "--", "score", "--out=/database"], "--out='/database'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], told: str):
    done = rendered(*arguments)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("render: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_needs_python_alone():
    spec = importlib.util.spec_from_file_location("render", SCRIPT)
    assert spec is not None
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(SCRIPT), *GIVEN, *TRAIN], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
