"""Attributes: which ones count, which numbers they get, and what an item's vector is made of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from dynrec_jax.errors import ConfigError
from dynrec_jax.models.towers import attributes


def read(job: Any) -> Any:
    (tower,) = attributes.read(job)
    return tower


def values(job: Any) -> list[list[int]]:
    (found,) = read(job).values.values()
    assert found.array.dtype == np.int32
    return [[int(value) for value in row if value] for row in found.array]


def test_a_text_column_with_a_separator_is_several_attributes(job):
    # x is in a, c and d, y in a, b and d; z is in b alone and left out; blanks and repetition do not count.
    assert values(job(item__attributes=("genres:,",))) == [[1, 2], [2], [1], [1, 2], [], []]


def test_a_text_column_without_one_is_one_attribute(job):
    # "x, y" as a whole is shared by a and d.
    assert values(job(item__attributes=("genres",))) == [[1], [], [], [1], [], []]


def test_a_column_of_sets(job):
    tower = read(job(item__attributes=("tags",)))
    assert tower.name == "attributes0_tags"
    assert tower.shapes == (("attributes:tags", 2, "int32"),)
    assert values(job(item__attributes=("tags",))) == [[1, 2], [2], [], [1], [], []]


def test_several_columns_are_several_towers(job):
    found = list(attributes.read(job(item__attributes=("tags", "genres:,"))))
    assert [tower.name for tower in found] == ["attributes0_tags", "attributes1_genres"]
    assert [tower.make(4, jnp.float32).size for tower in found] == [2, 2]


def test_new_items_have_the_datasets_numbers_and_none_of_their_own(job, shop):
    new = pa.table(
        {"index": [7, 8, 9], "item_id": ["g", "h", "i"], "genres": ["y, never", "never,never", None]}
    )
    # "never" is shared by two new items, and still unknown; as many columns as the dataset's.
    tower = read(job(new, item__attributes=("genres:,",)))
    assert values(job(new, item__attributes=("genres:,",))) == [[2], [], []]
    assert tower.shapes == read(job(item__attributes=("genres:,",))).shapes
    assert values(job(new.drop_columns("genres"), item__attributes=("genres:,",))) == [[], [], []]


def test_words_of_items_that_training_does_not_see_are_unused(job):
    """x is number 1, in a, c and d; y is 2, in a, b and d."""
    tower = read(job(item__attributes=("genres:,",)))

    def unused(unseen: str) -> list[bool]:
        return tower.unused(np.array([item not in unseen for item in "abcdef"]))["embedding"].tolist()[1:]

    assert unused("") == [False, False]
    assert unused("ad") == [False, False]
    assert unused("acd") == [True, False]
    assert unused("abd") == [False, True]


def test_a_word_without_a_vector_says_nothing():
    module = attributes.AttributeTower("a", 2, 2, jnp.float32)
    table = jnp.array([[9.0, 9.0], [1.0, 2.0], [0.0, 0.0]])
    v, there = module.apply({"params": {"embedding": table}}, {"a": jnp.array([[1, 2], [2, 0]])})
    np.testing.assert_allclose(v, [[1, 2], [0, 0]], rtol=1e-6)
    assert there[:, 0].tolist() == [True, False]


def test_nothing_of_items_times_attributes_times_width_is_held():
    items, most, dim = 4096, 32, 16
    module = attributes.AttributeTower("a", 50, dim, jnp.float32)
    params = {"embedding": jnp.ones((51, dim))}

    def loss(params: Any, ids: Any) -> Any:
        return jnp.sum(module.apply({"params": params}, {"a": ids})[0] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.ones((items, most), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * items * dim * 4  # and not 32 times and more


def test_the_first_ones_are_looked_at(job, monkeypatch):
    monkeypatch.setattr(attributes, "MOST", 1)
    assert values(job(item__attributes=("genres:,",))) == [[1], [2], [1], [1], [], []]


@pytest.mark.parametrize(
    ("column", "named"),
    [("colour", "no item column 'colour'; found"), ("more", "no value of item column 'more'")],
)
def test_refused(column, named, job):
    with pytest.raises(ConfigError, match=named):
        read(job(item__attributes=(column,)))


def test_the_vector_is_the_sum_over_the_root_of_the_number():
    module = attributes.AttributeTower("a", 3, 2, jnp.float32)
    table = jnp.array([[9.0, 9.0], [1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
    ids = jnp.array([[1, 2, 0], [3, 0, 0], [0, 0, 0], [1, 2, 3]])
    v, there = module.apply({"params": {"embedding": table}}, {"a": ids})
    by_hand = [[4 / 2**0.5, 1 / 2**0.5], [0.5, 0.5], [0, 0], [4.5 / 3**0.5, 1.5 / 3**0.5]]
    np.testing.assert_allclose(v, by_hand, rtol=1e-6)
    assert there[:, 0].tolist() == [True, True, False, True]
