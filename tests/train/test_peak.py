"""The devices' peak: the right line of the table, and one host however many devices it simulates."""

import runpy
from types import SimpleNamespace

import jax
import pytest

from dynrec_jax.train import peak


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12),
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("Tesla T4", 8.1e12, 8.1e12),
        ("Tesla V100-SXM2-16GB", 15.7e12, 15.7e12),
        ("Tesla V100-PCIE-16GB", 14e12, 14e12),
        ("TPU v4", 275e12, 275e12),
        ("TPU v4 lite", 138e12, 138e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("TPU7x", 1153.5e12, 1153.5e12),
    ],
)
def test_the_stated_peak_goes_by_the_kind_of_device(kind: str, bfloat16: float, float32: float):
    assert peak.stated_peak(kind, "bfloat16") == bfloat16
    assert peak.stated_peak(kind, "float32") == float32


@pytest.mark.parametrize(
    "kind", ["NVIDIA L40S", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200", "TPU v9", "Radeon", ""]
)
def test_of_an_unknown_kind_nothing_is_said(kind: str):
    assert peak.stated_peak(kind, "bfloat16") is None


def test_the_measured_peak_is_that_of_the_fastest_product():
    own = runpy.run_path(peak.__file__)  # the session's is given, not measured
    ticks = iter([0.0, 4.0, 10.0, 12.0])  # the first of two products takes 4 s, the second 2
    inside = own["measured"].__wrapped__.__globals__
    inside.update(SIZE=16, time=SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert own["measured"]() == 2 * 16**3 / 2.0


def test_simulated_devices_share_one_host(given_peak: float):
    if jax.default_backend() == "cpu":
        assert jax.local_device_count() > 1
        assert peak.peak_of_process("float32") == given_peak


def test_devices_of_a_process_add_up(monkeypatch: pytest.MonkeyPatch):
    chip = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(peak.jax, "local_devices", lambda: [chip] * 4)
    assert peak.peak_of_process("bfloat16") == 4 * 989.4e12
    chip.device_kind = "NVIDIA H300"
    assert peak.peak_of_process("bfloat16") is None
