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

from dynrec_jax.batch import Batch
from dynrec_jax.models.bstm import Bstm, Rows
from dynrec_jax.models.item_encoder import ID_TABLE
from dynrec_jax.negatives import Sampling, draw_negatives
from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.rows import Clip, RowOptimizer, Touched, update_rows
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import lookup, lookup_both
from dynrec_jax.train.state import TrainState, trainable

Array = jax.Array

PART_POSITIONS = 4_096  # of a part on CPU: what a block makes of them lies in the cache of a core


class StepSettings(NamedTuple):
    """What a step needs besides state and batch, fixed when it is compiled.

    Attributes:
      seed: of dropout and negatives; each step's key is a function of (seed, step).
      accumulation: parts that a batch is computed in; 0 leaves it to `parts_for`.
      clip_norm: bound of the whole gradient's norm; 0 does not clip.
      sampling: how a sampled loss draws its negatives; not looked at otherwise.
      pieces: over how many devices the rows of a batch lie, where these are CPUs; 0 elsewhere.
      exchange: how devices exchange table rows; None for sizes that suit ids spread evenly.
    """

    seed: int
    accumulation: int
    clip_norm: float
    sampling: Sampling
    pieces: int = 0
    exchange: Exchange | None = None


class Gradients(NamedTuple):
    """Sums over a (part of a) batch.

    Attributes:
      loss: scalar.
      weight: scalar, number of targets.
      dense: gradient of what Optax updates.
      rows: float[B, L + 1, D], of the rows that were looked up for the batch; None on the dense path.
      shared: float[K, D], of the negatives' rows; None on the dense path.
    """

    loss: Array
    weight: Array
    dense: Any
    rows: Array | None = None
    shared: Array | None = None


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
      running_R: running counts of the items, where the sampler needs them, rows as the table's; or None.
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
    rows, width = batch.items.shape
    parts = settings.accumulation or parts_for(rows, width, settings.pieces)
    rate = schedule(state.step)
    tables, row_state = state.tables, state.row_state
    if model.sampled:
        sums, touched = _row_gradients(model, state, batch, running_R, key, settings, parts)
    else:
        sums, touched = _dense_gradients(model, state, batch, key, settings, parts), None
    weight = jnp.maximum(sums.weight, 1.0)
    clip = Clip(settings.clip_norm, (optax.tree.norm(sums.dense) / weight) ** 2)
    rows_square = jnp.float32(0)
    if touched is not None:
        table, of_table = tables[ID_TABLE], row_state[ID_TABLE]
        touched = touched.times(1.0 / weight)
        table, of_table, rows_square = update_rows(
            table, of_table, touched, rate, clip, row_tx, settings.exchange
        )
        tables, row_state = {**tables, ID_TABLE: table}, {**row_state, ID_TABLE: of_table}
    factor = clip.factor(rows_square) / weight
    dense = jax.tree.map(lambda g: g * factor, sums.dense)
    with jax.named_scope("optimizer"):
        old = trainable(model, state.params, state.tables)
        updates, opt_state = tx.update(dense, state.opt_state, old)
        updated = optax.apply_updates(old, updates)
    tables = tables if touched is not None else updated["tables"]
    metrics = {
        "loss": sums.loss / weight,
        "targets": sums.weight,
        "attended": jnp.sum(jnp.where(batch.remaining > 0, batch.positions + 1, 0), dtype=jnp.float32),
        "gradient_norm": jnp.sqrt(clip.square + rows_square),
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


def _accumulate(part: Callable[[Any], Gradients], batch: Any, parts: int) -> Gradients:
    """The sums over a batch, a tree of arrays [B, …], computed part by part; rows' gradients in the batch's order.

    One key serves all parts: dropout goes by a window's number in the whole batch, and the parts share negatives.
    Which windows make a part depends on how they lie in rows, and nothing may depend on that.
    """
    if parts == 1:
        return part(batch)

    def split(x: Array) -> Array:
        # Every parts-th row: each device keeps its share of every part.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    stacked = jax.tree.map(split, batch)
    first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], stacked))._replace(rows=None)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def add(sums: Gradients, each: Any) -> tuple[Gradients, Array | None]:
        more = part(each)
        return jax.tree.map(jnp.add, sums, more._replace(rows=None)), more.rows

    sums, rows = jax.lax.scan(add, zero, stacked)
    return sums._replace(rows=jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows))


def _dense_gradients(
    model: Bstm, state: TrainState, batch: Batch, key: Array, settings: StepSettings, parts: int
) -> Gradients:
    def part(batch: Batch) -> Gradients:
        def loss(tree: dict[str, Any]) -> tuple[Array, Array]:
            table = tree["tables"][ID_TABLE]
            rows = Rows(items=lookup(table, batch.items, settings.exchange), catalogue=table)
            return model.loss(tree["params"], rows, batch, None, key)

        tree = {"params": state.params, "tables": state.tables}
        (total, weight), dense = jax.value_and_grad(loss, has_aux=True)(tree)
        return Gradients(total, weight, dense)

    return _accumulate(part, batch, parts)


def _row_gradients(
    model: Bstm,
    state: TrainState,
    batch: Batch,
    running_R: Array | None,
    key: Array,
    settings: StepSettings,
    parts: int,
) -> tuple[Gradients, Touched]:
    table = state.tables[ID_TABLE]
    negatives_key, dropout_key = jax.random.split(key)
    drawn = draw_negatives(negatives_key, batch, running_R, settings.sampling)
    items_BxLxD, shared_KxD = lookup_both(table, batch.items, drawn.ids, settings.exchange)

    def part(each: tuple[Batch, Array]) -> Gradients:
        batch, items_BxLxD = each

        def loss(params: Any, items_BxLxD: Array, shared_KxD: Array) -> tuple[Array, Array]:
            rows = Rows(items=items_BxLxD, negatives=shared_KxD)
            return model.loss(params, rows, batch, drawn, dropout_key)

        (total, weight), (dense, items, shared) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
            state.params, items_BxLxD, shared_KxD
        )
        return Gradients(total, weight, {"params": dense}, items, shared)

    sums = _accumulate(part, (batch, items_BxLxD), parts)
    return sums, Touched(batch.items, sums.rows, drawn.ids, sums.shared)


class CompiledStep:
    """`train_step` under jit: shardings and donation in one place."""

    def __init__(self, mesh: Mesh, shardings: TrainState, **fixed: Any):
        """For a state that lies as `shardings` say; `fixed` are the step's keyword arguments."""
        self._mesh = mesh
        replicated, counts = sharding(mesh), sharding(mesh, "items")
        batch = Batch(*(sharding(mesh, "batch", None),) * len(Batch._fields))
        self._step = jax.jit(
            lambda state, batch, running_R: train_step(state, batch, running_R, **fixed),
            in_shardings=(shardings, batch, counts),
            out_shardings=(shardings, replicated),
            donate_argnums=(0,),
        )

    def __call__(
        self, state: TrainState, batch: Batch, running_R: Array | None
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step; `state` is donated."""
        with jax.set_mesh(self._mesh):
            return self._step(state, batch, running_R)

    def trace(self, state: TrainState, batch: Batch, running_R: Any) -> jax.stages.Traced:
        """The step for shapes, to be counted and compiled ahead of time."""
        with jax.set_mesh(self._mesh):
            return self._step.trace(state, batch, running_R)
