"""The mesh of devices: named axes, made once at the start of a run."""

import math
from collections.abc import Sequence

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
    return _mesh(tuple(sizes.values()), jax.devices())


def usable_mesh(rows: int) -> Mesh:
    """A mesh of as many devices as a table of `rows` divides over; all of them where their number is a power of two."""
    devices = jax.devices()
    number = next(n for n in range(len(devices), 0, -1) if rows % n == 0)
    return _mesh((number, 1, 1), devices[:number])


def check_model(mesh: Mesh, rows: int, heads: int) -> None:
    """Raises ConfigError where a model does not divide over a mesh."""
    if rows % mesh.size:
        raise ConfigError(
            f"config.mesh: item tables of {rows} rows do not divide over {mesh.size} devices; use a power of two"
        )
    tensor = mesh.shape["tensor"]
    if heads % tensor:
        raise ConfigError(
            f"config.mesh.tensor: {tensor} does not divide model.heads={heads}; choose one that does"
        )


def _mesh(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    # Auto: the compiler places what the rules leave open; Explicit axes would refuse table[ids].
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
