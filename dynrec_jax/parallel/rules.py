"""One table from logical axis names to mesh axes; the only place that knows both.

Models name what an axis *is* ("batch", "items", "heads"); this table says where it lies.
"""

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# Histories lie over all devices but those of a tensor axis. "items" are the rows of item tables: over all devices of
# a slice, since they are what grows; each slice has a replica. "embed" is the axis of the dense weights that all of
# them have (FSDP); activations leave it whole.
BATCH_AXES = ("slice", "data", "fsdp")
ITEM_AXES = ("data", "fsdp", "tensor")
RULES: tuple[tuple[str, tuple[str, ...] | str | None], ...] = (
    ("batch", BATCH_AXES),
    ("items", ITEM_AXES),
    ("heads", "tensor"),
    ("hidden", "tensor"),
    ("embed", "fsdp"),
    ("head_dim", None),
    ("length", None),
    ("layers", None),
)

# Of arrays whose first axis is the batch's, is a table's, or of which every device has the whole.
BATCH, ROWS, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec(ITEM_AXES), PartitionSpec()


def spec(*names: str | None) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names.

    Raises:
      ValueError: a name is unknown, or two of the axes would lie on the same mesh axis.
    """
    table = dict(RULES)
    entries = []
    for name in names:
        if name is not None and name not in table:
            raise ValueError(f"{name!r} is no logical axis; known are {', '.join(table)}")
        entries.append(None if name is None else table[name])
    used: list[str] = []
    for entry in entries:
        used += [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
    if len(used) != len(set(used)):
        raise ValueError(f"{names} -> {entries}: a mesh axis is used twice")
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """`spec` on a mesh."""
    return NamedSharding(mesh, spec(*names))


def tree_shardings(mesh: Mesh, abstract: Any) -> Any:
    """Shardings for a tree of (boxed) abstract arrays, from the logical names that their boxes carry."""

    def place(leaf: PartitionSpec) -> NamedSharding:
        return sharding(mesh, *leaf)

    specs = nn.get_partition_spec(abstract)
    return jax.tree.map(place, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def several_devices() -> AbstractMesh | None:
    """The mesh that is set, where it has several devices; None on one, or where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical names; nothing happens where no mesh is set."""
    if several_devices() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))
