"""Programs compiled for TPUs by their own compiler: no TPU is needed, libtpu is."""

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynrec_jax import cli
from dynrec_jax.compile.measure import Program, measure
from dynrec_jax.compile.plan import checked_plan
from dynrec_jax.compile.programs import table_program
from dynrec_jax.compile.topology import open_target

from ..commands import experiment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)

ROWS, DIM, IDS = 2**18, 128, 256
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def numbers(update: Any, rows: int = ROWS) -> dict[str, Any]:
    """Of a program on v5e:2x2: a table over four chips, and ids that all have."""
    target = open_target("v5e:2x2", 1)
    mesh = Mesh(np.array(target.devices), ("x",))
    table = NamedSharding(mesh, PartitionSpec("x"))
    step = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(PartitionSpec("x"), PartitionSpec()),
            out_specs=(PartitionSpec("x"), PartitionSpec()),
            check_vma=False,
        ),
        donate_argnums=0,
    )
    traced = step.trace(
        jax.ShapeDtypeStruct((rows, DIM), jnp.float32, sharding=table),
        jax.ShapeDtypeStruct((IDS,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())),
    )
    program = Program("update", traced.lower(), traced.jaxpr, "float32", {"rounds": 2.5})
    return measure(program, target, [0] * 4)


def in_place(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows are summed over the chips: once, three times, and as often as it takes."""

    def summed(_: Any, c: jax.Array) -> jax.Array:
        return jnp.sin(jax.lax.psum(c, "x"))

    c = jax.lax.psum(table[ids], "x")
    c = jax.lax.fori_loop(0, 3, summed, c)
    with jax.named_scope("rounds"):
        c = jax.lax.fori_loop(0, ids[0], summed, c)
    return table.at[ids].add(c), c @ c.T


def test_numbers_of_a_small_program():
    found = numbers(in_place)
    shard = ROWS // 4 * DIM * 4
    assert found["fits"]
    assert found["memory_bytes"] == int(15.75 * 2**30)
    assert found["argument_bytes"] == shard + IDS * 4
    assert found["aliased_bytes"] == shard
    assert found["peak_bytes"] > shard
    # 1 + 3 + 2.5 sums of [256, 128] float32; the loop of three has no noted length on TPUs.
    assert found["collective_bytes"] == {"within": {"all-reduce": 6.5 * IDS * DIM * 4}, "between": {}}
    assert found["flops"] == 2 * IDS * IDS * DIM
    table = f"f32[{ROWS // 4},{DIM}]"
    listed = [each["shape"] for each in found["largest_arrays"] + found["largest_fast_arrays"]]
    assert table not in listed
    assert f"f32[{IDS},{DIM}]" in listed
    assert found["reason"] == ""


def test_a_program_that_is_too_large_does_not_fit_and_has_numbers_all_the_same():
    rows = 2**26  # 8 GiB on each chip, and a sorted copy of them

    def copies(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        new, _ = in_place(table, ids)
        return new, jnp.sort(table, axis=1)[ids]

    found = numbers(copies, rows)
    shard = rows // 4 * DIM * 4
    assert not found["fits"]
    assert found["room_bytes"] < 0
    assert found["argument_bytes"] == shard + IDS * 4
    assert (found["largest_arrays"][0]["shape"], found["largest_arrays"][0]["bytes"]) == (
        f"f32[{rows // 4},{DIM}]",
        shard,
    )
    assert "RESOURCE_EXHAUSTED" in found["reason"]
    assert found["collective_bytes"]["within"]["all-reduce"] > 0


@pytest.mark.slow
def test_the_whole_verb_on_two_slices(tmp_path):
    """All programs of a small plan: what goes between slices is handed to the hosts, and no table is held twice."""
    out, rows, chips = tmp_path / "plan.json", 768, 4
    keys = {"data__items": 600, "loss__kind": "sampled", "model__backward_weight": 0.0}
    settings = experiment(tmp_path / "x.py", Path(), **keys)
    flags = [f"--config={settings}", "--topology=v5e:2x2", "--slices=2", f"--out={out}"]
    assert cli.main(["compile", *flags]) == 0
    plan = json.loads(out.read_text())
    assert (plan["devices"], plan["slices"], plan["mesh"]["slice"]) == (2 * chips, 2, 2)
    for each in (plan, plan["table"], plan["score"]["encode"], plan["score"]["rank"]):
        assert each["fits"]
        assert each["loops_counted_once"] == []
        assert f"f32[{rows // chips},8]" not in [array["shape"] for array in each["largest_arrays"]]
        assert each["collective_bytes"]["between"].keys() <= {"send"}
    assert plan["table"]["collective_bytes"]["between"]["send"] > 0
    assert plan["table"]["collective_bytes"]["within"]["all-to-all"] > 0


def rows_of_a_step(
    batch: int, topology: str, slices: int, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    config.train.batch_size = batch
    target = open_target(topology, slices)
    plan, at = checked_plan(config, target)
    found = measure(table_program(plan), target, at)
    sent = sum(sum(kinds.values()) for kinds in found["collective_bytes"].values())
    return {**found, "sent": sent}


@pytest.mark.slow
def test_what_a_pod_moves_for_its_tables_is_small_and_hardly_grows_with_the_pod():
    mib = 2**20
    hundred, billion = (
        runpy.run_path(str(EXPERIMENTS / name))["get_config"]() for name in ("pod_100m.py", "pod_1b.py")
    )
    few = rows_of_a_step(256, "v5e:4x4", 1, hundred)
    many = rows_of_a_step(4_096, "v5e:16x16", 1, hundred)
    two = rows_of_a_step(8_192, "v5e:16x16", 2, billion)
    for found in (many, two):
        assert found["fits"]
        assert found["sent"] <= 8 * mib
        assert found["temporary_bytes"] <= 16 * mib
    assert many["sent"] <= 1.3 * few["sent"]
