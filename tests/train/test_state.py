"""An abstract state is the state's shapes and places; tables that cannot fit are refused with the numbers."""

import jax
import numpy as np
import optax
import pytest

from dynrec_jax.errors import ConfigError
from dynrec_jax.models.model import make_bstm
from dynrec_jax.parallel import mesh as meshes
from dynrec_jax.parallel.rows import lazy_adam, rowwise_adagrad
from dynrec_jax.train import loop
from dynrec_jax.train.state import (
    Given,
    abstract_state,
    average_decay,
    check_tables,
    fresh_state,
    init_state,
    table_bytes,
)

from .. import described, tiny

ITEMS = 300  # 512 rows of 8 float32 numbers


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_an_abstract_state_has_the_shapes_and_places_of_the_real_one(kind: str):
    model, mesh = make_bstm(tiny.config(loss__kind=kind), ITEMS), tiny.mesh(2, 2, 2)
    arguments = model, optax.adam(1e-3), lazy_adam(), mesh
    abstract, shardings = abstract_state(*arguments)
    real, real_shardings = init_state(*arguments, seed=0)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert shardings == real_shardings
    for shape, x in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (x.shape, x.dtype, x.sharding)


def test_bytes_of_tables_are_those_of_one_device():
    adam = abstract_state(
        make_bstm(tiny.config(), ITEMS), optax.adam(1e-3), rowwise_adagrad(), tiny.mesh(2, 2, 2)
    )[0]
    assert table_bytes(adam) == 3 * 512 * 8 * 4 // 8  # the table and two moments
    config = tiny.config(loss__kind="sampled")
    rows = abstract_state(
        make_bstm(config, ITEMS), optax.adam(1e-3), rowwise_adagrad(), tiny.mesh(2, 1, 1, slices=2)
    )
    assert (
        table_bytes(rows[0]) == (512 * 8 * 4 + 512 * 4) // 2
    )  # half of it in each slice, and a number a row


def test_a_table_that_cannot_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch):
    mesh = tiny.mesh(2, 1, 1)
    state, _ = abstract_state(make_bstm(tiny.config(), ITEMS), optax.adam(1e-3), rowwise_adagrad(), mesh)
    needed = 3 * 512 * 8 * 4 // 2
    check_tables(state, ITEMS, mesh, needed)
    told = "300 items of 8 float32 numbers .* on each of 2 devices, .* need 4 devices, or at most 299 items"
    with pytest.raises(ConfigError, match=told):
        check_tables(state, ITEMS, mesh, needed - 1)
    loop.check_fits(tiny.config(), ITEMS, mesh)
    monkeypatch.setattr(loop, "device_memory", lambda: 1000)
    others = [{"item__fusion": each, "item__attributes": ("a",)} for each in ("both", "ensemble")]
    for changes in ({}, *others):
        with pytest.raises(ConfigError, match="on each of 2 devices"):
            loop.check_fits(tiny.config(**changes), ITEMS, mesh)
    loop.check_fits(tiny.config(item__fusion="text", item__attributes=("a",)), ITEMS, mesh)  # no table of ids


def test_words_that_no_seen_item_has_start_as_zeros():
    config, mesh = tiny.config(item__fusion="ensemble", item__attributes=("a",)), tiny.mesh(2, 1, 1)
    tower = described.attribute_tower(ITEMS)
    arguments = make_bstm(config, ITEMS, [tower]), optax.adam(1e-3), lazy_adam(), mesh
    unused = np.arange(201) % 3 == 0
    _, shardings = abstract_state(*arguments)
    given = Given(unused={tower.name: {"embedding": unused}})
    made = fresh_state(*arguments, 0, shardings, given)
    plain = fresh_state(*arguments, 0, shardings)
    table = made.params["text"]["item"][tower.name]["embedding"]
    np.testing.assert_array_equal(np.any(np.asarray(table) != 0, axis=1), ~unused)
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), made.params, plain.params)
    assert sum(not each for each in jax.tree.leaves(same)) == 1


def test_simulated_devices_share_the_memory_of_the_machine():
    assert meshes.device_memory() * 8 <= meshes.os.sysconf("SC_PHYS_PAGES") * meshes.os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_the_average_is_kept_by_default_where_a_step_passes_over_the_whole_table_anyway():
    found = {kind: average_decay(tiny.config(loss__kind=kind)) for kind in ("full", "sampled", "gbce")}
    assert found == {"full": 0.99, "sampled": 0.0, "gbce": 0.0}
    for given in (0.0, 0.5):
        for kind in found:
            assert average_decay(tiny.config(loss__kind=kind, train__average=given)) == given
