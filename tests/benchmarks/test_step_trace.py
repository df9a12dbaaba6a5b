"""The benchmark of a step: traces and compiled text written by hand, with the times and counts that they must give."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"
SECOND = 1e9  # nanoseconds


@pytest.fixture(scope="module")
def trace() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "step_trace.py")))


def event(name: str, start: float, seconds: float, **stats: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, start_ns=start * SECOND, duration_ns=seconds * SECOND, stats=list(stats.items())
    )


def plane(name: str, **lines: list[Any]) -> SimpleNamespace:
    named = [SimpleNamespace(name=line.replace("_", " "), events=events) for line, events in lines.items()]
    return SimpleNamespace(name=name, lines=named)


def test_streams_of_a_gpu_share_what_they_do_at_once_and_a_wait_for_input_is_told(trace: SimpleNamespace):
    planes = [
        plane("/host:CPU", python=[event(trace.INPUT, 3, 1)]),
        plane(
            "/device:GPU:0",
            Stream_1=[event("gemm", 0, 2, hlo_op="dot.1"), event("loop", 4, 1, hlo_op="fusion.2")],
            Stream_2=[event("MemcpyH2D", 1, 1)],
        ),
    ]
    found = trace.summarise(planes, 16)
    assert (found.seconds, found.idle, found.waited) == (5, 2, 1)
    assert found.busy == {"dot.1": 1.5, "fusion.2": 1, "MemcpyH2D": 0.5}


def test_a_loop_of_a_tpu_has_what_its_body_leaves_and_devices_are_averaged(trace: SimpleNamespace):
    body = "%fusion.7 = f32[8] fusion(%a)"
    loop = event("%while.3 = (s32[]) while(...)", 0, 4)
    planes = [
        plane("/device:TPU:0", Steps=[event("0", 0, 9)], XLA_Ops=[loop, event(body, 1, 2)]),
        plane("/device:TPU:1", XLA_Ops=[event(body, 0, 4)]),
        plane("/host:CPU"),
    ]
    found = trace.summarise(planes, 16)
    assert found.busy == {"while.3": 1, "fusion.7": 3}
    assert found.calls == {"while.3": 1, "fusion.7": 2}
    assert found.idle == 0


def test_work_of_a_cpu_belongs_to_who_ordered_it(trace: SimpleNamespace):
    """`dot` runs for 1 s, orders 5, which another thread takes up for 2 s; that orders 6, which the first does."""
    first = [
        event(trace.EXECUTOR, 0, 1),
        event("dot", 0, 1, hlo_op="dot"),
        event(trace.ORDER, 0.5, 0, _p=5),
        event(trace.BEGIN, 2, 0, _c=6),
        event(trace.STOP, 3, 0),
        event(trace.WAITING, 3, 5),
    ]
    second = [
        event(trace.BEGIN, 1, 0, _c=5),
        event(trace.ORDER, 1.5, 0, _p=6),
        event(trace.EXECUTOR, 3, 1),
        event("add", 3.5, 0.5, hlo_op="add"),
        event(trace.STOP, 4, 0),
    ]
    found = trace.summarise([plane("/host:CPU", first=first, second=second)], cores=2)
    assert found.busy == {"dot": (1 + 2 + 1) / 2, "add": 0.25, trace.RUNTIME: 0.25}
    assert (found.seconds, found.idle) == (4, 1.5)


TEXT = """HloModule m, entry={}
%fused (p0: f32[8,4], p1: f32[4,16]) -> f32[8,16] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[4,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, metadata={op_name="jit(f)/in/dot_general"}
}
ENTRY %main (a: f32[8,4], b: f32[4,16]) -> f32[8,16] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  %copy.1 = f32[8,4]{0,1} copy(%a)
  %f = f32[8,16]{1,0} fusion(%copy.1, %b), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/out/add"}
  ROOT %gemm = (f32[8,16]{1,0}, s8[4]{0}) custom-call(%a, %b), metadata={op_name="jit(f)/x/dot_general"}, \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
}
"""


def test_products_are_counted_inside_fusions_and_calls_and_copies_go_to_who_reads_them(
    trace: SimpleNamespace,
):
    found = trace.instructions(TEXT)
    assert found["f"].flops == found["gemm"].flops == 2 * 8 * 16 * 4
    assert found["copy.1"].path == "jit(f)/out/add"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(f)/while/body/closed_call/jvp(Towers)/user/block_0/Dropout_1/xor", "dropout"),
        ("jit(f)/transpose(jvp(Towers))/user/block_1/attention/query/dot_general", "projections"),
        ("jit(f)/jvp(Towers)/user/block_1/attention/bhqe,bhke->bhqk/dot_general", "attention scores"),
        ("jit(f)/jvp(Towers)/user/block_1/feedforward_norm/sub", "norms"),
        ("jit(f)/jvp(Towers)/user/block_0/jit(silu)/mul", "feed-forward"),
        ("jit(f)/while/body/jvp(softmax)/while/body/qd,nd->qn/dot_general", "softmax"),
        ("jit(f)/transpose(jvp(lookup))/scatter-add", "lookup"),
        ("jit(f)/optimizer/mul", "optimiser"),
        ("jit(f)/while/body/add", "sums of parts"),
        ("", "other"),
    ],
)
def test_an_instruction_belongs_to_the_part_that_its_path_names(
    path: str, part: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.pop("step_trace", None)
    assert runpy.run_path(str(FOLDER / "step.py"))["part_of"](path) == part
