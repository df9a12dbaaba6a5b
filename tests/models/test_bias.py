"""Buckets of gaps in time, and tables that are looked up without a lookup, against what is written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.models import bias as module
from dynrec_jax.models.bias import time_bucket

from .test_attention import BUCKETS, bucket_of, table_of


@pytest.mark.parametrize("buckets", [1, 10, 32, 64])
def test_buckets_are_the_documented_formula(buckets: int):
    powers = 2 ** np.arange(31)
    gaps = np.unique([0, *powers, *(powers - 1), *np.geomspace(1, 2**24, 400).astype(int), 2**31 - 200])
    found = np.asarray(time_bucket(jnp.asarray(gaps, jnp.int32), buckets))
    exact = gaps < 2**24 - 1  # larger ones are rounded to 24 bits first
    assert found[exact].tolist() == [bucket_of(int(gap), buckets) for gap in gaps[exact]]
    true = buckets * np.log2(gaps + 1.0) / 32
    below = true - found
    assert (below > -1e-6).all()
    assert (below < 1 + 0.15 * buckets / 32).all()
    assert (np.diff(found) >= 0).all()
    assert int(time_bucket(jnp.int32(2**31 - 1), buckets)) == 31 * buckets // 32
    if buckets == 32:
        assert np.asarray(time_bucket(jnp.asarray(powers - 1, jnp.int32), 32)).tolist() == list(range(31))
    if buckets >= 32:
        assert found[gaps == 0] < found[gaps == 1], "a tie is apart from a second"


def test_a_product_with_ones_is_a_lookup_and_its_gradient():
    rng = np.random.default_rng(0)
    table = jnp.asarray(table_of(0))
    bucket = jnp.asarray(rng.integers(0, BUCKETS, (3, 5, 6)), jnp.int32)
    looked_up = np.asarray(table)[:, np.asarray(bucket)].swapaxes(0, 1)
    for function in (module._multiplied, module._looked_up):
        np.testing.assert_allclose(function(table, bucket), looked_up, rtol=1e-6)
    ds = rng.normal(size=looked_up.shape).astype(np.float32)
    expected = np.zeros(table.shape)
    for b, h, q, k in np.ndindex(*ds.shape):
        expected[h, bucket[b, q, k]] += ds[b, h, q, k]
    for function in (module._ones_product, module._added):
        np.testing.assert_allclose(function(jnp.asarray(ds), bucket, BUCKETS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "ahead", "distances"), [(5, 9, 4, 6), (4, 4, 0, 9), (3, 7, -2, 4)]
)
def test_distances_are_those_of_a_lookup_for_each_pair(queries: int, keys: int, ahead: int, distances: int):
    table = table_of(0, distances)
    apart = np.abs(ahead + np.arange(queries)[:, None] - np.arange(keys))
    expected = table[:, np.minimum(apart, distances - 1)]
    run = jax.jit(module._by_distance, static_argnums=1)
    np.testing.assert_array_equal(run(table, (queries, keys), ahead), expected)
    ds = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    gradient = np.zeros(table.shape)
    for h, q, k in np.ndindex(*ds.shape):
        gradient[h, min(apart[q, k], distances - 1)] += ds[h, q, k]
    found = jax.jit(module._to_distance, static_argnums=1)(ds, distances, ahead)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5)
