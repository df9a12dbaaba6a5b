"""The devices' peak: what their makers state of dense matrix products, and what is measured on CPU."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 2048  # of the matrices that are multiplied on CPU
PRODUCTS = 2  # that are measured, after the first; on two cores each takes 0.1 s, and training waits

# 10^12 operations a second of one device, as JAX counts devices: (bfloat16, float32 as XLA multiplies it unless told
# otherwise, which is TF32 on GPUs that have it and one bfloat16 pass on TPUs). Without the factor of sparsity.
# GPUs: NVIDIA's data sheets of each product. TPUs: cloud.google.com/tpu/docs, the page of each version, by chip;
# a chip of version 7 is two devices. V100 and T4 have no bfloat16 units: it is computed in float32 there.
STATED = {
    "TPU v4": (275, 275),
    "TPU v4 lite": (138, 138),
    "TPU v5 lite": (197, 197),
    "TPU v5e": (197, 197),
    "TPU v5": (459, 459),
    "TPU v5p": (459, 459),
    "TPU v6 lite": (918, 918),
    "TPU v6e": (918, 918),
    "TPU7x": (1153.5, 1153.5),
    "V100": (15.7, 15.7),
    "V100 PCIE": (14, 14),
    "T4": (8.1, 8.1),
    "A100": (312, 156),
    "H100": (989.4, 494.7),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417.5),
    "H200": (989.4, 494.7),
    "H200 NVL": (835.5, 417.5),
    "B200": (2250, 1125),
    "L4": (121, 60),
}


def peak_of_process(dtype: str) -> float | None:
    """Operations a second of this process's devices, in products of `dtype`; None for an unknown kind.

    Simulated devices of a CPU share its cores, so their number does not count.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return measured()
    stated = stated_peak(devices[0].device_kind, dtype)
    return None if stated is None else stated * len(devices)


def stated_peak(kind: str, dtype: str) -> float | None:
    """Of one device, by the longest name in the table that is part of its kind, as in "NVIDIA H100 80GB HBM3"."""
    words = f" {kind.replace('-', ' ')} "
    names = [name for name in STATED if f" {name} " in words]
    if not names or " MIG " in words:  # a slice of a card
        return None
    return STATED[max(names, key=len)][dtype == "float32"] * 1e12


@functools.cache
def measured() -> float:
    """The best of several float32 products on the host's cores."""
    x = jnp.asarray(np.random.default_rng(0).random((SIZE, SIZE), np.float32))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * SIZE**3 / best
