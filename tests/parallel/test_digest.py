"""The digest: the same for any sharding, another for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynrec_jax.parallel.digest import digest, digests, tree_digest
from dynrec_jax.parallel.mesh import make_mesh


def mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_the_first_lane_is_the_sum_of_mixed_places_and_bits():
    """Element by element, in Python's own integers."""
    x = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    total = 0
    for row in range(3):
        for column, value in enumerate(x[row].reshape(-1)):
            place = mix((mix((row + 0x9E3779B9) % 2**32) + column) % 2**32)
            total += mix(int(np.asarray(value).view(np.uint32)) ^ place)
    assert int(digest(jnp.asarray(x))[0]) == total % 2**32


@pytest.mark.parametrize("spec", [(("data", "fsdp", "tensor"), None), ("data", "tensor"), (None, "fsdp")])
def test_it_does_not_depend_on_how_an_array_lies(spec: tuple):
    x = jax.random.normal(jax.random.key(0), (16, 8))
    placed = jax.device_put(x, NamedSharding(make_mesh(2, 2, 2), PartitionSpec(*spec)))
    np.testing.assert_array_equal(jax.jit(digest)(placed), digest(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_flipped_bit_is_seen(dtype: str):
    x = np.asarray(jnp.asarray(np.random.default_rng(1).integers(0, 2, 64), dtype))
    run = jax.jit(digest)
    before = np.asarray(run(x))
    random = np.random.default_rng(2)
    for _ in range(40):
        changed = x.copy()
        if dtype == "bool":
            changed[random.integers(64)] ^= True
        else:
            changed.view(np.uint8)[random.integers(x.nbytes)] ^= np.uint8(1 << random.integers(8))
        assert (np.asarray(run(changed)) != before).any()


def test_swapped_elements_and_rows_are_seen():
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    before = np.asarray(digest(jnp.asarray(x)))
    assert (np.asarray(digest(jnp.asarray(x[[1, 0, 2, 3]]))) != before).any()
    assert (np.asarray(digest(jnp.asarray(x[:, [1, 0, 2]]))) != before).any()


def test_arrays_are_digested_together_wherever_they_lie():
    mesh = make_mesh(2, 2, 2)
    arrays = [np.arange(16, dtype=np.float32).reshape(8, 2), np.int32(7), np.ones((2, 2, 2), np.uint8)]
    alone = [np.asarray(digest(jnp.asarray(x))).astype(">u4").tobytes().hex() for x in arrays]
    assert digests(arrays) == alone
    specs = [PartitionSpec(("data", "fsdp"), "tensor"), PartitionSpec(), PartitionSpec("data")]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    assert digests(placed) == alone
    assert digests([]) == []


@pytest.mark.parametrize("spec", [(), (("data", "fsdp", "tensor"),)])
def test_it_needs_no_memory_of_the_size_of_the_array(spec: tuple):
    x = jax.ShapeDtypeStruct(
        (65536, 8), jnp.float32, sharding=NamedSharding(make_mesh(2, 2, 2), PartitionSpec(*spec))
    )
    needed = jax.jit(digest).lower(x).compile().memory_analysis()
    assert needed.temp_size_in_bytes < 10_000
    assert needed.output_size_in_bytes == 16


def test_a_tree_has_one_digest():
    tree = {"a": jnp.arange(3), "b": jnp.float32(2)}
    assert tree_digest(tree) == tree_digest(dict(tree))
    assert tree_digest(tree) != tree_digest({**tree, "b": jnp.float32(3)})


def test_elements_of_eight_bytes_are_refused():
    with pytest.raises(ValueError, match="1, 2 or 4 bytes"):
        digest(jax.random.key(0))
