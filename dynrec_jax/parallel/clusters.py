"""Which process of how many this is, where a cluster's own variables say so.

`dynrec_jax.parallel.processes` needs three: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A launcher
that sets them is believed. Elsewhere they are derived, as JAX's own detection does and with its ports, from

- Slurm, in a step that `srun` started (a batch script and the shell of `salloc` are one process);
- Kubernetes, in a pod of an indexed Job or of a JobSet that is told how many pods there are (launch/gke/render.py);
- Cloud TPU on GKE: the hosts of a slice, and the slices.

Nothing is asked over a network and no command is run. Variables that an older job left behind are what hangs a start
for minutes: where two do not fit together, `find` refuses and names them.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from dynrec_jax.errors import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PORT = "JAX_COORDINATOR_PORT"  # in place of the port that would be derived
ORIGIN = "origin"  # key of `find`'s answer: which variables said so

SLURM_PORTS = range(
    61_440, 65_536
)  # one of them by the job's number, so that jobs on one machine do not meet
KUBERNETES_PORT, TPU_PORT = 55_527, 8_482
SLURM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
SLICES, SLICE, MEGASCALE = "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"
MOST_HOSTS = 1 << 16  # a node list that names more is a mistake, not a cluster


class Told(NamedTuple):
    """What one origin says: processes, this one's number, `host:port` of number 0, and in which variables it stood."""

    total: int
    number: int
    address: str
    names: tuple[str, str]  # of the number of processes and of this one's number


def find(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The three variables and ORIGIN, a text; empty where this is one process.

    JAX_NUM_PROCESSES=1 makes it one process whatever the cluster says.

    Raises:
      ConfigError: a variable is no number, is missing beside others, or contradicts another; both are named.
    """
    given = environment.get(COUNT, "").strip()
    if given == "1":
        return {}
    for name in (ADDRESS, INDEX):
        if not given and environment.get(name):
            raise ConfigError(
                f"{name}={environment[name]!r} is set and {COUNT} is not; unset it if an older job left it, or set all "
                f"of {ADDRESS}, {COUNT} and {INDEX}"
            )
    told = [one for one in (_slurm(environment), _kubernetes(environment), _tpu(environment)) if one]
    for other in told[1:]:
        _check_same(told[0], other)
    if given:
        own = {name: environment.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
        if told and all(own[name].isascii() and own[name].isdigit() for name in (COUNT, INDEX)):
            _check_same(Told(int(own[COUNT]), int(own[INDEX]), "", (COUNT, INDEX)), told[0])
        return {**own, ORIGIN: f"{COUNT}={own[COUNT]} and {INDEX}={own[INDEX]}"}
    if not told:
        return {}
    count, index, address, names = told[0]
    said = f"{names[0]} and {names[1]}: number {index} of {count}"
    return {ADDRESS: address, COUNT: str(count), INDEX: str(index), ORIGIN: said}


def hosts(node_list: str) -> list[str]:
    """The names that Slurm's notation stands for, in its order: `n[1-3,07],gpu5` is n1, n2, n3, n07, gpu5.

    Raises:
      ConfigError: it is no such list.
    """
    found: list[str] = []
    for part in _parts(node_list):
        found += _expanded(part, node_list)
        if len(found) > MOST_HOSTS:
            raise ConfigError(
                f"{node_list!r} names more than {MOST_HOSTS:,} hosts; expected a node list of Slurm's"
            )
    return found


def _slurm(environment: Mapping[str, str]) -> Told | None:
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    tasks = next((name for name in SLURM_TASKS if environment.get(name)), None)
    if not nodes or tasks is None:
        return None  # no step: the shell of an allocation, or a batch script
    count = _number(environment, tasks)
    if count == 1:
        return None
    index = _below(environment, "SLURM_PROCID", count, tasks)
    named = hosts(nodes)
    many = environment.get("SLURM_STEP_NUM_NODES")
    if many and _number(environment, "SLURM_STEP_NUM_NODES") != len(named):
        raise _contradiction(environment, "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST")
    if count < len(named):
        raise _contradiction(environment, tasks, "SLURM_STEP_NODELIST")
    here = environment.get("SLURMD_NODENAME")
    if here and here not in named:
        raise _contradiction(environment, "SLURMD_NODENAME", "SLURM_STEP_NODELIST")
    job = environment.get("SLURM_JOB_NODELIST")
    if job and not set(named) <= set(hosts(job)):
        raise _contradiction(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    number = _number(environment, "SLURM_JOB_ID")
    if environment.get("SLURM_JOBID", str(number)) != str(number):
        raise _contradiction(environment, "SLURM_JOBID", "SLURM_JOB_ID")
    port = _port(environment, SLURM_PORTS[number % len(SLURM_PORTS)])
    return Told(count, index, f"{named[0]}:{port}", (tasks, "SLURM_PROCID"))


def _kubernetes(environment: Mapping[str, str]) -> Told | None:
    if not environment.get("JOB_PARALLELISM") or not environment.get("JOB_COMPLETION_INDEX"):
        return None  # an indexed Job whose pods need not be one run: a sweep's workers, say
    pods = _number(environment, "JOB_PARALLELISM")
    pod = _below(environment, "JOB_COMPLETION_INDEX", pods, "JOB_PARALLELISM")
    jobset = environment.get("JOBSET_NAME", "")
    jobs, job = 1, 0
    if jobset:
        if environment.get("REPLICATED_JOB_REPLICAS"):
            jobs = _number(environment, "REPLICATED_JOB_REPLICAS")
            job = _below(environment, "JOB_INDEX", jobs, "REPLICATED_JOB_REPLICAS")
        first = f"{jobset}-{_text(environment, 'REPLICATED_JOB_NAME', 'JOBSET_NAME')}-0-0"
        service = environment.get("JOBSET_SUBDOMAIN") or jobset
    else:
        first = f"{_text(environment, 'JOB_NAME', 'JOB_PARALLELISM')}-0"
        service = _text(environment, "JOB_SUBDOMAIN", "JOB_PARALLELISM")
    if pods * jobs == 1:
        return None
    address = f"{first}.{service}:{_port(environment, KUBERNETES_PORT)}"
    return Told(pods * jobs, job * pods + pod, address, ("JOB_PARALLELISM", "JOB_COMPLETION_INDEX"))


def _tpu(environment: Mapping[str, str]) -> Told | None:
    listed = "TPU_PROCESS_ADDRESSES" if environment.get("TPU_PROCESS_ADDRESSES") else "TPU_WORKER_HOSTNAMES"
    workers = [host for host in environment.get(listed, "").split(",") if host]
    slices = _number(environment, SLICES) if environment.get(SLICES) else 1
    if workers in ([], ["localhost"]):  # no TPU, or a slice of one host
        stray = next((name for name in (SLICES, SLICE, MEGASCALE) if environment.get(name)), None)
        if stray and (slices > 1 or stray != SLICES):
            raise ConfigError(
                f"{stray}={environment[stray]!r} speaks of several slices, and {listed} names no hosts of one; unset "
                f"{stray} if an older job left it"
            )
        return None
    if len(workers) * slices == 1:
        return None
    worker = _below(environment, "TPU_WORKER_ID", len(workers), listed) if len(workers) > 1 else 0
    part, first = 0, workers[0]
    if slices > 1:
        part = _below(environment, SLICE, slices, SLICES)
        first = _text(environment, MEGASCALE, SLICES)
    elif environment.get(SLICE, "0") != "0":
        raise ConfigError(
            f"{SLICE}={environment[SLICE]!r} and {SLICES} is not above 1; unset the one that is stale"
        )
    address = f"{first.split(':')[0]}:{_port(environment, TPU_PORT)}"
    names = (
        (f"{SLICES} × {listed}", f"{SLICE} and TPU_WORKER_ID") if slices > 1 else (listed, "TPU_WORKER_ID")
    )
    return Told(len(workers) * slices, part * len(workers) + worker, address, names)


def _check_same(one: Told, other: Told) -> None:
    for what, a, b, names in (
        ("number of processes", one.total, other.total, (one.names[0], other.names[0])),
        ("number of this process", one.number, other.number, (one.names[1], other.names[1])),
    ):
        if a != b:
            raise ConfigError(
                f"the {what} is {a} by {names[0]} and {b} by {names[1]}; unset the one that an older job left "
                f"({COUNT}=1 makes it a process of its own)"
            )


def _contradiction(environment: Mapping[str, str], one: str, other: str) -> ConfigError:
    return ConfigError(
        f"{one}={environment[one]!r} contradicts {other}={environment[other]!r}; unset the SLURM_ variables if an "
        f"older job left them, or start with srun ({COUNT}=1 makes it a process of its own)"
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "").strip()
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text!r}: expected a number; unset it if an older job left it")
    return int(text)


def _below(environment: Mapping[str, str], name: str, count: int, of: str) -> int:
    number = _number(environment, name)
    if number >= count:
        raise ConfigError(
            f"{name}={number}: expected 0 to {count - 1}, by {of}; unset the one that an older job left"
        )
    return number


def _text(environment: Mapping[str, str], name: str, beside: str) -> str:
    text = environment.get(name, "")
    if not text:
        raise ConfigError(
            f"{name} is missing beside {beside}={environment[beside]!r}; expected both or neither"
        )
    return text


def _port(environment: Mapping[str, str], derived: int) -> int:
    if not environment.get(PORT):
        return derived
    port = _number(environment, PORT)
    if not 0 < port < 2**16:
        raise ConfigError(f"{PORT}={port}: expected a port, 1 to 65535")
    return port


def _parts(node_list: str) -> list[str]:
    """A node list cut at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in node_list:
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth or not all(parts):
        raise ConfigError(f"{node_list!r}: expected a node list of Slurm's, such as n[1-3,07],gpu5")
    return parts


def _expanded(part: str, node_list: str) -> list[str]:
    """`a[1-2]b` as a1b, a2b; brackets may come several times, the last counts fastest."""
    before, opened, rest = part.partition("[")
    if not opened:
        return [part]
    inside, _, after = rest.partition("]")
    numbers: list[str] = []
    for span in inside.split(","):
        low, dash, high = span.partition("-")
        high = high if dash else low
        if not (
            low.isascii() and high.isascii() and low.isdigit() and high.isdigit() and int(low) <= int(high)
        ):
            raise ConfigError(
                f"{node_list!r}: {span!r} is no number or range of numbers in a node list of Slurm's"
            )
        if int(high) - int(low) >= MOST_HOSTS:
            raise ConfigError(
                f"{node_list!r} names more than {MOST_HOSTS:,} hosts; expected a node list of Slurm's"
            )
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    ends = _expanded(after, node_list)
    if len(numbers) * len(ends) > MOST_HOSTS:
        raise ConfigError(
            f"{node_list!r} names more than {MOST_HOSTS:,} hosts; expected a node list of Slurm's"
        )
    return [f"{before}{number}{end}" for number in numbers for end in ends]
