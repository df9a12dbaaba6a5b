"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, with all that they write in a folder.

They run in namespaces of their own, so that n1 and n2 are names there and nowhere else, and nothing of theirs is left
when the first process of them ends, whatever it started.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "unshare")
CONF = """\
ClusterName=dynrec
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits until its old credential has ended: 5 seconds here, 120 by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=5
SlurmdTimeout=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
START = """\
set -e
mount --bind "$1/hosts" /etc/hosts
munged --foreground --force --num-threads=1 --key-file="$1/munge.key" --socket="$1/munge.socket" \\
  --pid-file="$1/munged.pid" --log-file="$1/munged.log" --seed-file="$1/munged.seed" &
for _ in $(seq 100); do [ -S "$1/munge.socket" ] && break; sleep 0.1; done
slurmctld -D -f "$1/slurm.conf" &
slurmd -D -N n1 -f "$1/slurm.conf" &
slurmd -D -N n2 -f "$1/slurm.conf" &
wait
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: apt install slurm-wlm munge)"
    if os.getuid() != 0:
        return "namespaces and Slurm's daemons want root"
    made = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    return "" if made.returncode == 0 else f"no namespaces here: {made.stderr.decode().strip()}"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """Jobs of a cluster that `started` has started."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        """What one of Slurm's commands prints."""
        environment = {**self._environment, **more}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, arguments: Sequence[str], cwd: Path, log: Path, **environment: str) -> str:
        """The number of a new job."""
        options = ["--parsable", f"--output={log}"]
        return self.run("sbatch", *options, str(script), *arguments, cwd=cwd, **environment)

    def facts(self, job: str) -> Mapping[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str, seconds: float) -> Mapping[str, str]:
        """Its facts once it is over for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
        self.until(lambda: self.facts(job)["JobState"] in over, seconds, f"job {job} has not ended")
        return self.facts(job)

    def until(self, done: Callable[[], object], seconds: float, told: str) -> None:
        """Waits; fails with what the daemons logged when it takes too long."""
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{told}\n{self.logged()}"
            time.sleep(0.05)

    def logged(self) -> str:
        """The ends of all logs."""
        return "\n".join(
            f"{log.name}:\n{log.read_text()[-2_000:]}" for log in sorted(self.folder.glob("*.log"))
        )


def processes(job: str, node: str, name: str) -> list[int]:
    """Numbers of the processes of a job on a node whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            variables = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            here = {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()} <= set(variables)
            if here and name in command:
                found.append(int(path.name))
    return found


def steps_daemon(job: str, node: str, pid: int) -> int:
    """The slurmstepd above a process of a job."""
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        if "(slurmstepd)" in stat:
            return pid
        pid = int(stat.rpartition(")")[2].split()[1])
    raise AssertionError(f"job {job}: no slurmstepd on {node}")


@contextlib.contextmanager
def started() -> Iterator[Cluster]:
    """A cluster whose nodes are idle; ended with all that runs on it."""
    # The socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    process = None
    try:
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "hosts").write_text(f"127.0.0.1 localhost n1 n2 {socket.gethostname()}\n")
        controller, one, two = _free_ports(3)
        facts = {"folder": folder, "host": socket.gethostname().split(".")[0]}
        (folder / "slurm.conf").write_text(CONF.format(**facts, controller=controller, one=one, two=two))
        with (folder / "daemons.log").open("w") as log:
            spaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            process = subprocess.Popen(
                ["unshare", *spaces, "bash", "-c", START, "slurm", str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf"), "HOME": "/root"},
            )
        cluster = Cluster(folder)
        cluster.until(lambda: _idle(cluster), 60.0, "the nodes have not come up")
        yield cluster
    finally:
        if process is not None:
            process.send_signal(signal.SIGKILL)  # --kill-child: its child goes too, and all of its namespace
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _idle(cluster: Cluster) -> bool:
    try:
        return cluster.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle", "idle"]
    except AssertionError:
        return False  # the controller is not up yet


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]
