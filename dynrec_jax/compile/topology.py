"""The devices that a program is compiled for: a TPU topology, which libtpu describes, or a number of GPUs.

The compiler of GPUs comes with their driver's libraries alone, so for GPUs a program is compiled for as many simulated
CPU devices: it is partitioned as for GPUs, and memory and collectives are as the CPU compiler makes them.
"""

import contextlib
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dynrec_jax import libtpu
from dynrec_jax.compile.machines import ASSUMED_GPU, GPU_SHARE, GPUS, TPUS, Machine
from dynrec_jax.errors import ConfigError, MachineError, one_line

# Names that were compiled for; others may do as well.
KNOWN = (
    "v5e:2x2, 2x4, 4x4, 16x16, v5p:2x2x1, 4x8x8, v6e:2x4, 16x16, v4:4x4x4, tpu7x:2x2x1, h100:8, a100:16, or 8"
)
MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


class Target(NamedTuple):
    """What is compiled for.

    Attributes:
      name: as the user wrote it.
      machine: one device.
      devices: all of them, slice by slice.
      slices: how many groups of them share a fast network.
      simulated: whether CPU devices stand for them.
      memory: bytes of a device that a program may use.
    """

    name: str
    machine: Machine
    devices: list[jax.Device]
    slices: int
    simulated: bool
    memory: int

    def slice_of(self, device: jax.Device) -> int:
        """The number of the slice that a device is in."""
        return self.devices.index(device) * self.slices // len(self.devices)


def parse_topology(text: str, slices: int) -> tuple[str, str]:
    """The family and the shape, or number, of what `--topology` names; nothing is started.

    Raises:
      ConfigError: there is no such family, or the shape or the number of slices cannot be.
    """
    family, _, shape = text.strip().lower().rpartition(":")
    family = family or (ASSUMED_GPU if shape.isdigit() else "")
    if family not in TPUS and family not in GPUS:
        raise ConfigError(f"--topology={text}: {family or shape!r} is no kind of device; known are {KNOWN}")
    expected = r"[1-9]\d*(x[1-9]\d*){1,2}" if family in TPUS else r"[1-9]\d*"
    if not re.fullmatch(expected, shape):
        wanted = "sizes such as 4x4" if family in TPUS else "a number of devices such as 8"
        raise ConfigError(f"--topology={text}: {shape!r} is no shape; expected {wanted} behind {family}:")
    if slices < 1:
        raise ConfigError(f"--slices={slices}; expected 1 or more")
    if family in GPUS and int(shape) % slices:
        raise ConfigError(f"--slices={slices} does not divide {shape} devices; choose a divisor")
    return family, shape


def open_target(text: str, slices: int) -> Target:
    """The devices of a topology; from here on JAX runs on CPU alone.

    Raises:
      ConfigError: what `--topology` and `--slices` say is not known, or cannot be compiled for here.
      MachineError: the TPU compiler does not start.
    """
    family, shape = parse_topology(text, slices)
    # Of a program that comes out of a cache nothing would be dumped.
    jax.config.update("jax_enable_compilation_cache", False)
    if jax.config.values["jax_platforms"] != "cpu":
        jax.config.update("jax_platforms", "cpu")
    if family in TPUS:
        machine = TPUS[family]
        return Target(text, machine, _tpu_devices(text, family, shape, slices), slices, False, machine.memory)
    machine, count = GPUS[family], int(shape)
    return Target(text, machine, _simulated(count), slices, True, int(_gpu_share() * machine.memory))


def _gpu_share() -> float:
    """The part of a GPU's memory that JAX takes."""
    told = os.environ.get(MEMORY_SHARE, "")
    try:
        return float(told) if told else GPU_SHARE
    except ValueError:
        raise ConfigError(f"{MEMORY_SHARE}={told!r}; expected a number from 0 to 1") from None


def _tpu_devices(text: str, family: str, shape: str, slices: int) -> list[jax.Device]:
    if not libtpu.installed():
        raise ConfigError(
            f"--topology={text}: the TPU compiler, libtpu, is not installed; pip install 'dynrec-jax[tpu]'"
        )
    options: dict[str, object] = {"num_slices": slices} if slices > 1 else {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if family == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX sees them there
    try:
        with libtpu.quiet():
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{family}:{shape}", **options
            )
    except jax.errors.JaxRuntimeError as error:
        refused, reason = "INVALID_ARGUMENT: ", one_line(error)
        if not reason.startswith(refused):
            raise MachineError(f"--topology={text}: the TPU compiler does not start: {reason}") from None
        reason = reason.removeprefix(refused)
        raise ConfigError(
            f"--topology={text}: the TPU compiler knows no such topology ({reason}); known are {KNOWN}"
        ) from None
    return sorted(described.devices, key=lambda device: getattr(device, "slice_index", None) or 0)


def _simulated(count: int) -> list[jax.Device]:
    # Where JAX has started already, as in tests, there are as many devices as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"{count} devices are asked for, and JAX has started with {len(devices)}; start a process of its own"
        )
    return devices[:count]
