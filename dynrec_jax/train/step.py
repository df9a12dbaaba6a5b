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
from dynrec_jax.models.bstm import Rows
from dynrec_jax.models.model import Model
from dynrec_jax.models.text_encoder import Fresh, Text
from dynrec_jax.models.towers.ids import ID_TABLE, INDEX
from dynrec_jax.models.towers.tower import Described
from dynrec_jax.negatives import Sampling, draw_negatives
from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.rows import Clip, RowOptimizer, Touched, update_rows
from dynrec_jax.parallel.rules import constrain, sharding
from dynrec_jax.parallel.table import ids_of, lookup, lookup_both, rows_for, rows_of
from dynrec_jax.train.state import TrainState, trainable

Array = jax.Array

PART_POSITIONS = 4_096  # of a part on CPU: what a block makes of them lies in the cache of a core
# BERT's layers are wider and the gradient holds all of them of a part. On two cores, 144 texts of 64 tokens, six layers
# of width 384: eight parts hold 1.1 GB, two 2.3 and one 3.1, and all take as long.
PART_TOKENS = 2_048


class StepSettings(NamedTuple):
    """What a step needs besides state and batch, fixed when it is compiled.

    Attributes:
      seed: of dropout and negatives; each step's key is a function of (seed, step).
      accumulation: parts that a batch is computed in; 0 leaves it to `parts_for`.
      clip_norm: bound of the whole gradient's norm; 0 does not clip.
      sampling: how a sampled loss draws its negatives; not looked at otherwise.
      pieces: over how many devices the rows of a batch lie, where these are CPUs; 0 elsewhere.
      exchange: how devices exchange table rows; None for sizes that suit ids spread evenly.
      average: decay of the running means of the weights; 0 keeps none.
    """

    seed: int
    accumulation: int
    clip_norm: float
    sampling: Sampling
    pieces: int = 0
    exchange: Exchange | None = None
    average: float = 0.0


class Gradients(NamedTuple):
    """Sums over a (part of a) batch.

    Attributes:
      loss: scalar.
      weight: scalar, number of targets, or the sum of their weights where event types weigh differently.
      dense: gradient of what Optax updates.
      rows: float[B, L + 1, D], of the rows that were looked up for the batch; None on the dense path.
      shared: float[K, D], of the negatives' rows; None on the dense path.
      text: float[U, E], of the text vectors that the step has made; None where it makes none.
    """

    loss: Array
    weight: Array
    dense: Any
    rows: Array | None = None
    shared: Array | None = None
    text: Array | None = None


class Inputs(NamedTuple):
    """What a step reads besides the state.

    Attributes:
      batch: int32[B, L + 1] each.
      running_R: running counts of the items, where the sampler needs them, rows as the table's; or None.
      features: what is known of the items, [R, width] by name, rows as the table's.
      text: of the distinct items of the batch, where BERT is trained with the rest; otherwise empty.
    """

    batch: Batch
    running_R: Array | None = None
    features: Any = {}  # noqa: RUF012 # never changed
    text: Text = ()


def train_step(
    state: TrainState,
    inputs: Inputs,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    row_tx: RowOptimizer,
    schedule: optax.Schedule,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step.

    Args:
      state: donated by the caller's jit.
      inputs: see `Inputs`.
      model: pure functions of the model; this and what follows is fixed at compilation.
      tx: Optax's optimizer.
      row_tx: the optimizer of touched rows, used by a sampled loss.
      schedule: the learning rate by step, for the rows.
      settings: see `StepSettings`.

    Returns:
      The new state and scalars: `loss` (mean over targets), `targets`, `attended` (events that the positions with
      a target look at, each itself included), `gradient_norm`, `learning_rate`; where BERT is trained, `text_moved`:
      how far the vectors of the batch's events are from those in use elsewhere (mean of 1 - cosine); what BERT's
      dropout does to a vector is in it.
    """
    batch = inputs.batch
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    rows, width = batch.items.shape
    parts = settings.accumulation or parts_for(rows, width, settings.pieces)
    rate = schedule(state.step)
    tables, row_state = state.tables, state.row_state
    made = _Made.of(model, state, inputs, key, settings)
    known = _known(state, inputs, batch.items, settings.exchange)
    gradients = _row_gradients if model.sampled else _dense_gradients
    sums, touched = gradients(model, state, inputs, known, made, key, settings, parts)
    sums = made.pulled_back(sums)
    weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
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
    tables = updated.get("tables", tables)
    metrics = {
        **made.metrics(known, batch),
        "loss": sums.loss / weight,
        "targets": sums.weight,
        "attended": jnp.sum(jnp.where(batch.remaining > 0, batch.positions + 1, 0), dtype=jnp.float32),
        "gradient_norm": jnp.sqrt(clip.square + rows_square),
        "learning_rate": jnp.float32(rate),
    }
    new = TrainState(state.step + 1, updated["params"], tables, opt_state, row_state, state.caches)
    return new._replace(average=averaged(state, new.weights, settings.average)), metrics


def averaged(state: TrainState, weights: dict[str, Any], decay: float) -> dict[str, Any]:
    """Running means of the weights after a step, `m ← β m + (1 - β) w` (Polyak & Juditsky 1992, with decay).

    In step t (from 0), β is at most `(1 + t) / (10 + t)`, so that the first weights, which nothing was learnt with, do
    not stay for long. Empty where the state keeps none.
    """
    if not state.average:
        return {}
    t = state.step.astype(jnp.float32)
    beta = jnp.minimum(decay, (1 + t) / (10 + t))
    with jax.named_scope("average"):
        return jax.tree.map(lambda m, w: m + (1 - beta) * (w - m), state.average, weights)


def parts_for(rows: int, width: int, pieces: int, positions: int | None = None) -> int:
    """Into how many parts a batch of so many rows falls, each with as many rows on each device.

    One, but on CPU (`pieces` devices, 0 elsewhere) as many as bring a part of a device near `positions`, by default
    `PART_POSITIONS`. On two cores, at L 200, D 64, two layers and a batch of 80 rows, four parts hold 0.92 GB and one
    1.55 GB, and take as long.
    """
    if not pieces:
        return 1
    wanted = rows * width / (pieces * (positions or PART_POSITIONS))
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


class _Made(NamedTuple):
    """Text vectors that this step makes, before anything is looked up; empty where BERT is not trained.

    Attributes:
      text: whose text.
      vectors: float[U, E], or None.
      back: their gradient -> that of the dense weights.
    """

    text: Text
    vectors: Array | None = None
    back: Callable[[Array], Any] | None = None

    @classmethod
    def of(
        cls, model: Model, state: TrainState, inputs: Inputs, key: Array, settings: StepSettings
    ) -> "_Made":
        if not inputs.text:
            return cls(())
        key = jax.random.fold_in(key, 3)
        shapes = [(tokens.ids.shape[0], tokens.ids.shape[1]) for tokens in inputs.text]
        parts = [
            settings.accumulation or parts_for(texts, width, settings.pieces, PART_TOKENS)
            for texts, width in shapes
        ]
        with jax.named_scope("text"):
            vectors_UxE, back = jax.vjp(
                lambda params: model.encode(params, inputs.text, key, parts), state.params
            )
        return cls(inputs.text, vectors_UxE, lambda g: back(g)[0])

    def fresh(self, vectors_UxE: Array | None) -> Fresh | None:
        """These vectors by item; a function of them, for gradients."""
        return None if vectors_UxE is None else Fresh.of(self.text, vectors_UxE)

    def pulled_back(self, sums: Gradients) -> Gradients:
        """The sums with the gradient of the text's vectors gone back through BERT."""
        if self.back is None or sums.text is None:
            return sums
        with jax.named_scope("text"):
            params = jax.tree.map(jnp.add, sums.dense["params"], self.back(sums.text))
        return sums._replace(dense={**sums.dense, "params": params}, text=None)

    def metrics(self, known: Described, batch: Batch) -> dict[str, Array]:
        """What the log tells of them."""
        fresh = self.fresh(self.vectors)
        return {} if fresh is None else {"text_moved": fresh.distance(known, batch.items)}


def _known(state: TrainState, inputs: Inputs, ids: Array, exchange: Exchange | None) -> Described:
    """What describes items besides the rows of trained tables, by item, with the ids' own shape in front."""
    known = {**inputs.features, **state.caches}
    if not known:
        return {}
    if ids.ndim > 1:
        found = {name: lookup(table, ids, exchange) for name, table in known.items()}
    else:  # all devices need them
        found = {name: constrain(_shared(table, ids), None, None) for name, table in known.items()}
    return {**found, INDEX: ids[..., None]}


def _shared(table_RxW: Array, ids_K: Array) -> Array:
    """Rows of items that all devices share, [K, W]."""
    return jnp.take(table_RxW, rows_of(ids_K, table_RxW.shape[0]), axis=0, mode="clip")


def _whole(state: TrainState, inputs: Inputs, rows: int) -> Described:
    """What describes every row of a table, besides the rows of trained ones."""
    known = {**inputs.features, **state.caches}
    if not known:
        return {}
    index_Rx1 = constrain(ids_of(jnp.arange(rows, dtype=jnp.int32), rows)[:, None], "items", None)
    return {**known, INDEX: index_Rx1}


def _dense_gradients(
    model: Model,
    state: TrainState,
    inputs: Inputs,
    known: Described,
    made: _Made,
    key: Array,
    settings: StepSettings,
    parts: int,
) -> tuple[Gradients, None]:
    whole = _whole(state, inputs, rows_for(model.abra.items))

    def part(each: tuple[Batch, Described]) -> Gradients:
        batch, known = each

        def loss(tree: dict[str, Any], vectors: Array | None) -> tuple[Array, Array]:
            items, catalogue = known, whole
            if (fresh := made.fresh(vectors)) is not None:
                items, catalogue = fresh.over(items, batch.items), fresh.over_rows(catalogue)
            if model.ids:
                table = tree["tables"][ID_TABLE]
                items = {**items, ID_TABLE: lookup(table, batch.items, settings.exchange)}
                catalogue = {**catalogue, ID_TABLE: table}
            return model.loss(tree["params"], Rows(items=items, catalogue=catalogue), batch, None, key)

        tree = {"params": state.params, "tables": state.tables}
        (total, weight), (dense, text) = jax.value_and_grad(loss, (0, 1), has_aux=True)(tree, made.vectors)
        return Gradients(total, weight, dense, text=text)

    return _accumulate(part, (inputs.batch, known), parts), None


def _row_gradients(
    model: Model,
    state: TrainState,
    inputs: Inputs,
    known: Described,
    made: _Made,
    key: Array,
    settings: StepSettings,
    parts: int,
) -> tuple[Gradients, Touched | None]:
    negatives_key, dropout_key = jax.random.split(key)
    drawn = draw_negatives(negatives_key, inputs.batch, inputs.running_R, settings.sampling)
    shared = _known(state, inputs, drawn.ids, settings.exchange)
    # The rows that are trained: of the batch and of the negatives. Empty where there are no ids.
    items, negatives = {}, {}
    if model.ids:
        both = lookup_both(state.tables[ID_TABLE], inputs.batch.items, drawn.ids, settings.exchange)
        items, negatives = ({ID_TABLE: rows} for rows in both)

    def part(each: tuple[Batch, Described, Described]) -> Gradients:
        batch, items, known = each

        def loss(
            params: Any, items: Described, negatives: Described, vectors: Array | None
        ) -> tuple[Array, Array]:
            of_items, of_negatives = known, shared
            if (fresh := made.fresh(vectors)) is not None:
                of_items, of_negatives = (
                    fresh.over(of_items, batch.items),
                    fresh.over(of_negatives, drawn.ids),
                )
            rows = Rows(items={**of_items, **items}, negatives={**of_negatives, **negatives})
            return model.loss(params, rows, batch, drawn, dropout_key)

        (total, weight), (dense, g_items, g_negatives, text) = jax.value_and_grad(
            loss, (0, 1, 2, 3), has_aux=True
        )(state.params, items, negatives, made.vectors)
        return Gradients(
            total, weight, {"params": dense}, g_items.get(ID_TABLE), g_negatives.get(ID_TABLE), text
        )

    sums = _accumulate(part, (inputs.batch, items, known), parts)
    if not model.ids:
        return sums, None
    return sums, Touched(inputs.batch.items, sums.rows, drawn.ids, sums.shared)


class CompiledStep:
    """`train_step` under jit: shardings and donation in one place."""

    def __init__(self, mesh: Mesh, shardings: TrainState, **fixed: Any):
        """For a state that lies as `shardings` say; `fixed` are the step's keyword arguments."""
        self._mesh = mesh
        placed: Any = Inputs(
            Batch(*(sharding(mesh, "batch", None),) * len(Batch._fields)),
            sharding(mesh, "items"),  # type: ignore[arg-type] # where each lies, in place of what it is
            sharding(mesh, "items", None),
            sharding(mesh, "batch"),  # type: ignore[arg-type]
        )
        self._step = jax.jit(
            lambda state, inputs: train_step(state, inputs, **fixed),
            in_shardings=(shardings, placed),
            out_shardings=(shardings, sharding(mesh)),
            donate_argnums=(0,),
        )

    def __call__(self, state: TrainState, inputs: Inputs) -> tuple[TrainState, dict[str, Array]]:
        """One step; `state` is donated."""
        with jax.set_mesh(self._mesh):
            return self._step(state, inputs)

    def trace(self, state: TrainState, inputs: Inputs) -> jax.stages.Traced:
        """The step for shapes, to be counted and compiled ahead of time."""
        with jax.set_mesh(self._mesh):
            return self._step.trace(state, inputs)
