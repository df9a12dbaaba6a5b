"""Lists by a compressed model: what is offered is ranked again by exact vectors, as the model as it is would."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.neighbours import Neighbours
from dynrec_jax.errors import ConfigError
from dynrec_jax.evaluate.compressed import CompressedRecommender, Compression, candidates, check_processes
from dynrec_jax.evaluate.exact import ExactRows
from dynrec_jax.evaluate.recommender import Lists, NonFiniteScores, Recommender
from dynrec_jax.models.features import Items
from dynrec_jax.parallel.compressed import compressed
from dynrec_jax.parallel.processes import Processes
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import rows_for, rows_of

from .. import described, tiny

ITEMS, K = 25, 10
INT8 = Compression("int8")
USERS = np.array(
    [17, 3, 20, 0, 12, 15]
)  # histories of 1 to 15 events: two batches of four, programs of one width
DRAWN = {"model__neighbours": 1.0, "model__interests": 2, "model__shrinkage": 2.0, "model__normalise": True}
ENSEMBLE = {"item__fusion": "ensemble", "item__attributes": ("a",), "model__normalise": True}


def neighbours(seed: int = 3) -> Neighbours:
    rng = np.random.default_rng(seed)
    return Neighbours(
        np.stack([rng.permutation(ITEMS)[:3] + 1 for _ in range(ITEMS)]).astype(np.int32),
        rng.uniform(0.1, 1.0, (ITEMS, 3)).astype(np.float32),
        rng.integers(1, 9, ITEMS).astype(np.int32),
    )


def made(changes: dict[str, Any]) -> tuple[Items, Any, dict[str, Any]]:
    """Items, a model of them, and its variables."""
    items = Items(ITEMS, neighbours=neighbours())
    if "item__fusion" in changes:
        items = dataclasses.replace(items, towers=(described.attribute_tower(ITEMS),))
    model = items.model(tiny.config(**changes))
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))
    return items, model, {**variables, "params": tiny.shaken(variables["params"], scale=0.1)}


def lists(
    recommender: Recommender, variables: dict[str, Any], histories: Histories, users: np.ndarray = USERS
) -> Lists:
    maker = recommender.prepare(variables["params"], variables["tables"])
    return maker(histories, users, histories.lengths[users])


def same(found: Lists, exact: Lists) -> None:
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "devices", "table"),
    [
        pytest.param(DRAWN, 1, "int8", marks=pytest.mark.slow),
        (DRAWN, 8, "int8"),
        pytest.param(ENSEMBLE, 1, "bfloat16", marks=pytest.mark.slow),
    ],
    ids=["counts, interests, drawn vectors", "eight devices", "ensemble"],
)
def test_what_is_offered_is_ranked_as_the_model_ranks_it(
    changes: dict[str, Any], devices: int, table: str, histories: Histories, tmp_path: Path
):
    items, model, variables = made(changes)
    mesh, setting = tiny.mesh(devices, 1, 1), Compression(table)
    exact = lists(Recommender(model, mesh, 4, K, True, items=items), variables, histories)
    few = CompressedRecommender(
        model, mesh, 4, K, True, items=items, compression=setting, folder=tmp_path, offered=ITEMS
    )
    same(lists(few, variables, histories), exact)
    assert (exact.ids > 0).mean() > 0.9


def test_the_compressed_table_decides_what_is_offered_and_exact_scores_the_order(
    histories: Histories, tmp_path: Path
):
    items, model, variables = made({})
    few = CompressedRecommender(
        model, tiny.mesh(1, 1, 1), 4, K, False, items=items, compression=INT8, folder=tmp_path, offered=K
    )
    found = lists(few, variables, histories)
    whole = Recommender(model, tiny.mesh(1, 1, 1), 4, ITEMS, False, items=items)
    exact = lists(whole, variables, histories)
    table = variables["tables"]["item_id"]
    u = np.asarray(
        whole._encode(
            variables["params"], table, whole._history(histories, USERS, histories.lengths[USERS], 8)
        )[0]
    )
    small = compressed(table, "int8")
    rough = u @ (np.asarray(small.values, np.float32) * np.asarray(small.scales)[:, None])[1 : ITEMS + 1].T
    differ = 0
    for at in range(len(USERS)):
        offered = set((np.argsort(-rough[at], kind="stable")[:K] + 1).tolist())
        order = [item for item in exact.ids[at].tolist() if item in offered]
        assert found.ids[at].tolist() == order
        differ += order != (np.argsort(-rough[at], kind="stable")[:K] + 1).tolist()
        place = [exact.ids[at].tolist().index(item) for item in order]
        np.testing.assert_allclose(found.scores[at], exact.scores[at, place], rtol=2e-5, atol=2e-5)
    assert differ, "the table is too good to tell"


def test_what_counts_raise_is_ranked_again_though_the_table_did_not_offer_it(
    histories: Histories, tmp_path: Path
):
    items, model, variables = made({"model__neighbours": 30.0})
    mesh = tiny.mesh(1, 1, 1)
    exact = lists(Recommender(model, mesh, 4, 3, True, items=items), variables, histories)
    plain = lists(Recommender(made({})[1], mesh, 4, 3, True, items=items), variables, histories)
    assert (exact.ids != plain.ids).any(axis=1).sum() >= 3
    few = CompressedRecommender(
        model, mesh, 4, 3, True, items=items, compression=INT8, folder=tmp_path, offered=3
    )
    same(lists(few, variables, histories), exact)


def test_equal_items_rank_by_the_lowest_index(histories: Histories, tmp_path: Path):
    items, model, variables = made({})
    table = variables["tables"]["item_id"]
    equal = table[1 + jnp.arange(len(table)) % 3]
    few = CompressedRecommender(
        model, tiny.mesh(1, 1, 1), 4, ITEMS, True, items=items, compression=INT8, folder=tmp_path
    )
    found = lists(few, {**variables, "tables": {"item_id": equal}}, histories)
    for ids, scores in zip(found.ids, found.scores, strict=True):
        shown = [ids[(scores == score) & (ids > 0)].tolist() for score in dict.fromkeys(scores[ids > 0])]
        assert len(shown) <= 3
        assert all(each == sorted(each) for each in shown)
        assert sum(map(len, shown)) >= K


def test_the_mixture_of_the_compressed_table_refines_the_query(histories: Histories, tmp_path: Path):
    items, model, variables = made({"model__hops": 1})
    mesh = tiny.mesh(1, 1, 1)
    exact = lists(Recommender(model, mesh, 4, K, True, items=items), variables, histories)
    few = CompressedRecommender(
        model, mesh, 4, K, True, items=items, compression=INT8, folder=tmp_path, offered=ITEMS
    )
    found = lists(few, variables, histories)
    assert (exact.ids > 0).all()
    assert 0 < np.abs(found.scores - exact.scores).max() < 0.02


def test_no_array_of_the_tables_size_is_held_but_the_compressed_one(tmp_path: Path, histories: Histories):
    items, model, variables = made({"model__normalise": True})
    params, tables = variables["params"], jax.tree.map(jnp.array, variables["tables"])
    few = CompressedRecommender(
        model, tiny.mesh(1, 1, 1), 4, K, True, items=items, compression=INT8, folder=tmp_path
    )
    size = tables["item_id"].shape

    def held() -> list[str]:
        return sorted(str(x.dtype) for x in jax.live_arrays() if x.shape == size)

    before = held()
    maker = few.prepare(params, tables)
    tables["item_id"].delete()
    before.remove("float32")
    assert held() == sorted([*before, "int8"])
    maker(histories, USERS, histories.lengths[USERS])  # the deleted one is not missed
    assert held() == sorted([*before, "int8"])
    assert not list(tmp_path.iterdir()), "the file of exact rows has no name"


@pytest.mark.parametrize("bad", ["table", "encoder"])
def test_what_is_no_number_ends_in_an_error(bad: str, histories: Histories, tmp_path: Path):
    items, model, variables = made({})
    params, tables = variables["params"], variables["tables"]
    if bad == "table":
        tables = {"item_id": tables["item_id"].at[7, 0].set(np.nan)}
    else:
        norm = {**params["user"]["norm"], "scale": params["user"]["norm"]["scale"].at[0].set(np.inf)}
        params = {**params, "user": {**params["user"], "norm": norm}}
    few = CompressedRecommender(
        model, tiny.mesh(1, 1, 1), 4, K, True, items=items, compression=INT8, folder=tmp_path
    )
    with pytest.raises(NonFiniteScores):
        lists(few, {"params": params, "tables": tables}, histories)


@pytest.mark.slow
def test_an_encoder_that_is_compressed_changes_users_and_no_items(histories: Histories, tmp_path: Path):
    items, model, variables = made(ENSEMBLE)
    mesh, shared = tiny.mesh(1, 1, 1), {"items": items, "folder": tmp_path}
    exact = lists(Recommender(model, mesh, 4, K, False, items=items), variables, histories)
    setting = Compression(encoder="int8", prune=0.3)
    found = lists(
        CompressedRecommender(model, mesh, 4, K, False, compression=setting, **shared), variables, histories
    )
    assert 0.01 < np.abs(found.scores - exact.scores).max() < 2
    both = dataclasses.replace(setting, table="int8")
    again = CompressedRecommender(model, mesh, 4, K, False, compression=both, offered=ITEMS, **shared)
    same(lists(again, variables, histories), found)


@pytest.mark.parametrize(("items", "sizes"), [(300, (4, 1, 2)), (70_000, (8, 1, 1)), (70_000, (3, 1, 1))])
def test_exact_rows_are_those_of_their_items(items: int, sizes: tuple[int, int, int], tmp_path: Path):
    rows = rows_for(items)
    table = np.random.default_rng(0).normal(0, 1, (rows, 3)).astype(np.float32)
    where = sharding(tiny.mesh(*sizes), "items", None)
    exact = ExactRows(jax.device_put(table, where), tmp_path / "made")
    ids = np.array([[1, items, 0], [items // 2, 7, 4096]]) % (items + 1)
    np.testing.assert_array_equal(exact.rows(ids), table[rows_of(ids, rows)])
    assert not list((tmp_path / "made").iterdir())


def test_a_list_has_more_candidates_than_places_but_no_more_than_there_are_items():
    assert [candidates(k, 10_000) for k in (1, 10, 100)] == [33, 42, 200]
    assert candidates(100, 150) == 150


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"table": "int4"}, "--table=int4: expected one of float32, bfloat16, int8"),
        ({"encoder": "half"}, "--encoder=half: expected one of"),
        ({"prune": 1.0}, r"--prune=1.0: expected a share of the weights"),
        ({"prune": float("nan")}, r"--prune=nan: expected a share"),
    ],
)
def test_a_compression_that_there_is_not_is_refused(values: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        Compression(**values)


def test_several_processes_rank_no_compressed_table():
    several = Processes(0, 2)
    with pytest.raises(
        ConfigError, match="--table=int8: is ranked by one process, and this is one of several"
    ):
        check_processes(INT8, several)
    check_processes(INT8, Processes())
    check_processes(Compression(encoder="int8", prune=0.5), several)
