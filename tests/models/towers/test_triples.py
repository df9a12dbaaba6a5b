"""A knowledge graph: neighbours along triples and against them, worked out by hand."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from dynrec_jax.config import default_config
from dynrec_jax.errors import ConfigError
from dynrec_jax.models.towers import triples
from dynrec_jax.models.towers.kinds import read_towers
from dynrec_jax.models.towers.tower import Job

from ... import described

# What an item is related to, and something else too: glass and d know a alone, c nobody but red.
WORDS = ["a", "b", "lamp", "red"]
KINDS = ["+colour", "+kind", "+like", "+made", "-colour", "-kind", "-like", "-made"]


def read(job: Any) -> Any:
    (tower,) = triples.read(job)
    return tower


def neighbours(tower: Any) -> list[list[tuple[str, str]]]:
    (found,) = tower.values.values()
    pairs = found.array.reshape(len(found.array), -1, 2)
    return [[(KINDS[k - 1], WORDS[w - 1]) for k, w in row if w] for row in pairs.tolist()]


def test_neighbours_in_both_directions_the_rare_ones_first(job):
    """How many see each: a 5 (red, lamp and glass back, d, b), red 2, lamp 2, b 2, d 1, c 1, glass 1."""
    tower = read(job(item__triples=True))
    module = tower.make(4, jnp.float32)
    assert (module.entities, module.relations) == (len(WORDS), len(KINDS))
    assert tower.shapes == (("triples", 2 * 3, "int32"),)
    assert neighbours(tower) == [
        [("-like", "b"), ("+kind", "lamp"), ("+colour", "red")],  # glass and d are related to a alone
        [("+kind", "lamp"), ("+like", "a")],
        [("+colour", "red")],
        [("+like", "a")],
        [],
        [],
    ]


def test_those_with_the_fewest_others_are_kept(job, monkeypatch):
    monkeypatch.setattr(triples, "MOST", 1)
    assert [row[:1] for row in neighbours(read(job(item__triples=True)))][:2] == [
        [("-like", "b")],
        [("+kind", "lamp")],
    ]


def test_new_items_that_the_graph_names(job):
    """`red` is an entity to the dataset; as a new item it has its neighbours."""
    new = pa.table({"index": [7, 8], "item_id": ["red", "stranger"]})
    assert neighbours(read(job(new, item__triples=True))) == [[("-colour", "a")], []]


def test_a_dataset_without_a_graph_is_refused(tmp_path, job):
    bare = described.dataset(tmp_path / "bare", ["u a b c"], [{"item_id": "a", "title": "x"}])
    asked = job(item__triples=True)
    with pytest.raises(
        ConfigError, match=r"config\.item\.triples: .* has no triples; prepare it with --triples"
    ):
        read(asked.__class__(asked.config, bare, bare.items_table()))


def test_words_of_items_that_training_does_not_see_are_unused(job):
    """Seen through a alone is b; through a and b, lamp; the rest of d's and c's."""
    tower = read(job(item__triples=True))

    def unused(*unseen: str) -> list[str]:
        rows = tower.unused(np.array([item not in unseen for item in "abcdef"]))["entity"]
        return [word for word, none in zip(WORDS, rows[1:], strict=True) if none]

    assert unused() == []
    assert unused("a") == ["b"]
    assert unused("a", "b") == ["b", "lamp"]
    assert unused("a", "c", "b", "d") == WORDS


def test_a_graph_in_which_nothing_is_shared_is_refused(tmp_path):
    log = ["u a b c", "v c b a"]
    rows = [{"item_id": item, "title": item} for item in "abc"]
    alone = described.dataset(tmp_path / "alone", log, rows, "a\tis\tred\nb\tis\tblue\n")
    config = default_config()
    config.item.triples = True
    with pytest.raises(ConfigError, match=r"config\.item\.triples: nothing in the triples .* leave them out"):
        read(Job(config, alone, alone.items_table()))


def test_the_vector_is_the_sum_of_neighbours_through_their_relations():
    module = triples.TripleTower(2, 2, 2, jnp.float32)
    entity = jnp.array([[9.0, 9.0], [1.0, 2.0], [3.0, -1.0]])
    relation = jnp.array([[9.0, 9.0], [1.0, -1.0], [2.0, 0.5]])
    flat = jnp.array([[1, 1, 2, 2], [2, 1, 0, 0], [0, 0, 0, 0]])
    v, there = module.apply({"params": {"entity": entity, "relation": relation}}, {"triples": flat})
    np.testing.assert_allclose(v, [[7 / 2**0.5, -2.5 / 2**0.5], [2, 1], [0, 0]], rtol=1e-6)
    assert there[:, 0].tolist() == [True, True, False]


def test_all_kinds_in_their_order_and_none_for_ids_alone(job):
    keys = {"item__triples": True, "item__attributes": ("tags",), "item__vectors": ("v",)}
    assert [t.name for t in read_towers(job(**keys))] == ["attributes0_tags", "vector0_v", "triples"]
    assert read_towers(job(item__fusion="id")) == []
