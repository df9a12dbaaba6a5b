"""Bytes of collectives: groups, kinds, slices, loops, and what several instructions say of one transfer."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynrec_jax.compile import hlo
from dynrec_jax.compile.collectives import groups_of, traffic
from dynrec_jax.compile.scopes import expected_trips

from .. import tiny


def read(*lines: str) -> hlo.Module:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def sent(module: hlo.Module, slices: list[int]):
    return traffic(module, expected_trips({}), slices)


ROWS, COLUMNS = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ROWS),
        ("replica_groups={}", [list(range(8))]),
        ("replica_groups=[2,4]<=[8]", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ROWS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", COLUMNS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ROWS),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]]),
    ],
)  # fmt: skip
def test_groups_are_read_however_they_are_written(text: str, groups: list[list[int]]):
    (one,) = read(
        f"ROOT %a = f32[8]{{0}} all-gather(%x), channel_id=1, {text}, dimensions={{0}}"
    ).computations.values()
    assert groups_of(one.root, 8) == groups


def test_groups_that_cannot_be_read_are_no_guess():
    (one,) = read("ROOT %a = f32[8]{0} all-gather(%x), replica_groups=new_form(3)").computations.values()
    with pytest.raises(ValueError, match="cannot be read"):
        groups_of(one.root, 8)


def test_results_count_within_and_between_slices_and_wires_by_the_group():
    module = read(
        "%x = f32[8]{0} parameter(0)",
        "%r = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add",
        "%s = f32[8]{0} all-reduce(%r), replica_groups={{0,2},{1,3}}, to_apply=%add",
        "%t = (f32[4]{0}, bf16[2]{0}) all-to-all(%s, %s), replica_groups=[1,4]<=[4]",
        "ROOT %u = f32[2]{0} reduce-scatter(%t), replica_groups=[2,2]<=[4], dimensions={0}",
    )
    found = sent(module, [0, 0, 1, 1])
    assert found.within == {"all-reduce": 32, "reduce-scatter": 8}
    assert found.between == {"all-reduce": 32, "all-to-all": 20}
    # Two take part: an all-reduce sends all of it once, and what is reduced and scattered is one half.
    assert found.wire_within == 32 + 8
    assert found.wire_between == 32 + 20 * 3 / 4
    assert sent(module, [0, 0, 0, 0]).between == {}


def test_what_starts_and_what_waits_count_once():
    module = read(
        "%x = f32[8]{0} parameter(0)",
        "%g = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}",
        "%h = f32[32]{0} all-gather-done(%g)",
        "%p = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,2}}",
        "%q = f32[8]{0} collective-permute-done(%p)",
        "%r = f32[8]{0} all-reduce-start(%x), replica_groups=[1,4]<=[4], to_apply=%add",
        "ROOT %s = f32[8]{0} all-reduce-done(%r)",
    )
    assert sent(module, [0] * 4).within == {"all-gather": 128, "collective-permute": 32, "all-reduce": 32}


def test_a_collective_spread_over_a_chain_of_fusions_counts_once():
    fusions = "".join(
        f"%f{n} (p{n}: f32[8]) -> f32[32] {{\n  %p{n} = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %g{n} = f32[32]{{0}} all-gather(%p{n}), channel_id={channel}, replica_groups=[1,4]<=[4], "
        f'dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}\n}}\n'
        for n, (channel, chain) in enumerate([(9, 0), (9, 0), (9, 1), (5, 0)])
    )
    calls = "\n".join(f"  %c{n} = f32[32]{{0}} fusion(%x), kind=kLoop, calls=%f{n}" for n in range(4))
    text = (
        f"{fusions}ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %x = f32[8]{{0}} parameter(0)\n{calls}\n}}\n"
    )
    assert sent(hlo.parse(text), [0] * 4).within == {"all-gather": 3 * 128}
    assert sent(hlo.parse(text.replace("chain_id", "other")), [0] * 4).within == {"all-gather": 4 * 128}


def test_what_is_handed_to_the_host_goes_between_slices():
    module = read(
        "%x = f32[8]{0} parameter(0)",
        "%a = token[] after-all()",
        "%s = (f32[8]{0}, u32[], token[]) send(%x, %a), channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
        "%d = token[] send-done(%s), channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
        "%r = (f32[8]{0}, u32[], token[]) recv(%a), channel_id=4, is_host_transfer=true",
        "ROOT %o = (f32[8]{0}, u32[], token[]) send(%x, %a), channel_id=5, is_host_transfer=true",
    )
    found = sent(module, [0, 1])
    assert (found.within, found.between, found.wire_between) == ({}, {"send": 32}, 32)


@pytest.mark.parametrize("slices", [1, 2])
def test_real_collectives_of_a_mesh(slices: int):
    """A gather over all but one axis, and a sum over the last, three times: the compiler's own text."""
    mesh = tiny.mesh(4 // slices, 1, 2, slices=slices)
    rows = ("slice", "data")

    def gathered_and_summed(x: jax.Array) -> jax.Array:
        x = jax.lax.all_gather(x, rows, tiled=True)
        return jax.lax.fori_loop(0, 3, lambda _, c: jnp.sin(jax.lax.psum(c, "tensor")), x)

    f = jax.shard_map(
        gathered_and_summed,
        mesh=mesh,
        in_specs=PartitionSpec(rows),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    where = NamedSharding(mesh, PartitionSpec(rows))
    text = jax.jit(f).lower(jax.ShapeDtypeStruct((64,), jnp.float32, sharding=where)).compile().as_text()
    found = sent(hlo.parse(text), [device * slices // 8 for device in range(8)])
    gathered = {"all-gather": 256}
    assert found.within == {"all-reduce": 3 * 256, **(gathered if slices == 1 else {})}
    assert found.between == ({} if slices == 1 else gathered)
