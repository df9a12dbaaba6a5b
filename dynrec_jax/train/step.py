"""The training step: a pure function from (state, batch) to (state, metrics).

The tables' rows are looked up first and the loss is a function of (params, rows). A sampled loss updates the
touched rows alone; a full softmax has a dense gradient by nature and takes the dense path.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dynrec_jax import losses
from dynrec_jax.batch import Batch
from dynrec_jax.models.bstm import Bstm, Rows
from dynrec_jax.models.item_encoder import ID_TABLE
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import RowOptimizer, lookup, merge, rows_of
from dynrec_jax.train.state import TrainState, trainable

Array = jax.Array

PART_POSITIONS = 4_096  # of a part on CPU: what a block makes of them lies in the cache of a core


class StepSettings(NamedTuple):
    """What a step needs besides state and batch, fixed when it is compiled.

    Attributes:
      seed: of dropout and negatives; each step's key is a function of (seed, step).
      accumulation: parts that a batch is computed in; 0 leaves it to `parts_for`.
      clip_norm: bound of the whole gradient's norm; 0 does not clip.
      negatives: K of a sampled loss.
      logq: whether a sampled loss corrects for the sampler.
      pieces: over how many devices the rows of a batch lie, where these are CPUs; 0 elsewhere.
    """

    seed: int
    accumulation: int
    clip_norm: float
    negatives: int
    logq: bool
    pieces: int = 0


class Gradients(NamedTuple):
    """Sums over a (part of a) batch.

    Attributes:
      loss: scalar.
      weight: scalar, number of targets.
      dense: gradient of what Optax updates.
      ids: int32[M] rows touched; empty on the dense path.
      rows: float[M, D], their gradients.
    """

    loss: Array
    weight: Array
    dense: Any
    ids: Array
    rows: Array


def train_step(
    state: TrainState,
    batch: Batch,
    running_R: Array | None,
    *,
    model: Bstm,
    tx: optax.GradientTransformation,
    row_tx: RowOptimizer,
    schedule: optax.Schedule,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step.

    Args:
      state: donated by the caller's jit.
      batch: int32[B, L + 1] each.
      running_R: running counts of the popularity sampler, or None.
      model: pure functions of the model; this and what follows is fixed at compilation.
      tx: Optax's optimizer.
      row_tx: the optimizer of touched rows, used by a sampled loss.
      schedule: the learning rate by step, for the rows.
      settings: see `StepSettings`.

    Returns:
      The new state and scalars: `loss` (mean over targets), `targets`, `attended` (events that the positions with
      a target look at, each itself included), `gradient_norm`, `learning_rate`.
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    function = _row_gradients if model.sampled else _dense_gradients

    def part(batch: Batch) -> Gradients:
        # One key for all parts: dropout goes by a window's number in the whole batch, and the parts share negatives.
        # Which windows make a part depends on how they lie in rows, and nothing may depend on that.
        return function(model, state, batch, running_R, key, settings)

    rows, width = batch.items.shape
    parts = settings.accumulation or parts_for(rows, width, settings.pieces)
    sums = _accumulate(part, batch, parts)
    weight = jnp.maximum(sums.weight, 1.0)
    square = (optax.tree.norm(sums.dense) / weight) ** 2
    tables, row_state = state.tables, state.row_state
    rows = None
    if model.sampled:
        table = tables[ID_TABLE]
        ids_M, rows_MxD = merge(rows_of(sums.ids, table.shape[0]), sums.rows / weight, table.shape[0])
        rows = (ids_M, rows_MxD)
        square = square + jnp.sum(rows_MxD**2)
    norm = jnp.sqrt(square)
    shrink = jnp.minimum(1.0, settings.clip_norm / jnp.maximum(norm, 1e-12)) if settings.clip_norm else 1.0
    rate = schedule(state.step)
    dense = jax.tree.map(lambda g: g * (shrink / weight), sums.dense)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(dense, state.opt_state, trainable(model, state.params, tables))
        updated = optax.apply_updates(trainable(model, state.params, tables), updates)
    if rows is not None:
        new, new_state = row_tx.update(tables[ID_TABLE], row_state[ID_TABLE], rows[0], rows[1] * shrink, rate)
        tables, row_state = {**tables, ID_TABLE: new}, {**row_state, ID_TABLE: new_state}
    else:
        tables = updated["tables"]
    metrics = {
        "loss": sums.loss / weight,
        "targets": sums.weight,
        "attended": jnp.sum(jnp.where(batch.remaining > 0, batch.positions + 1, 0), dtype=jnp.float32),
        "gradient_norm": norm,
        "learning_rate": jnp.float32(rate),
    }
    return TrainState(state.step + 1, updated["params"], tables, opt_state, row_state), metrics


def parts_for(rows: int, width: int, pieces: int) -> int:
    """Into how many parts a batch of so many rows falls, each with as many rows on each device.

    One, but on CPU (`pieces` devices, 0 elsewhere) as many as bring a part of a device near `PART_POSITIONS`. On two
    cores, at L 200, D 64, two layers and a batch of 80 rows, four parts hold 0.92 GB and one 1.55 GB, and take as long.
    """
    if not pieces:
        return 1
    wanted = rows * width / (pieces * PART_POSITIONS)
    return min(
        (n for n in range(1, rows + 1) if rows % (n * pieces) == 0), key=lambda n: abs(n - wanted), default=1
    )


def _accumulate(part: Callable[[Batch], Gradients], batch: Batch, parts: int) -> Gradients:
    """The sums over a batch, computed part by part."""
    if parts == 1:
        return part(batch)

    def split(x: Array) -> Array:
        # Every parts-th row: each device keeps its share of every part.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    stacked = jax.tree.map(split, batch)
    first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], stacked))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def add(carry: Any, each: Batch) -> tuple[Any, tuple[Array, Array]]:
        sums = part(each)
        loss, weight, dense = carry
        dense = jax.tree.map(jnp.add, dense, sums.dense)
        return (loss + sums.loss, weight + sums.weight, dense), (sums.ids, sums.rows)

    start = (zero.loss, zero.weight, zero.dense)
    (loss, weight, dense), (ids, rows) = jax.lax.scan(add, start, stacked)
    return Gradients(loss, weight, dense, ids.reshape(-1), rows.reshape(-1, rows.shape[-1]))


def _dense_gradients(
    model: Bstm,
    state: TrainState,
    batch: Batch,
    running_R: Array | None,
    key: Array,
    settings: StepSettings,
) -> Gradients:
    def loss(tree: dict[str, Any]) -> tuple[Array, Array]:
        table = tree["tables"][ID_TABLE]
        rows = Rows(items=lookup(table, batch.items), catalogue=table)
        return model.loss(tree["params"], rows, batch, None, key)

    (total, weight), dense = jax.value_and_grad(loss, has_aux=True)(
        {"params": state.params, "tables": state.tables}
    )
    dim = state.tables[ID_TABLE].shape[1]
    return Gradients(total, weight, dense, jnp.zeros((0,), jnp.int32), jnp.zeros((0, dim)))


def _row_gradients(
    model: Bstm,
    state: TrainState,
    batch: Batch,
    running_R: Array | None,
    key: Array,
    settings: StepSettings,
) -> Gradients:
    table = state.tables[ID_TABLE]
    negatives_key, dropout_key = jax.random.split(key)
    drawn = losses.draw_negatives(
        negatives_key, settings.negatives, model.abra.items, running_R, settings.logq
    )
    looked_up = Rows(items=lookup(table, batch.items), negatives=lookup(table, drawn.ids))

    def loss(params: Any, rows: Rows) -> tuple[Array, Array]:
        return model.loss(params, rows, batch, drawn, dropout_key)

    (total, weight), (dense, rows) = jax.value_and_grad(loss, (0, 1), has_aux=True)(state.params, looked_up)
    ids_M = jnp.concatenate([batch.items.reshape(-1), drawn.ids])
    rows_MxD = jnp.concatenate([rows.items.reshape(-1, table.shape[1]), rows.negatives])
    return Gradients(total, weight, {"params": dense}, ids_M, rows_MxD)


def compile_step(
    mesh: Mesh, shardings: TrainState, **fixed: Any
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`train_step` under jit: shardings and donation in one place. `fixed` are its keyword arguments."""
    place = sharding(mesh, "batch", None)
    batch = Batch(*(place,) * len(Batch._fields))
    replicated = sharding(mesh)
    step = jax.jit(
        lambda state, batch, cumulative: train_step(state, batch, cumulative, **fixed),
        in_shardings=(shardings, batch, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=(0,),
    )

    def run(state: TrainState, batch: Batch, cumulative: Array | None) -> tuple[TrainState, dict[str, Array]]:
        with jax.set_mesh(mesh):
            return step(state, batch, cumulative)

    return run
