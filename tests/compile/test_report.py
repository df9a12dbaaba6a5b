"""Numbers for people, and what the compiler's refusals say."""

import pytest

from dynrec_jax.compile.measure import refused_bytes
from dynrec_jax.compile.report import exchange, scaled, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (-(2**20), "-1.0 MiB"),
        (2**50, "1,024.0 TiB"),
    ],
)
def test_bytes(number: int, text: str):
    assert size(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 FLOP"), (999, "999 FLOP"), (2.5e9, "2.5 GFLOP"), (3e19, "30 EFLOP")]
)
def test_large_numbers(number: float, text: str):
    assert scaled(number, "FLOP") == text


def test_the_exchange_of_two_hops():
    table = {"capacities": [24, 1100], "hops": [32, 8], "touched": 2000, "rounds": 1.125}
    told = exchange(table)
    assert "in rounds of 24 rows to each of 32 devices, then 1,100 rows to each of 8 devices" in told
    assert "2,000 of its own" in told
    assert "; 1.12 rounds a step expected" in told


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("Ran out of memory in memory space hbm. Used 1.50G of 15.75G hbm. Exceeded hbm capacity", 3 * 2**29),
        (
            "the total memory required for HLO temporaries (18.75G) exceeds available HBM (15.75G).",
            75 * 2**28,
        ),
        ("temporaries (512) exceeds", 512),
        ("out of luck", 0),
    ],
)
def test_what_a_refusal_says(said: str, needed: int):
    assert refused_bytes(said) == needed
