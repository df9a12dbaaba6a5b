"""BERT over a whole catalogue, block by block, texts of similar length together."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.models.text_encoder import TextEncoder, Tokens
from dynrec_jax.parallel.mesh import place_same, row_pieces
from dynrec_jax.parallel.rules import sharding

BLOCK = 256  # texts at a time, on all devices together at least
WIDTH = 16  # tokens: widths are multiples of this
EVERY = 10.0  # seconds between two lines of progress


def encode_items(
    encoder: TextEncoder,
    weights: Any,
    ids_NxT: np.ndarray,
    lengths_N: np.ndarray,
    mesh: Mesh,
    say: Callable[[str], None],
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Yields (int64[K], item indices; float32[K, E], their vectors, which all devices have).

    All processes of a mesh call it together, each with all tokens. Items without text are left out.

    Args:
      encoder: BERT.
      weights: its weights.
      ids_NxT: tokens; row i - 1 is item i.
      lengths_N: tokens of each.
      mesh: of the devices that share the work.
      say: is told now and then how far it is.
    """
    order = np.argsort(lengths_N, kind="stable")
    order = order[lengths_N[order] > 0]
    pieces = row_pieces(mesh)
    size = -(-BLOCK // pieces) * pieces
    run = _program(encoder, mesh)
    spread = sharding(mesh, "batch"), sharding(mesh, "batch", None), sharding(mesh, "batch")
    began = told = time.perf_counter()
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        short = size - len(rows)
        width = min(-(-int(lengths_N[rows].max()) // WIDTH) * WIDTH, ids_NxT.shape[1])
        host = (
            np.pad(rows + 1, (0, short)).astype(np.int32),
            np.pad(ids_NxT[rows, :width], ((0, short), (0, 0))),
            np.pad(lengths_N[rows], (0, short)).astype(np.int32),
        )
        tokens = Tokens(*(place_same(where, x) for where, x in zip(spread, host, strict=True)))
        with jax.set_mesh(mesh):
            vectors = run(weights, tokens)
        yield rows + 1, vectors[: len(rows)]
        if time.perf_counter() - told > EVERY:
            told = time.perf_counter()
            done = start + len(rows)
            rate = done / (told - began)
            left = (len(order) - done) / rate
            say(f"text of {done:,} of {len(order):,} items encoded, {rate:,.0f} a second, {left:,.0f} s left")


@functools.lru_cache(maxsize=4)
def _program(encoder: TextEncoder, mesh: Mesh) -> Any:
    return jax.jit(lambda weights, tokens: encoder.encode(weights, (tokens,)), out_shardings=sharding(mesh))
