"""The mesh of devices: named axes, made once at the start of a run."""

import math

import jax
from jax.sharding import AxisType, Mesh

from dynrec_jax.errors import ConfigError

AXES = ("data", "table", "tensor")


def make_mesh(data: int = -1, table: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with the axes `AXES`; one of the sizes may be -1, "what is left".

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "table": table, "tensor": tensor}
    devices = jax.device_count()
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"config.mesh: {sizes}; expected sizes from 1 up and at most one -1")
    if unknown and devices % known == 0:
        sizes[unknown[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"config.mesh: {sizes} does not make {devices} devices; choose sizes whose product is {devices}"
        )
    # Auto: the compiler places what the rules leave open; Explicit axes would refuse table[ids].
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
