"""Lookup, its gradient and the update of rows on a mesh, beside plain indexing. Also run as a program, in processes."""

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dynrec_jax.parallel import rules
from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.mesh import feed, make_mesh, place_rows, place_same
from dynrec_jax.parallel.processes import join
from dynrec_jax.parallel.rows import Clip, Touched, rowwise_adagrad, update_rows
from dynrec_jax.parallel.table import lookup, lookup_both, rows_for, rows_of

ROWS, DIM, BATCH, LENGTH, SHARED = 64, 3, 8, 5, 6
RATE, CLIP, SQUARE = 0.3, 0.5, 2.0
KINDS = ("uniform", "zipf", "same", "shard")


class Case(NamedTuple):
    """What is looked up, and the gradients that come back; the same in every process."""

    table: np.ndarray
    seen: np.ndarray
    ids: np.ndarray
    gradient: np.ndarray
    shared: np.ndarray
    shared_gradient: np.ndarray


def case(kind: str) -> Case:
    """Ids that are "uniform", "zipf", the "same" on all devices, or all of one "shard", the last owner's.

    "striped" are uniform ids of a table so large that its rows are in another order than its items.
    """
    rng = np.random.default_rng(len(kind))
    shape = (BATCH, LENGTH)
    rows = rows_for(70_000) if kind == "striped" else ROWS
    ids = {
        "uniform": rng.integers(0, ROWS, shape),
        "striped": rng.integers(0, 70_001, shape),
        "zipf": np.minimum(rng.zipf(1.2, shape), ROWS - 1),
        "same": np.full(shape, 7),
        "shard": rng.integers(ROWS - 8, ROWS, shape),
    }[kind]
    return Case(
        table=rng.normal(size=(rows, DIM)).astype(np.float32),
        seen=rng.random(rows).astype(np.float32),
        ids=ids.astype(np.int32),
        gradient=rng.normal(size=(*shape, DIM)).astype(np.float32),
        shared=rng.integers(1, rows, SHARED).astype(np.int32),
        shared_gradient=rng.normal(size=(SHARED, DIM)).astype(np.float32),
    )


def expected(x: Case) -> dict[str, np.ndarray]:
    """By NumPy in float64: indexing, adding up at each row, clipping of the whole, and Adagrad's formula of a row."""
    rows = len(x.table)
    at, shared_at = rows_of(x.ids, rows), rows_of(x.shared, rows)
    dense = np.zeros((rows, DIM))
    np.add.at(dense, at, x.gradient)
    whole = dense.copy()
    np.add.at(whole, shared_at, x.shared_gradient)
    whole[0] = 0.0  # padding
    square = (whole**2).sum()
    clipped = whole * min(1.0, CLIP / np.sqrt(square + SQUARE))
    seen = x.seen + (clipped**2).mean(axis=1)
    moved = x.table - RATE * clipped / (np.sqrt(seen) + 1e-8)[:, None]
    return {
        "rows": x.table[at],
        "gradient": dense,
        "both": x.table[at],
        "shared": x.table[shared_at],
        "table": np.where(whole.any(axis=1)[:, None], moved, x.table),
        "seen": seen,
        "square": square,
    }


def found(x: Case, mesh: Mesh, exchange: Exchange | None, process: int = 0) -> dict[str, np.ndarray]:
    """The same on a mesh, whole on every process."""
    made = made_on(x, mesh, exchange, process)
    whole = multihost_utils.process_allgather(made, tiled=True) if jax.process_count() > 1 else made
    return jax.tree.map(np.asarray, whole)


def made_on(x: Case, mesh: Mesh, exchange: Exchange | None, process: int = 0) -> dict[str, jax.Array]:
    """The same where the devices have made it."""
    own = feed(mesh, process)
    part = slice(own.part * BATCH // own.parts, (own.part + 1) * BATCH // own.parts)
    ids, gradient = (place_rows(mesh, whole[part]) for whole in (x.ids, x.gradient))
    table = place_same(rules.sharding(mesh, "items", None), x.table)
    seen = place_same(rules.sharding(mesh, "items"), x.seen)
    shared, shared_gradient = (place_same(rules.sharding(mesh), y) for y in (x.shared, x.shared_gradient))

    with jax.set_mesh(mesh):
        made: dict[str, jax.Array] = program(mesh, exchange)(
            table, seen, ids, gradient, shared, shared_gradient
        )
    return made


@functools.cache
def program(mesh: Mesh, exchange: Exchange | None) -> Any:
    """Compiled once for all kinds of ids."""

    def run(table: Any, seen: Any, ids: Any, gradient: Any, shared: Any, shared_gradient: Any) -> Any:
        rows, back = jax.vjp(lambda table: lookup(table, ids, exchange), table)
        both, of_shared = lookup_both(table, ids, shared, exchange)
        touched = Touched(ids, gradient, shared, shared_gradient)
        clip, rate = Clip(CLIP, jnp.float32(SQUARE)), jnp.float32(RATE)
        table, seen, square = update_rows(
            table, seen, touched, rate, clip, optimizer=rowwise_adagrad(), exchange=exchange
        )
        return {
            "rows": rows,
            "gradient": back(gradient)[0],
            "both": both,
            "shared": of_shared,
            "table": table,
            "seen": seen,
            "square": square,
        }

    return jax.jit(run)


def main(out: str) -> None:
    """Writes what all kinds of ids give in these processes, by process 0."""
    processes = join()
    processes.start_jax()
    mesh = make_mesh(2, 2, 2)
    exchange = Exchange((2, 4), (3, 2), 4)
    results = {
        f"{kind}/{name}": value
        for kind in KINDS
        for name, value in found(case(kind), mesh, exchange, processes.index).items()
    }
    if processes.first:
        np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
