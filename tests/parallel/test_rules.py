"""From logical names to mesh axes."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from dynrec_jax.parallel import rules

from .. import tiny


def test_names_become_mesh_axes():
    assert rules.spec("batch", None) == PartitionSpec(("slice", "data", "fsdp"), None)
    assert rules.spec("items", None) == PartitionSpec(("data", "fsdp", "tensor"), None)
    assert rules.spec("embed", "heads", "head_dim") == PartitionSpec("fsdp", "tensor", None)
    assert rules.spec() == PartitionSpec()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'wheels' is no logical axis; known are batch, items"):
        rules.spec("batch", "wheels")


@pytest.mark.parametrize(
    "names", [("batch", "items"), ("heads", "hidden"), ("items", "heads"), ("items", "embed")]
)
def test_a_mesh_axis_is_never_used_twice(names: tuple[str, str]):
    with pytest.raises(ValueError, match="a mesh axis is used twice"):
        rules.spec(*names)


def test_rows_of_a_table_lie_on_all_devices():
    mesh = tiny.mesh(2, 2, 2)
    table = jax.device_put(jnp.zeros((16, 3)), rules.sharding(mesh, "items", None))
    assert {shard.data.shape for shard in table.addressable_shards} == {(2, 3)}
    assert len({shard.index[0].start for shard in table.addressable_shards}) == 8
    # Rows ascend with the device's place along ITEM_AXES: what the streams number their rows by.
    order = {shard.device: shard.index[0].start for shard in table.addressable_shards}
    assert [order[device] for device in mesh.devices.reshape(-1)] == list(range(0, 16, 2))


def test_a_tree_takes_its_places_from_its_boxes():
    mesh = tiny.mesh(2, 2, 2)
    tree = {
        "kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 4), jnp.float32), ("embed", "hidden")),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    placed = rules.tree_shardings(mesh, tree)
    assert placed["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert placed["count"].is_fully_replicated


def test_constrain_places_on_a_mesh_and_does_nothing_without():
    x = jnp.zeros((8, 3))
    assert rules.constrain(x, "batch", None) is x
    with jax.set_mesh(tiny.mesh(1, 1, 1)):
        assert rules.constrain(x, "batch", None) is x
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        y = jax.jit(lambda x: rules.constrain(x + 1, "batch", None))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3)}
