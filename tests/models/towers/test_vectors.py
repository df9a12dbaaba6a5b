"""Dense vectors: centred by the dataset's own, zeros are none, and what is no column of vectors is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.models.towers import vectors

MEAN = [1.0, 1.0]  # of a, b and c; e's zeros are no vector


def rows(tower: Any) -> np.ndarray:
    (found,) = tower.values.values()
    return found.rows(np.arange(len(found.array) + (0 if found.more is None else len(found.more))))


def read(job: Any) -> Any:
    (tower,) = vectors.read(job)
    return tower


def new(v: Any) -> pa.Table:
    kind = pa.list_(pa.float32())
    return pa.table({"index": [7, 8], "item_id": ["g", "h"], "v": pa.array(v, kind)})


def test_they_are_centred_and_zeros_stay_zero(job):
    tower = read(job(item__vectors=("v",)))
    assert (tower.name, tower.shapes) == ("vector0_v", (("vector:v", 2, "float32"),))
    np.testing.assert_allclose(rows(tower), [[0, 1], [2, -1], [-2, 0], [0, 0], [0, 0], [0, 0]], atol=1e-6)


def test_new_items_are_centred_by_the_datasets_mean(job):
    own, later = read(job(item__vectors=("v",))), read(job(new([[5.0, 5.0], None]), item__vectors=("v",)))
    np.testing.assert_allclose(rows(later), [[4, 4], [0, 0]])
    both = rows(own.followed_by(later))
    np.testing.assert_allclose(both, np.concatenate([rows(own), rows(later)]))


def test_new_items_without_the_column_have_none(job):
    for items in (new([None, None]), new([None, None]).drop_columns("v")):
        assert rows(read(job(items, item__vectors=("v",)))).tolist() == [[0, 0], [0, 0]]


def test_new_items_with_vectors_of_another_length_are_refused(job):
    with pytest.raises(DataError, match=r"'v' have 3 numbers; expected 2"):
        read(job(new([[1.0, 2.0, 3.0], None]), item__vectors=("v",)))


def test_vectors_of_two_lengths_are_refused(job):
    with pytest.raises(DataError, match=r"'v': a vector of 1 numbers \(item g\), and others of 2"):
        read(job(new([[1.0], [1.0, 2.0]]), item__vectors=("v",)))


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ("nothing", r"no item column 'nothing'; found .*genres"),
        ("title", "item column 'title' is string; expected lists of numbers"),
        ("tags", "item column 'tags' is list"),
        ("numbers", "item column 'numbers' is list"),  # whole numbers are names of things
        ("one", "item column 'one' holds one number an item; expected vectors of two"),
    ],
)
def test_what_holds_no_vectors_is_refused(column, named, job):
    with pytest.raises(ConfigError, match=f"config.item.vectors: .*{named}"):
        read(job(item__vectors=(column,)))


def test_the_tower_normalises_and_maps():
    module = vectors.VectorTower("v", 4, jnp.float32)
    x = jnp.array([[3.0, 1.0, -1.0], [0.0, 0.0, 0.0], [6.0, 2.0, -2.0]])
    kernel = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    params = {"norm": {"scale": jnp.array([1.0, 2.0, 1.0]), "bias": jnp.array([0.0, 0.5, 0.0])}}
    params["project"] = {"kernel": kernel}
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(module.init, jax.random.key(0), {"v": x})["params"])
    assert jax.tree.leaves(shapes)
    assert set(shapes) == {"norm", "project"}
    v, there = module.apply({"params": params}, {"v": x})
    each = np.array([3.0, 1.0, -1.0])
    normal = (each - each.mean()) / each.std()
    by_hand = (normal * [1, 2, 1] + [0, 0.5, 0]) @ kernel / 2
    np.testing.assert_allclose(v[0], by_hand, rtol=1e-4)
    np.testing.assert_allclose(v[2], v[0], rtol=1e-4)  # its length says nothing
    assert not v[1].any()
    assert there[:, 0].tolist() == [True, False, True]
