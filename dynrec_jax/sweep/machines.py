"""How the workers of one machine share it: cores, graphics cards, chips; and how they are started and watched."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# More than this share of a card that several trials use is left to each of them together.
MEMORY = 0.9
PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def cores_of(index: int, count: int, cores: Sequence[int]) -> list[int]:
    """The cores of worker `index` of `count`: neighbours, as many for each; one for each where workers are more."""
    if count >= len(cores):
        return [cores[index % len(cores)]]
    return list(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def environment_of(index: int, count: int, gpus: Sequence[str], chips: int) -> dict[str, str]:
    """What worker `index` of `count` is told of the accelerators: one for each; of cards that are fewer, a share.

    Args:
      index: of the worker.
      count: of workers; one alone has everything.
      gpus: names of the cards, as CUDA_VISIBLE_DEVICES takes them.
      chips: of a TPU on this machine.
    """
    if count == 1:
        return {}
    if gpus:
        told = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]}
        sharing = len(range(index % len(gpus), count, len(gpus)))
        if sharing > 1:
            told["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY / sharing:.3f}"
        return told
    if chips:
        return {
            "TPU_VISIBLE_CHIPS": str(index % chips),
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
    return {}


def own_gpus(environment: Mapping[str, str]) -> list[str]:
    """The NVIDIA cards that this process may use; none where JAX is told to use something else."""
    if not _is_wanted(environment, "cuda", "gpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        told = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU (\d+):", told, re.MULTILINE)


def own_chips(environment: Mapping[str, str]) -> int:
    """TPU chips of this machine; none where JAX is told to use something else."""
    if not _is_wanted(environment, "tpu"):
        return 0
    return len(list(Path("/dev").glob("accel[0-9]*"))) or len(list(Path("/dev/vfio").glob("[0-9]*")))


def _is_wanted(environment: Mapping[str, str], *platforms: str) -> bool:
    """Whether JAX may use one of the platforms; it takes the first of those that it is given."""
    wanted = environment.get("JAX_PLATFORMS", "")
    return not wanted or wanted.split(",")[0].strip() in platforms


def keep_to(cores: Sequence[int], threads: int) -> None:
    """Has this process, before JAX starts in it, compute on some cores alone, in as many threads as a run alone has.

    XLA on CPU divides sums by the number of its threads, and sums in another order end in other bits. A trial gives
    what `dynrec train` gives on the same machine because the threads are as many, however few cores they share.
    """
    os.environ.setdefault("NPROC", str(threads))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def end_with_parent() -> None:
    """Has the kernel end this process when the one that started it ends, however it does (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PARENT_DEATH, signal.SIGKILL)


def own_cores() -> list[int]:
    """The cores that this process may use."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
