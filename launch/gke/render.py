#!/usr/bin/env python3
r"""Prints the JobSet of one run on TPU slices of a GKE cluster, or the XPK command that starts the same.

python launch/gke/render.py --name=ml1m --accelerator=tpu-v5-lite-podslice --topology=4x4 --claim=runs \
    --repository=https://github.com/you/dynrec_jax --commit=SHA -- train --config=experiments/ml1m.py \
    --workdir=/data/runs/ml1m | kubectl apply -f -

Needs Python alone. What is printed is JSON, which is YAML too: no value can end the text that it stands in. Values
become arguments of the container's shell, never parts of its script, and `$` is doubled, since Kubernetes would put
variables in place of `$(NAME)`. A mistake is one line and exit status 2.
"""

import argparse
import json
import math
import posixpath
import re
import shlex
import sys
from typing import Any, NoReturn

MOUNT = "/data"  # where the volume is in every pod
GRACE_SECONDS = 60  # between SIGTERM and SIGKILL; a spot machine gives 25
CHIPS_OF_A_HOST = 4  # of a slice with several hosts
NAMES = {  # what a value must look like, and how that is told
    "name": (
        r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
        "lower-case letters, digits and hyphens, 40 at most, letter first",
    ),
    "namespace": (r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "a namespace"),
    "accelerator": (r"tpu-[a-z0-9-]{1,50}", "a value of cloud.google.com/gke-tpu-accelerator"),
    "topology": (r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}", "a topology such as 4x4 or 2x2x4"),
    "queue": (r"|[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", "a LocalQueue of Kueue"),
    "priority": (r"|[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", "a WorkloadPriorityClass of Kueue"),
    "claim": (r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "a PersistentVolumeClaim that many pods may write"),
    "image": (r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}", "a container image"),
    "repository": (r"(https://|git@|ssh://)[A-Za-z0-9@:._/~-]+", "an address that git clones from"),
    "commit": (r"[0-9a-f]{7,64}", "a commit's hash"),
    "cluster": (r"|[a-z]([-a-z0-9]{0,38}[a-z0-9])?", "a cluster's name"),
    "zone": (r"|[a-z0-9-]{1,40}", "a zone"),
    "tpu_type": (r"|[a-z0-9-]{1,40}", "a TPU type of XPK, such as v5litepod-16"),
}
# The commit, its environment, and dynrec in place of the shell, so that SIGTERM reaches it.
SCRIPT = """set -euo pipefail
unset JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_PORT JAX_NUM_PROCESSES JAX_PROCESS_ID
repository="$1" commit="$2"
shift 2
git init --quiet /tmp/dynrec
cd /tmp/dynrec
git fetch --quiet --depth=1 "$repository" "$commit"
git checkout --quiet FETCH_HEAD
export DYNREC_EXTRAS=tpu
. launch/environment.sh
exec dynrec "$@"
"""


def main(arguments: list[str] | None = None) -> int:
    """Prints what the flags ask for; returns the exit status."""
    given = _parse(sys.argv[1:] if arguments is None else arguments)
    if given.xpk:
        sys.stdout.write(xpk(given) + "\n")
    else:
        sys.stdout.write(json.dumps(jobset(given), indent=2, ensure_ascii=True) + "\n")
    return 0


def jobset(given: argparse.Namespace) -> dict[str, Any]:
    """The manifest: a Job a slice, an indexed pod a host."""
    hosts = hosts_of(given.topology, given.chips)
    labels = {"kueue.x-k8s.io/queue-name": given.queue, "kueue.x-k8s.io/priority-class": given.priority}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": given.name,
            "namespace": given.namespace,
            "labels": {name: value for name, value in labels.items() if value},
            # A node pool is one slice; no two jobs may share it.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "suspend": bool(given.queue),  # Kueue starts it
            "ttlSecondsAfterFinished": 86_400,  # the logs are kept for a day
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _failure_policy(given.restarts),
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": given.slices,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "parallelism": hosts,
                            "completions": hosts,
                            "backoffLimit": 0,  # all pods start again together, or none: see failurePolicy
                            "podFailurePolicy": _pod_failure_policy(),
                            "template": {"spec": _pod(given, hosts)},
                        }
                    },
                }
            ],
        },
    }


def xpk(given: argparse.Namespace) -> str:
    """`xpk workload create …`, quoted for a shell.

    XPK pastes the command into the text of a manifest: it must be one line of printable ASCII.
    """
    script = "; ".join(SCRIPT.splitlines())
    words = ["bash", "-c", script, "dynrec", given.repository, given.commit, *given.command]
    command = _literal(" ".join(_printable(word) for word in words))
    words = ["xpk", "workload", "create", f"--cluster={given.cluster}", f"--zone={given.zone}"]
    words += [f"--workload={given.name}", f"--tpu-type={given.tpu_type}", f"--num-slices={given.slices}"]
    words += [
        f"--docker-image={given.image}",
        f"--max-restarts={given.restarts}",
        "--restart-on-exit-codes=1,75",
    ]
    words += [f"--command={command}"]
    return shlex.join(words)


def hosts_of(topology: str, chips: int) -> int:
    """How many hosts a slice has."""
    return math.prod(int(side) for side in topology.split("x")) // chips


def _failure_policy(restarts: int) -> dict[str, Any]:
    """Of the set: a mistake ends it, preemptions do not count, faults do.

    The messages are those of Kubernetes' controller for the rules of `_pod_failure_policy`.
    """
    mistake, saved = (
        r"exit code 2 matching FailJob",
        r"exit code 75 matching FailJob|condition DisruptionTarget",
    )
    policy = ["PodFailurePolicy"]
    return {
        "maxRestarts": restarts,
        "restartStrategy": "BlockingRecreate",  # the old pods hold the chips
        "rules": [
            {
                "name": "mistake",
                "action": "FailJobSet",
                "onJobFailureReasons": policy,
                "onJobFailureMessagePatterns": [mistake],
            },
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": policy,
                "onJobFailureMessagePatterns": [saved],
            },
        ],
    }


def _pod_failure_policy() -> dict[str, Any]:
    """Of each Job: what makes it fail with a message that tells a mistake and a preemption from a fault."""
    exits = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "dynrec", "operator": "In", "values": [status]},
        }
        for status in (2, 75)
    ]
    taken = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {"rules": [*exits, taken]}


def _pod(given: argparse.Namespace, hosts: int) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": given.accelerator,
        "cloud.google.com/gke-tpu-topology": given.topology,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [_container(given, hosts)],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": given.claim}}],
    }
    if given.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    return pod


def _container(given: argparse.Namespace, hosts: int) -> dict[str, Any]:
    chips = {"google.com/tpu": str(given.chips)}
    annotation = "metadata.annotations['jobset.sigs.k8s.io/{}']"
    # GKE says the same in TPU_WORKER_HOSTNAMES and MEGASCALE_…; where the two differ, dynrec says so and stops.
    told = [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": annotation.format(of)}}}
        for name, of in (
            ("JOBSET_NAME", "jobset-name"),
            ("REPLICATED_JOB_NAME", "replicatedjob-name"),
            ("REPLICATED_JOB_REPLICAS", "replicatedjob-replicas"),
            ("JOB_INDEX", "job-index"),
        )
    ]
    return {
        "name": "dynrec",
        "image": given.image,
        "command": ["bash", "-c", _literal(SCRIPT), "dynrec", given.repository, given.commit],
        "args": [_literal(word) for word in given.command],
        "env": [*told, {"name": "JOB_PARALLELISM", "value": str(hosts)}],
        "ports": [{"containerPort": port} for port in (8482, 55527)],
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": [{"name": "data", "mountPath": MOUNT}],
    }


def _literal(text: str) -> str:
    """What Kubernetes hands on as `text`: it reads `$(NAME)` as a variable and `$$` as `$`."""
    return text.replace("$", "$$")


def _printable(word: str) -> str:
    """A word of bash in printable ASCII, whatever it holds."""
    if word.isascii() and word.isprintable():
        return shlex.quote(word)
    kept = set(range(ord(" "), 127)) - set(b"\\'")
    return "$'" + "".join(chr(byte) if byte in kept else f"\\x{byte:02x}" for byte in word.encode()) + "'"


def _parse(arguments: list[str]) -> argparse.Namespace:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _refuse  # type: ignore[method-assign]
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet; its pods are NAME-slice-0-0, …")
    add("--namespace", default="default")
    add(
        "--accelerator",
        default="tpu-v5-lite-podslice",
        help="the node pool's cloud.google.com/gke-tpu-accelerator",
    )
    add("--topology", default="4x4", help="of a slice")
    add("--chips", type=int, default=CHIPS_OF_A_HOST, help="of a host")
    add("--slices", type=int, default=1)
    add("--spot", action="store_true", help="on machines that may be taken away")
    add("--queue", default="", help="Kueue's LocalQueue; without, the set starts at once")
    add("--priority", default="", help="Kueue's WorkloadPriorityClass")
    add(
        "--claim",
        default="dynrec",
        help=f"PersistentVolumeClaim (ReadWriteMany) that is {MOUNT} in every pod",
    )
    add("--image", default="python:3.12", help="with git, bash and Python 3.11 or later")
    add("--repository", required=True, help="that the pods clone")
    add("--commit", required=True, help="that they run")
    add(
        "--restarts",
        type=int,
        default=10,
        help="how many faults are started again; preemptions are not counted",
    )
    add("--xpk", action="store_true", help="print the XPK command instead")
    add("--cluster", default="", help="of XPK")
    add("--zone", default="", help="of XPK")
    add("--tpu_type", default="", help="of XPK, such as v5litepod-16")
    given = parser.parse_args(arguments[:at])
    given.command = arguments[at + 1 :]
    _check(given)
    return given


def _check(given: argparse.Namespace) -> None:
    if not given.command:
        _refuse("no verb; expected -- VERB [--flag=value …] at the end")
    for name, (pattern, expected) in NAMES.items():
        if not re.fullmatch(pattern, getattr(given, name)):
            _refuse(f"--{name}={getattr(given, name)!r}: expected {expected}")
    for name in ("slices", "chips"):
        if not 1 <= getattr(given, name) <= 1024:
            _refuse(f"--{name}={getattr(given, name)}: expected 1 to 1024")
    if not 0 <= given.restarts <= 10_000:
        _refuse(f"--restarts={given.restarts}: expected 0 to 10000")
    if math.prod(int(side) for side in given.topology.split("x")) % given.chips:
        _refuse(f"--topology={given.topology} is no multiple of --chips={given.chips} of a host")
    if given.slices > 1 and hosts_of(given.topology, given.chips) == 1:
        _refuse(
            f"--slices={given.slices} of --topology={given.topology}: GKE joins slices of several hosts only"
        )
    if given.xpk and not (given.cluster and given.zone and given.tpu_type):
        _refuse("--xpk needs --cluster, --zone and --tpu_type")
    for word in given.command:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            _refuse(f"{word!r}: expected UTF-8, which a manifest is written in")
    for word, following in zip(given.command, [*given.command[1:], ""], strict=True):
        flag, assigned, path = word.partition("=")
        path = path if assigned else following
        if flag in ("--workdir", "--out") and not given.xpk and not _on_the_volume(path):
            _refuse(f"{flag}={path!r} would be lost with the pods; expected a path below {MOUNT}")


def _on_the_volume(path: str) -> bool:
    return posixpath.normpath(path).startswith(f"{MOUNT}/") and ".." not in path.split("/")


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"render: {message}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
