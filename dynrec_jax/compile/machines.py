"""What the makers state of devices, beside their peak of products (`train.peak`): memory and networks."""

from typing import NamedTuple

GIB = 2**30
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


class Machine(NamedTuple):
    """One device, as JAX counts them.

    Attributes:
      kind: as JAX and `train.peak` name it.
      memory: bytes that a program may use.
      memory_rate: bytes a second of its memory.
      link_rate: bytes a second that it sends to devices of its slice (TPU) or node (GPU).
      network_rate: bytes a second that it sends to other slices or nodes, its share of the host's network.
      slice_name: what shares the fast network, "slice" or "node".
    """

    kind: str
    memory: int
    memory_rate: float
    link_rate: float
    network_rate: float
    slice_name: str


def _tpu(kind: str, gib: float, memory: float, link: float, network: float) -> Machine:
    """GiB, GB/s, GB/s and Gbit/s."""
    return Machine(kind, int(gib * GIB), memory * 1e9, link * 1e9, network * 1e9 / 8, "slice")


def _gpu(kind: str, mib: int, memory: float, link: float, network: float) -> Machine:
    return Machine(kind, mib * 2**20, memory * 1e9, link * 1e9, network * 1e9 / 8, "node")


# Memory is what the compiler (libtpu 0.0.42.1) says is there when a program does not fit. Rates: the page of each
# version at cloud.google.com/tpu/docs; links in one direction, which is half of the "bidirectional ICI bandwidth", or
# "all-reduce bandwidth per Pod" by chip; the network by chip. v4 has no such line for its network: v5e's is assumed.
# A chip of version 7 is two devices, and each has half of everything.
TPUS = {
    "v4": _tpu("TPU v4", 30.75, 1200, 268, 25),
    "v5e": _tpu("TPU v5 lite", 15.75, 819, 200, 25),
    "v5p": _tpu("TPU v5", 95.74, 2765, 600, 50),
    "v6e": _tpu("TPU v6 lite", 31.25, 1638, 400, 100),
    "tpu7x": _tpu("TPU7x", 94.75, 3690, 300, 50),
}

# Memory as the driver lists it, before JAX takes its share. Rates: NVIDIA's data sheets of each product, in the SXM
# form; NVLink in one direction, which is half of what they state; between nodes one network card a GPU, as DGX systems
# of each generation have it (A100: 200 Gbit/s, others: 400). What a cluster really has may be less.
GPUS = {
    "a100": _gpu("A100", 81_920, 2039, 300, 200),
    "a100-40gb": _gpu("A100", 40_960, 1555, 300, 200),
    "h100": _gpu("H100", 81_559, 3350, 450, 400),
    "h200": _gpu("H200", 143_771, 4800, 450, 400),
    "b200": _gpu("B200", 183_359, 8000, 900, 400),
}
ASSUMED_GPU = "h100"  # of a number of devices alone
