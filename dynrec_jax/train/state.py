"""The state of a training run: a tree, and where each leaf lies on the mesh."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from dynrec_jax.errors import ConfigError
from dynrec_jax.models.model import Model
from dynrec_jax.models.text_encoder import TEXT
from dynrec_jax.parallel.mesh import table_devices
from dynrec_jax.parallel.rows import RowOptimizer
from dynrec_jax.parallel.rules import sharding, tree_shardings
from dynrec_jax.parallel.table import rows_for

GIB = 2**30

AVERAGED = 0.99  # decay of running means of weights where the config leaves it to the kind of loss

# Of a program that runs once: on CPU it compiles in 1.9 s instead of 2.7, to the same weights.
QUICKLY = {"xla_backend_optimization_level": 1}


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, steps done; it is the input position and the random state as well.
      params: dense weights.
      tables: item tables {name: [R, D]}.
      opt_state: Optax's state, of the dense weights and, where the loss uses the whole catalogue, of the tables.
      row_state: {name: state} of the row optimizer; empty where the tables take the dense path.
      caches: {name: [R, E]}, what the run makes of all items now and then; empty where BERT is not trained.
      average: running means of `{"params", "tables"}`, which are evaluated and served in their place; empty where
        there are none.
    """

    step: Any
    params: Any
    tables: Any
    opt_state: Any
    row_state: Any
    caches: Any = {}  # noqa: RUF012 # never changed
    average: Any = {}  # noqa: RUF012 # never changed

    @property
    def weights(self) -> dict[str, Any]:
        """`{"params", "tables"}` as the optimizer moves them."""
        return {"params": self.params, "tables": self.tables}

    @property
    def served(self) -> dict[str, Any]:
        """`{"params", "tables"}` that are evaluated, saved as the model, and scored with."""
        return self.average or self.weights


def average_decay(config: ml_collections.ConfigDict) -> float:
    """Decay of the running means of a run's weights; 0 where it keeps none.

    What the config says, or where that is -1, `AVERAGED` with the softmax over all items, a step of which passes over
    the whole table anyway, and none where only touched rows move.
    """
    if config.train.average >= 0:
        return float(config.train.average)
    return AVERAGED if config.loss.kind == "full" else 0.0


def trainable(model: Model, params: Any, tables: Any) -> dict[str, Any]:
    """What Optax updates: all of it, or the dense weights alone where rows are updated by themselves."""
    return {"params": params} if model.sampled else {"params": params, "tables": tables}


def init_state(
    model: Model,
    tx: optax.GradientTransformation,
    rows: RowOptimizer,
    mesh: Mesh,
    seed: int,
    averaged: bool = False,
) -> tuple[TrainState, TrainState]:
    """A fresh state, each leaf made where it lies, and the state's shardings."""
    _, shardings = abstract_state(model, tx, rows, mesh, averaged)
    return fresh_state(model, tx, rows, mesh, seed, shardings, averaged=averaged), shardings


class Given(NamedTuple):
    """What a fresh state does not draw.

    Attributes:
      seen_Rx1: int32[R, 1], 1 for items that training sees: the rows of others start as zeros. None for all.
      bert: BERT's weights; None for random ones.
      unused: by tower and parameter, bool[V] of a vocabulary: words that no seen item has start as zeros too.
    """

    seen_Rx1: Any = None
    bert: Any = None
    unused: Any = {}  # noqa: RUF012 # never changed


def fresh_state(
    model: Model,
    tx: optax.GradientTransformation,
    rows: RowOptimizer,
    mesh: Mesh,
    seed: int,
    shardings: TrainState,
    given: Given = Given(),  # noqa: B008 # never changed
    averaged: bool = False,
) -> TrainState:
    """The state of step 0, laid out as `abstract_state` says."""
    with jax.set_mesh(mesh):
        # The state itself is made without boxes, in its place.
        make = jax.jit(
            lambda seed, given: nn.meta.unbox(_boxed(model, tx, rows, averaged, seed, given)),
            out_shardings=shardings,
            compiler_options=QUICKLY if mesh.devices.flat[0].platform == "cpu" else None,
        )
        # The seed as a number: an array of one process's device could not enter a program of several.
        return make(np.uint32(seed), given)


def abstract_state(
    model: Model, tx: optax.GradientTransformation, rows: RowOptimizer, mesh: Mesh, averaged: bool = False
) -> tuple[TrainState, TrainState]:
    """What `init_state` gives, as shapes alone that know where they lie: nothing is allocated."""
    fresh = functools.partial(_boxed, model, tx, rows, averaged)
    with jax.set_mesh(mesh):
        # Names are read off the boxed shapes.
        shardings = state_shardings(mesh, jax.eval_shape(fresh, np.uint32(0)))
        shapes = jax.eval_shape(lambda seed: nn.meta.unbox(fresh(seed)), np.uint32(0))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    ), shardings


def _boxed(
    model: Model,
    tx: optax.GradientTransformation,
    rows: RowOptimizer,
    averaged: bool,
    seed: jax.Array,
    given: Given = Given(),  # noqa: B008 # never changed
) -> TrainState:
    variables = model.init(jax.random.key(seed), given.bert)
    params, tables = variables["params"], variables["tables"]
    if given.seen_Rx1 is not None:
        tables = jax.tree.map(lambda table_RxD: jnp.where(given.seen_Rx1 > 0, table_RxD, 0.0), tables)
    params = jax.tree_util.tree_map_with_path(functools.partial(_emptied, given.unused), params)
    row_state = (
        {name: rows.init(nn.meta.unbox(table)) for name, table in tables.items()} if model.sampled else {}
    )
    opt_state = tx.init(trainable(model, params, tables))
    caches = {}
    if model.text is not None:
        cache_RxE = jnp.zeros((rows_for(model.abra.items), model.text.width), jnp.float32)
        caches[TEXT] = nn.LogicallyPartitioned(cache_RxE, ("items", None))
    average = {"params": params, "tables": tables} if averaged else {}
    return TrainState(jnp.int32(0), params, tables, opt_state, row_state, caches, average)


def _emptied(unused: dict[str, dict[str, jax.Array]], path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
    """A weight with zeros in the rows of words that nothing uses."""
    names = [step.key for step in path if isinstance(step, jax.tree_util.DictKey)]
    rows = unused.get(names[-2], {}).get(names[-1]) if len(names) > 1 else None
    return weight if rows is None else jnp.where(rows[:, None], 0.0, weight)


def state_shardings(mesh: Mesh, abstract: TrainState) -> TrainState:
    """Shardings of a boxed abstract state; per-row state lies where its rows lie."""
    shardings = tree_shardings(mesh, abstract)
    rows = jax.tree.map(lambda x: sharding(mesh, "items", *(None,) * (x.ndim - 1)), abstract.row_state)
    return shardings._replace(row_state=rows)


def table_bytes(state: TrainState) -> int:
    """Bytes of one device for the item tables and what optimizers keep of their rows, of an abstract state."""
    rows = {table.shape[0] for table in jax.tree.leaves(state.tables)}
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape[0] in rows]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def check_tables(state: TrainState, items: int, mesh: Mesh, memory: int) -> None:
    """Raises ConfigError where an abstract state's tables of N items cannot fit into a device's memory, in bytes."""
    needed = table_bytes(state)
    if needed <= memory:
        return
    holders = table_devices(mesh)
    dim = max(table.shape[1] for table in jax.tree.leaves(state.tables))
    each = " of a slice (mesh.tables=all puts them over all slices)" if mesh.shape["slice"] > 1 else ""
    enough = 2 ** math.ceil(math.log2(needed * holders / memory))
    raise ConfigError(
        f"{items:,} items of {dim} float32 numbers and the optimizer's state of their rows take "
        f"{needed / GIB:,.1f} GiB on each of {holders} devices{each}, which have {memory / GIB:,.1f} GiB; they need "
        f"{enough} devices, or at most {int(items * memory / needed):,} items, a smaller model.dim, or a sampled loss "
        "with train.row_optimizer=adagrad"
    )
