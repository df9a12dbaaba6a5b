"""Temporary memory of a training step and of a batch of lists, by the size of the catalogue, read from the compiler.

    python experiments/benchmarks/memory.py [--out=FILE]

Each program is compiled for one device from shapes alone, so nothing is allocated and a table of any size will do.
What is counted is what XLA sets aside beside arguments and results. `tables` is how that grows with the catalogue, in
units of the item table's own growth: 0 where nothing of the catalogue's size is held. Writes JSON where --out is given.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax.sharding import Mesh

from dynrec_jax.batch import Batch
from dynrec_jax.config import default_config
from dynrec_jax.evaluate.recommender import Recommender
from dynrec_jax.models.bstm import Bstm
from dynrec_jax.models.model import MODELS
from dynrec_jax.models.neighbours import LAST
from dynrec_jax.parallel.mesh import make_mesh
from dynrec_jax.parallel.table import rows_for
from dynrec_jax.train.loop import step_arguments
from dynrec_jax.train.state import abstract_state, average_decay
from dynrec_jax.train.step import CompiledStep, Inputs

ITEMS = (10_000, 100_000, 1_000_000)
HISTORIES, USERS = (32, 64), (128, 256)  # of a step, of a batch of lists
SEEN, LIST_LENGTH = 256, 100
FLOAT = 4  # bytes

Measure = Callable[[ml_collections.ConfigDict, int, int], int]


def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def table_bytes(config: ml_collections.ConfigDict, items: int) -> int:
    """Size of one item table."""
    return rows_for(items) * config.model.dim * FLOAT


def step_bytes(config: ml_collections.ConfigDict, items: int, batch: int) -> int:
    """Temporary memory of a training step, as `train.loop` compiles it."""
    model = MODELS[config.model.name](config, items)
    mesh = one_device()
    fixed = step_arguments(config, model, mesh, None)
    state, shardings = abstract_state(model, fixed["tx"], fixed["row_tx"], mesh, average_decay(config) > 0)
    windows = Batch(*[shape(batch, config.data.max_length + 1)] * len(Batch._fields))
    counted = model.sampled and fixed["settings"].sampling.by_counts
    running_R = shape(rows_for(items)) if counted else None
    return _temporary(CompiledStep(mesh, shardings, **fixed).trace(state, Inputs(windows, running_R)).lower())


def lists_bytes(config: ml_collections.ConfigDict, items: int, users: int) -> int:
    """Temporary memory of a batch of lists, for evaluation and scoring alike, the catalogue at hand."""
    model, mesh = MODELS[config.model.name](config, items), one_device()
    recommender = Recommender(model, mesh, users, LIST_LENGTH, filter_seen=True)
    params = _params(model)
    vectors_RxD = shape(rows_for(items), config.model.dim, dtype=jnp.float32)
    with jax.set_mesh(mesh):
        history = model.sight.shapes(users, config.data.max_length, shape)
        read = recommender._encode.lower(params, vectors_RxD, history)
        rank = recommender._rank.lower(
            (shape(users, config.model.dim, dtype=jnp.float32), shape(users, LAST)),
            vectors_RxD,
            shape(users, SEEN),
        )
    # A batch is ranked while the next one is read.
    return _temporary(read) + _temporary(rank)


def _params(model: Bstm) -> Any:
    return jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0))))["params"]


def _temporary(lowered: Any) -> int:
    # Memory is laid out before code is generated, so the code need not be fast.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return int(compiled.memory_analysis().temp_size_in_bytes)


def programs() -> dict[str, tuple[Measure, tuple[int, ...], dict[str, Any]]]:
    """What is measured: how, at which sizes of a batch, with which changes to the default config."""
    return {
        "step, full softmax": (step_bytes, HISTORIES, {"loss.kind": "full", "model.backward_weight": 0.5}),
        "step, full softmax, forward alone": (step_bytes, HISTORIES, {"loss.kind": "full"}),
        "step, sampled": (step_bytes, HISTORIES, {"loss.kind": "sampled", "model.backward_weight": 0.5}),
        "lists": (lists_bytes, USERS, {}),
    }


def grid(measure: Measure, batches: tuple[int, ...], changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each size of a batch: bytes at each of `ITEMS`, and how they grow with the last of them, in tables."""
    config = default_config()
    config.update_from_flattened_dict({"model.positions": "absolute", "train.average": 0.0, **changes})
    rows = []
    for batch in batches:
        used = [measure(config, items, batch) for items in ITEMS]
        tables = [table_bytes(config, items) for items in ITEMS]
        slope = (used[-1] - used[-2]) / (tables[-1] - tables[-2])
        rows.append({"batch": batch, "bytes": dict(zip(ITEMS, used, strict=True)), "tables": slope})
    return rows


def main() -> None:
    """Prints a line for each program and batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}; MiB at {', '.join(f'{n:,}' for n in ITEMS)} items")
    result = {}
    for name, program in programs().items():
        result[name] = grid(*program)
        for row in result[name]:
            used = " ".join(f"{number / 2**20:9,.1f}" for number in row["bytes"].values())
            print(f"{name:34} batch {row['batch']:4} {used}  grows by {row['tables']:.2f} tables", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
