"""The sizes with which a run exchanges table rows: from its own batches, or from Zipf ids where there are none."""

import ml_collections
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.data.pipeline import BatchSource
from dynrec_jax.parallel import capacity
from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.mesh import Feed, row_pieces, table_devices
from dynrec_jax.parallel.processes import Processes
from dynrec_jax.parallel.table import rows_for, rows_of

SAMPLED, TRIED = 4, 8  # steps that sizes are chosen by, and those that rounds are then counted in


def exchange_of_batches(
    config: ml_collections.ConfigDict, mesh: Mesh, source: BatchSource, own: Feed, processes: Processes
) -> Exchange | None:
    """Sizes that suit the first batches of a run; None on one device.

    A process has its own part of each batch; for what the other parts hold it takes its own of further steps.
    """
    if mesh.size == 1:
        return None
    rows = rows_for(source.items)
    sizes = capacity.hops(table_devices(mesh), capacity.is_torus(mesh))
    needs, asked = [], 1
    for sample in range(SAMPLED):
        steps = [(sample * own.parts + part) % len(source) for part in range(own.parts)]
        items_BxL = np.concatenate([source[step].items for step in steps])
        row_SxDxM = _by_device(config, mesh, items_BxL, rows, np.random.default_rng(sample))
        asked = max(asked, row_SxDxM.shape[-1])
        needs += [capacity.most(row_DxM, rows, sizes) for row_DxM in row_SxDxM]
    told = processes.exchange([needs, asked])
    return capacity.chosen([need for each in told for need in each[0]], sizes, max(each[1] for each in told))


def exchange_of_zipf(
    config: ml_collections.ConfigDict, mesh: Mesh, items: int, shape: tuple[int, int]
) -> tuple[Exchange, float]:
    """Sizes that suit batches int32[B, L] of Zipf-1.0 ids, and how many rounds a step is then expected to take."""
    rows = rows_for(items)
    sizes = capacity.hops(table_devices(mesh), capacity.is_torus(mesh))
    needs, asked = [], 1
    for sample in range(SAMPLED + TRIED):
        generator = np.random.default_rng(sample)
        items_BxL = capacity.zipf(generator, items, shape)
        row_SxDxM = _by_device(config, mesh, items_BxL, rows, generator)
        asked = row_SxDxM.shape[-1]
        needs.append(np.max([capacity.most(row_DxM, rows, sizes) for row_DxM in row_SxDxM], axis=0).tolist())
    exchange = capacity.chosen(needs[:SAMPLED], sizes, asked)
    return exchange, float(np.mean([capacity.rounds(need, exchange) for need in needs[SAMPLED:]]))


def described(exchange: Exchange) -> str:
    """The sizes, for the log."""
    ways = ", then ".join(
        f"{capacity:,} rows to each of {size} devices"
        for size, capacity in zip(exchange.sizes, exchange.capacities, strict=True)
    )
    return f"table rows are exchanged in rounds of {ways}; a device updates {exchange.touched:,} of its own in one"


def _by_device(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    items_BxL: np.ndarray,
    rows: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """int64[S, D, M], the rows that each of the D owners of each slice asks for, in the order of the mesh."""
    pieces, owners = row_pieces(mesh), table_devices(mesh)
    tensor, slices = mesh.shape["tensor"], mesh.shape["slice"]
    even = items_BxL[: items_BxL.shape[0] // pieces * pieces].reshape(pieces, -1)
    even = np.pad(even, ((0, 0), (0, -even.shape[1] % tensor)))
    row_SxDxM = rows_of(even.astype(np.int64), rows).reshape(slices, owners, -1)
    if config.loss.kind == "full":
        return row_SxDxM
    shared = -(-config.loss.negatives // owners)
    drawn = generator.integers(1, rows, (slices, owners, shared))
    return np.concatenate([row_SxDxM, drawn], axis=-1)
