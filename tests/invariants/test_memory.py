"""Memory does not grow with positions × catalogue, nor with users × catalogue: read from the compiler.

With N items of D numbers each and a batch of B, the temporary memory of a program is `a + b·N·D + c·B`, without a
term in B·N. A full softmax has a dense gradient by nature, so its b is not 0: a table for the gradient of each
traversal, and one for the gradient of the rows that were looked up. A sampled loss and lists have b = 0.
"""

import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dynrec_jax.models.neighbours import TAUGHT, Near, shrunk
from dynrec_jax.parallel.rules import sharding

from .. import tiny

BENCHMARK = Path(__file__).parents[2] / "experiments" / "benchmarks" / "memory.py"
FEW, MANY = 10_000, 100_000
BLOCK = 256  # rows of the catalogue: both tables are whole blocks
ROUNDING = 2**12  # bytes: a number for each block, and where buffers begin
FLOAT = 4


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def config(**changes: Any) -> Any:
    return tiny.config(loss__block_items=BLOCK, model__dropout=0.1, model__backward_weight=0.5, **changes)


def growth(used: dict[tuple[int, int], int], batch: int) -> int:
    """Bytes that the larger catalogue takes beyond the smaller."""
    return used[MANY, batch] - used[FEW, batch]


@pytest.mark.parametrize(("parts", "most"), [(1, 3.01), pytest.param(2, 4.01, marks=pytest.mark.slow)])
def test_a_step_with_the_full_softmax_holds_gradients_of_the_table_and_nothing_else_of_its_size(
    benchmark, parts: int, most: float
):
    c = config(train__accumulation=parts)
    used = {(n, b): benchmark["step_bytes"](c, n, b) for n in (FEW, MANY) for b in (8, 16)}
    assert abs(growth(used, 16) - growth(used, 8)) <= ROUNDING, "the growth with N does not depend on B"
    for batch in (8, 16):
        per_table = growth(used, batch) / (
            benchmark["table_bytes"](c, MANY) - benchmark["table_bytes"](c, FEW)
        )
        assert 1 <= per_table < most, "two traversals, the rows that were looked up, and the sum of parts"
    # What is held for a position does not depend on N, and it is less than its scores of the smaller catalogue.
    assert 0 < used[FEW, 16] - used[FEW, 8] < 8 * c.data.max_length * FEW * FLOAT


def test_a_step_with_a_sampled_loss_does_not_grow_with_the_catalogue(benchmark):
    c = config(loss__kind="sampled", loss__sampler="popularity")
    used = {(n, 8): benchmark["step_bytes"](c, n, 8) for n in (FEW, MANY)}
    assert abs(growth(used, 8)) <= ROUNDING
    assert used[MANY, 8] < benchmark["table_bytes"](c, MANY)


def test_lists_do_not_grow_with_the_catalogue(benchmark):
    """Evaluation and scoring make theirs by the same function."""
    c = config()
    used = {(n, b): benchmark["lists_bytes"](c, n, b) for n in (FEW, MANY) for b in (16, 32)}
    for batch in (16, 32):
        assert abs(growth(used, batch)) <= ROUNDING
    assert used[MANY, 32] < 32 * FEW * FLOAT, "less than the scores of the smaller catalogue"


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8)])
def test_vectors_are_drawn_to_their_neighbours_piece_by_piece(shape: tuple[int, int, int]):
    """No device holds the table, whichever axes its rows lie over: a few pieces of it."""
    mesh = tiny.mesh(*shape)
    rows, dim = 16_384, 64
    place = sharding(mesh, "items", None)
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32, sharding=place)
    near = Near(
        *(
            jax.ShapeDtypeStruct((rows, width), kind, sharding=place)
            for width, kind in ((TAUGHT, jnp.int32), (TAUGHT, jnp.float32), (1, jnp.int32))
        )
    )
    with jax.set_mesh(mesh):
        made = jax.jit(lambda table, near: shrunk(table, near, 3.0), out_shardings=place).lower(table, near)
        used = made.compile().memory_analysis().temp_size_in_bytes
    assert used < rows * dim * FLOAT * 0.9
