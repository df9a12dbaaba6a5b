"""launch/tpu_vm.sh with a gcloud that keeps machines in a folder: workers that are taken away and asked for."""

import json
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .false import HOSTILE, ROOT, Programs, activate

HERE = Path(__file__).parent
GIVEN = ["--name=ml1m", "--zone=us-west4-a", "--type=v5litepod-16"]
# States in a file, workers as folders; `ssh` runs the command in each, with what the metadata server would say.
GCLOUD = """
import pathlib, shutil, subprocess
assert os.environ["CLOUDSDK_CORE_DISABLE_PROMPTS"] == "1"
words, home = sys.argv[1:], pathlib.Path(os.environ["MACHINES"])
state, name = home / "state", words[4]
flags = dict(w.split("=", 1) for w in words if w.startswith("--") and "=" in w)
if words[2:4] == ["queued-resources", "describe"]:
    if not state.exists(): sys.exit(1)
    print(state.read_text())
elif words[2:4] == ["queued-resources", "create"]:
    state.write_text("ACTIVE")
elif words[2:4] == ["queued-resources", "delete"]:
    state.unlink()
elif words[2:4] == ["tpu-vm", "scp"]:
    for worker in range(2):
        folder = home / f"{words[5].rstrip(':')}.{worker}"
        folder.mkdir(exist_ok=True)
        shutil.copy(words[4], folder)
elif words[2:4] == ["tpu-vm", "ssh"]:
    number = name.rpartition("-")[2]
    for worker in range(2):
        own = {**os.environ, "WORKER": str(worker), "SLICE": number if number.isdigit() else ""}
        folder = home / f"{name}.{worker}"
        subprocess.run(["bash", "-c", flags["--command"]], cwd=folder, env={**own, "HOME": str(folder)})
"""
CURL = """
key = sys.argv[-1].rpartition("/")[2]
part = os.environ["SLICE"]
if key == "agent-worker-number": print(os.environ["WORKER"])
net = f"10.0.{part or 0}"
if key == "worker-network-endpoints": print(os.environ.get("ENDPOINTS") or f"a:1:{net}.1,b:2:{net}.2")
if key == "tpu-env" and part:
    print(f"ZONE: 'x'\\nMEGASCALE_NUM_SLICES: '2'\\nMEGASCALE_SLICE_ID: '{part}'")
    print("MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'")
"""
# Writes down who it is, then ends with the next status of its list.
DYNREC = """
import fcntl, pathlib
lock = open(os.environ["MACHINES"] + "/lock", "w")  # slices run at the same time
fcntl.flock(lock, fcntl.LOCK_EX)
with open(os.environ["MACHINES"] + "/who", "a") as who:
    who.write(json.dumps({k: v for k, v in os.environ.items() if k.startswith("JAX_")}) + "\\n")
left = pathlib.Path(os.environ["MACHINES"], "statuses")
statuses = json.loads(left.read_text())
left.write_text(json.dumps(statuses[1:]))
if statuses[0] == "taken":
    pathlib.Path(os.environ["MACHINES"], "state").write_text("SUSPENDED")
    sys.exit(1)
sys.exit(statuses[0])
"""


class Cloud:
    """The false cloud, and a clone with one commit that the script is part of."""

    def __init__(self, folder: Path):
        self.folder, self.machines = folder, folder / "machines"
        self.machines.mkdir()
        self.clone = folder / "clone with a space"
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "--message=one"]):
            subprocess.run(["git", "-C", str(self.clone), *words], check=True)
        self.programs = Programs(folder / "programs")
        for name, body in (("gcloud", GCLOUD), ("curl", CURL), ("dynrec", DYNREC)):
            self.programs.add(name, body)
        self.activate = activate(folder)

    def run(self, statuses: list, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.machines / "statuses").write_text(json.dumps(statuses))
        given = {"MACHINES": str(self.machines), "DYNREC_ACTIVATE": str(self.activate), "DYNREC_POLL": "0"}
        script = self.clone / "launch" / "tpu_vm.sh"
        return self.programs.run(["bash", script, *arguments], self.folder, **given, **environment)

    def did(self) -> list[str]:
        """What was asked of gcloud, without looking at states."""
        return [call[4] for call in self.programs.calls("gcloud") if call[4] != "describe"]

    def who(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.machines / "who").read_text().splitlines()]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_one_slice(cloud):
    ended = cloud.run([0] * 2, *GIVEN, "--", "train", *HOSTILE)
    assert ended.returncode == 0, ended.stderr
    assert cloud.did() == ["create", "scp", "ssh", "delete"]
    assert cloud.programs.calls("dynrec") == [["dynrec", "train", *HOSTILE]] * 2
    told = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8482", "JAX_NUM_PROCESSES": "2"}
    assert [{**told, "JAX_PROCESS_ID": str(i)} for i in range(2)] == [
        {name: who[name] for name in (*told, "JAX_PROCESS_ID")} for who in cloud.who()
    ]
    assert "ml1m: dynrec-exit: 0" in ended.stdout
    assert not list(cloud.folder.rglob("here"))
    assert (cloud.machines / "ml1m.0" / "dynrec" / "pid").exists()
    assert not (cloud.machines / "state").exists()


def test_workers_that_are_listed_by_address_alone(cloud):
    cloud.run([0] * 2, *GIVEN, "--", "train", ENDPOINTS="t-w0.local,t-w1.local")
    assert {who["JAX_COORDINATOR_ADDRESS"] for who in cloud.who()} == {"t-w0.local:8482"}


def test_two_slices(cloud):
    ended = cloud.run([0] * 4, *GIVEN, "--slices=2", "--spot", "--", "train")
    assert ended.returncode == 0, ended.stderr
    (create,) = [call for call in cloud.programs.calls("gcloud") if call[4] == "create"]
    assert {"--node-prefix=ml1m", "--node-count=2", "--spot"} <= set(create)
    assert {who["JAX_COORDINATOR_ADDRESS"] for who in cloud.who()} == {"10.0.0.1:8482"}
    assert {who["JAX_NUM_PROCESSES"] for who in cloud.who()} == {"4"}
    assert sorted(who["JAX_PROCESS_ID"] for who in cloud.who()) == ["0", "1", "2", "3"]


def test_machines_that_are_taken_away_are_asked_for_again(cloud):
    ended = cloud.run(["taken", 1, "taken", 75, 0, 0], *GIVEN, "--restarts=0", "--", "train")
    assert ended.returncode == 0, ended.stderr
    assert cloud.did() == [*["create", "scp", "ssh", "delete"] * 2, "create", "scp", "ssh", "delete"]


@pytest.mark.parametrize(
    ("statuses", "starts", "status"),
    [
        ([2, 2], 1, 2),
        ([75, 75, 75, 75, 0, 0], 3, 0),
        ([1, 1, 137, 1], 2, 137),
        ([1, 1, 75, 75, 1, 1, 0, 0], 4, 0),  # it got on between the faults
    ],
)
def test_what_is_started_again(cloud, statuses, starts, status):
    ended = cloud.run(statuses, *GIVEN, "--restarts=1", "--", "train")
    assert ended.returncode == status, ended.stderr
    assert cloud.did() == ["create", *["scp", "ssh"] * starts, "delete"]


def test_machines_that_are_there_are_used_and_kept(cloud):
    (cloud.machines / "state").write_text("ACTIVE")
    assert cloud.run([0] * 2, *GIVEN, "--keep", "--", "train").returncode == 0
    assert cloud.did() == ["scp", "ssh"]


def test_a_request_that_failed_is_told(cloud):
    (cloud.machines / "state").write_text("FAILED")
    ended = cloud.run([], *GIVEN, "--", "train")
    assert ended.returncode == 1
    assert "the request failed" in ended.stderr
    assert cloud.did() == ["delete"]


def test_interrupted(cloud):
    """What runs is ended, and the machines are given back."""
    hangs = (
        "import time; (home / 'pid').write_text(str(os.getpid())); print('up', flush=True); time.sleep(60)"
    )
    cloud.programs.add("gcloud", f"{GCLOUD}\nif words[3] == 'ssh': {hangs}")
    (cloud.machines / "statuses").write_text("[0, 0]")
    script = cloud.clone / "launch" / "tpu_vm.sh"
    own = {"MACHINES": str(cloud.machines), "DYNREC_ACTIVATE": str(cloud.activate), "DYNREC_POLL": "0"}
    command = ["bash", script, *GIVEN, "--", "train"]
    own = cloud.programs.environment(**own)
    began = time.monotonic()
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) as started:
        assert "ml1m: up\n" in iter(started.stdout.readline, "")
        assert time.monotonic() - began < 50.0  # shown while it runs, which is 60 seconds
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=30) == 143
    assert cloud.did()[-1] == "delete"
    left = Path("/proc", (cloud.machines / "pid").read_text())
    while left.exists() and "Z" not in (left / "stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() - began < 58.0
        time.sleep(0.05)


def test_a_share_is_mounted_on_every_worker(cloud):
    for name, body in (("sudo", ""), ("mountpoint", "sys.exit(1)"), ("mount.nfs", "")):
        cloud.programs.add(name, body)
    assert cloud.run([0] * 2, *GIVEN, "--nfs=10.0.0.9:/share", "--", "train").returncode == 0
    mounted = [["sudo", "mkdir", "-p", "/data"], ["sudo", "mount", "-t", "nfs", "10.0.0.9:/share", "/data"]]
    assert cloud.programs.calls("sudo") == mounted * 2


class TestWorker:
    """The part that runs on every worker."""

    @pytest.fixture
    def start(self, cloud):
        """Starts it in the folder that a clone was unpacked to."""
        home = cloud.folder / "home"
        folder = home / "dynrec" / "SHA"
        folder.parent.mkdir(parents=True)
        shutil.copytree(cloud.clone, folder)

        def begin() -> subprocess.Popen[str]:
            own = {"HOME": str(home), "WORKER": "1", "SLICE": "", "DYNREC_ACTIVATE": str(cloud.activate)}
            return subprocess.Popen(
                ["bash", "launch/tpu_vm.sh", "--worker", "", "train"],
                cwd=folder,
                env=cloud.programs.environment(**own),
                stdout=subprocess.PIPE,
                text=True,
            )

        return begin

    def test_preempted(self, cloud, start):
        waits = "print('up', flush=True); time.sleep(60)"
        body = f"import signal, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); {waits}"
        cloud.programs.add("dynrec", body)
        worker = start()
        assert worker.stdout.readline() == "up\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.communicate(timeout=30)[0] == "dynrec-exit: 75\n"

    def test_an_attempt_that_is_still_there_is_ended(self, cloud, start):
        old = subprocess.Popen(["bash", "-c", "exec -a dynrec sleep 60"])
        (cloud.folder / "home" / "dynrec" / "pid").write_text(f"{old.pid}\n")
        cloud.programs.add("dynrec")
        said = start().communicate(timeout=30)[0]
        assert said == "dynrec-exit: 0\n"
        assert old.wait(timeout=10) == -signal.SIGKILL

    def test_a_process_that_has_its_number_now_is_left_alone(self, cloud, start):
        other = subprocess.Popen(["sleep", "60"])
        (cloud.folder / "home" / "dynrec" / "pid").write_text(f"{other.pid}\n")
        cloud.programs.add("dynrec")
        start().communicate(timeout=30)
        assert other.poll() is None
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--name=$(touch here)", *GIVEN[1:], "--", "train"],
            "--name=$(touch here): expected lower-case letters",
        ),
        (["--name=../x", *GIVEN[1:], "--", "train"], "--name=../x"),
        (["--name=a\nb", *GIVEN[1:], "--", "train"], "--name=a"),
        ([*GIVEN, "--slices=0", "--", "train"], "--slices=0: expected a number"),
        ([*GIVEN, "--restarts=a[$(touch here)]", "--", "train"], "--restarts="),
        ([*GIVEN, "--nfs=host:/a b", "--", "train"], "--nfs=host:/a b"),
        ([*GIVEN, "--commit=--output=here", "--", "train"], "--commit=--output=here: no commit"),
        ([*GIVEN, "--zones=x", "--", "train"], "--zones=x: unknown"),
        (GIVEN, "no verb"),
        ([GIVEN[0], "--", "train"], "--zone=: expected a zone"),
    ],
)
def test_mistakes_end_before_anything_is_asked_for(cloud, arguments, told):
    ended = cloud.run([], *arguments)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert not cloud.programs.calls()
    assert not list(cloud.folder.rglob("here"))


@pytest.mark.parametrize(
    ("golden", "more"),
    [
        ("tpu_vm.txt", []),
        ("tpu_vm_slices.txt", ["--slices=2", "--spot", "--nfs=10.0.0.9:/share", "--project=lab"]),
    ],
)
def test_dry_run(cloud, golden, more):
    flags = ["train", "--config=experiments/ml1m.py", "--workdir=/data/a b;$(touch here)"]
    ended = cloud.run([], *GIVEN, *more, "--dry_run", "--", *flags)
    assert ended.returncode == 0, ended.stderr
    assert not cloud.programs.calls()
    rev = ["git", "-C", str(cloud.clone), "rev-parse", "HEAD"]
    sha = subprocess.run(rev, capture_output=True, text=True, check=True).stdout.strip()
    shown = ended.stdout.replace(sha, "SHA").replace(str(cloud.clone).replace(" ", "\\ "), "CLONE")
    assert shown == (HERE / "golden" / golden).read_text()
    # Quoted for the shell here, and once more for that of the worker.
    (ssh, *_) = [line for line in ended.stdout.splitlines() if " ssh " in line]
    (command,) = [w.removeprefix("--command=") for w in shlex.split(ssh) if w.startswith("--command=")]
    assert shlex.split(command)[-len(flags) :] == flags
