"""HLO text: types, instructions and computations, as XLA writes them."""

import pytest

from dynrec_jax.compile import hlo

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

FileNames
1 "/somewhere/f.py"

%body_of_fusion (param_0.1: f32[4,8]) -> f32[4,8] {
  %param_0.1 = f32[4,8]{1,0} parameter(0)
  ROOT %neg.2 = f32[4,8]{1,0} negate(%param_0.1)
}

ENTRY %main.7_spmd (x.1: f32[4,8]) -> (f32[4,8], /*index=1*/s32[]) {
  %x.1 = f32[4,8]{1,0} parameter(0), sharding={replicated}, metadata={op_name="x"}
  %constant.3 = s32[] constant(-5)
  %neg_fusion = f32[4,8]{1,0} fusion(%x.1), kind=kLoop, calls=%body_of_fusion, metadata={NAME}
  %all-gather-start = ((f32[4,8]{1,0}), /*index=1*/(f32[8,8]{1,0})) all-gather-start(%neg_fusion), dimensions={0}
  ROOT %tuple.9 = (f32[4,8]{1,0}, /*index=1*/s32[]) tuple(%neg_fusion, /*index=1*/%constant.3)
}
""".replace("NAME", r'op_name="jit(f)/a \"b\"/state[\'t\']"')


def test_a_module_is_read_computation_by_computation():
    module = hlo.parse(TEXT)
    assert module.entry == "main.7_spmd"
    assert list(module.computations) == ["body_of_fusion", "main.7_spmd"]
    main = module.computations["main.7_spmd"]
    assert list(main.instructions) == ["x.1", "constant.3", "neg_fusion", "all-gather-start", "tuple.9"]
    assert main.root.name == "tuple.9"
    assert main.root.operands == ["neg_fusion", "constant.3"]
    assert main.instructions["constant.3"].inside == "-5"
    fusion = main.instructions["neg_fusion"]
    assert (fusion.opcode, fusion.operands, fusion.called) == (
        "fusion",
        ["x.1"],
        {"calls": ["body_of_fusion"]},
    )
    assert fusion.op_name == "jit(f)/a \"b\"/state['t']"
    assert main.instructions["constant.3"].op_name == ""
    assert [str(array) for array in main.instructions["all-gather-start"].arrays] == ["f32[4,8]", "f32[8,8]"]
    assert hlo.fused(module) == {"body_of_fusion"}


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("%f (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n")


@pytest.mark.parametrize(
    ("text", "shape", "size", "space"),
    [
        ("f32[4,8]{1,0}", (4, 8), 128, 0),
        ("bf16[3]", (3,), 6, 0),
        ("pred[10]{0}", (10,), 10, 0),
        ("s32[]", (), 4, 0),
        ("f8e4m3fn[16]{0}", (16,), 16, 0),
        ("c64[2]{0}", (2,), 16, 0),
        ("token[]", (), 0, 0),
        ("f32[<=6,2]{1,0}", (6, 2), 48, 0),
        # Tiles: the last axis in memory is filled up to 128, the one before it to 8.
        ("f32[100,1]{1,0:T(8,128)}", (100, 1), 104 * 128 * 4, 0),
        ("f32[100,1]{0,1:T(8,128)S(1)}", (100, 1), 128 * 8 * 4, 1),
        ("bf16[5,130]{1,0:T(8,128)(2,1)}", (5, 130), 8 * 256 * 2, 0),
        ("s32[1000]{0:T(1024)}", (1000,), 4096, 0),
        ("f32[3,5,7]{2,1,0:T(8,128)}", (3, 5, 7), 3 * 8 * 128 * 4, 0),
    ],
)
def test_an_array_takes_the_bytes_of_its_layout(text: str, shape: tuple[int, ...], size: int, space: int):
    (array,) = hlo.arrays(text)
    assert (array.shape, array.bytes, array.space) == (shape, size, space)
