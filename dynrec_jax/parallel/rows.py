"""Optimizers that move the touched rows of a table alone, and the step that applies them on any mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dynrec_jax.batch import PAD
from dynrec_jax.parallel import capacity
from dynrec_jax.parallel.exchange import Delivery, Exchange, anything_open, merge
from dynrec_jax.parallel.rules import BATCH, ITEM_AXES, ROWS, WHOLE, several_devices
from dynrec_jax.parallel.table import filled_up, own_share, rows_of

Array = jax.Array


class RowOptimizer(NamedTuple):
    """An optimizer that moves touched rows alone.

    Attributes:
      init: table [R, D] -> state.
      update: (table, state, rows, gradients, learning rate) -> (table, state). Rows ascend and each is named once;
        numbers behind the table are none. Rows that are not named neither move nor decay.
    """

    init: Callable[[Array], Any]
    update: Callable[[Array, Any, Array, Array, Array], tuple[Array, Any]]


# Said so, accelerators need neither put rows in order nor guard against two updates of one.
ORDERED: dict[str, Any] = {"indices_are_sorted": True, "unique_indices": True}
READ, WRITE = {"mode": "fill", **ORDERED}, {"mode": "drop", **ORDERED}


def rowwise_adagrad(epsilon: float = 1e-8) -> RowOptimizer:
    """Adagrad with one accumulator a row: the mean of its squared gradients (Duchi et al. 2011, per row)."""

    def init(table_RxD: Array) -> Array:
        return jnp.zeros((table_RxD.shape[0],), jnp.float32)

    def update(table: Array, state: Array, ids: Array, grads: Array, rate: Array) -> Any:
        seen = state.at[ids].get(fill_value=0.0, **READ) + jnp.mean(jnp.square(grads), axis=-1)
        table = table.at[ids].add(-rate * grads / (jnp.sqrt(seen) + epsilon)[:, None], **WRITE)
        return table, state.at[ids].set(seen, **WRITE)

    return RowOptimizer(init, update)


class AdamRows(NamedTuple):
    """First and second moments [R, D] and the number of updates of each row [R]."""

    mean: Array
    square: Array
    updates: Array


def lazy_adam(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> RowOptimizer:
    """Adam (Kingma & Ba 2015) on touched rows; moments and bias correction count a row's own updates."""

    def init(table_RxD: Array) -> AdamRows:
        zeros = jnp.zeros(table_RxD.shape, jnp.float32)
        return AdamRows(zeros, zeros, jnp.zeros((table_RxD.shape[0],), jnp.int32))

    def update(table: Array, state: AdamRows, ids: Array, grads: Array, rate: Array) -> Any:
        mean = beta1 * state.mean.at[ids].get(fill_value=0.0, **READ) + (1 - beta1) * grads
        square = beta2 * state.square.at[ids].get(fill_value=0.0, **READ) + (1 - beta2) * grads**2
        count = state.updates.at[ids].get(fill_value=0, **READ) + 1
        t = count.astype(jnp.float32)[:, None]
        step = (mean / (1 - beta1**t)) / (jnp.sqrt(square / (1 - beta2**t)) + epsilon)
        table = table.at[ids].add((-rate * step).astype(table.dtype), **WRITE)
        state = AdamRows(
            state.mean.at[ids].set(mean, **WRITE),
            state.square.at[ids].set(square, **WRITE),
            state.updates.at[ids].set(count, **WRITE),
        )
        return table, state

    return RowOptimizer(init, update)


class Touched(NamedTuple):
    """Gradients of the rows that a batch looked up.

    Attributes:
      ids_BxL: int32[B, L], item indices of the batch; padding is never updated.
      rows_BxLxD: their gradients.
      shared_K: int32[K], item indices that all devices share.
      shared_KxD: their gradients, of the whole batch.
    """

    ids_BxL: Any
    rows_BxLxD: Any
    shared_K: Any
    shared_KxD: Any

    def times(self, factor: Array) -> "Touched":
        """The same with scaled gradients."""
        return self._replace(rows_BxLxD=self.rows_BxLxD * factor, shared_KxD=self.shared_KxD * factor)


class Clip(NamedTuple):
    """Bounds the norm of a gradient whose dense part is known.

    Attributes:
      norm: the bound; 0 does not clip.
      square: scalar, the dense part's squared norm.
    """

    norm: float
    square: Array

    def factor(self, rows_square: Array) -> Array:
        """What the gradient is multiplied by, given its rows' squared norm."""
        if not self.norm:
            return jnp.float32(1)
        return jnp.minimum(1.0, self.norm / jnp.maximum(jnp.sqrt(self.square + rows_square), 1e-12))


def update_rows(
    table_RxD: Array,
    state: Any,
    touched: Touched,
    rate: Array,
    clip: Clip,
    optimizer: RowOptimizer,
    exchange: Exchange | None = None,
) -> tuple[Array, Any, Array]:
    """Moves the rows that were touched, each once, by the sum of its gradients.

    Args:
      table_RxD: rows over `ITEM_AXES`.
      state: the optimizer's, rows as the table's.
      touched: what moves.
      rate: learning rate.
      clip: of the whole gradient; rows count merged.
      optimizer: of rows.
      exchange: sizes of the exchange between devices; by default, those for ids that are spread evenly.

    Returns:
      Table, state, and the rows' squared norm before clipping.
    """
    mesh = several_devices()
    with jax.named_scope("row_update"):
        if mesh is None:
            return _update_alone(table_RxD, state, touched, rate, clip, optimizer)
        exchange = exchange or capacity.default(mesh, touched.ids_BxL.size + touched.shared_K.size)
        across = ("slice",) if mesh.shape["slice"] > 1 else ()
        rows = jax.tree.map(lambda _: ROWS, state)
        shared = PartitionSpec((*across, *ITEM_AXES))
        inside = functools.partial(_update_inside, clip.norm, optimizer, exchange, across)
        step = jax.shard_map(
            inside,
            in_specs=(ROWS, rows, Touched(BATCH, BATCH, shared, shared), WHOLE, WHOLE),
            out_specs=(ROWS, rows, WHOLE),
            check_vma=False,
        )
        touched = touched._replace(
            shared_K=filled_up(touched.shared_K, mesh.size),
            shared_KxD=filled_up(touched.shared_KxD, mesh.size),
        )
        return step(table_RxD, state, touched, rate, clip.square)


def told_apart(row_T: Array, none: int) -> Array:
    """Rows in which each `none` is another number from `none` up, so that no number is there twice."""
    return jnp.where(row_T < none, row_T, none + jnp.arange(row_T.shape[0], dtype=jnp.int32))


def _update_alone(
    table_RxD: Array, state: Any, touched: Touched, rate: Array, clip: Clip, optimizer: RowOptimizer
) -> tuple[Array, Any, Array]:
    rows, dim = table_RxD.shape
    ids_M = jnp.concatenate([touched.ids_BxL.reshape(-1), touched.shared_K])
    gradient_MxD = jnp.concatenate([touched.rows_BxLxD.reshape(-1, dim), touched.shared_KxD])
    row_M, gradient_MxD = merge(_named(ids_M, rows), gradient_MxD, rows)
    gradient_MxD = jnp.where(row_M[:, None] < rows, gradient_MxD, 0)
    square = jnp.sum(jnp.square(gradient_MxD))
    table_RxD, state = optimizer.update(
        table_RxD, state, told_apart(row_M, rows), gradient_MxD * clip.factor(square), rate
    )
    return table_RxD, state, square


def _named(ids: Array, rows: int) -> Array:
    """The row of each item; `rows`, which is none, for padding."""
    return jnp.where(ids == PAD, rows, rows_of(ids, rows))


def _update_inside(
    norm: float,
    optimizer: RowOptimizer,
    exchange: Exchange,
    across: tuple[str, ...],
    table_RxD: Array,
    state: Any,
    touched: Touched,
    rate: Array,
    dense_square: Array,
) -> tuple[Array, Any, Array]:
    held, dim = table_RxD.shape
    rows = held * jax.lax.axis_size(ITEM_AXES)
    ids_M = _named(touched.ids_BxL.reshape(-1), rows)
    row_M = jnp.concatenate([own_share(ids_M, rows), _named(touched.shared_K, rows)])
    own_MxD = own_share(touched.rows_BxLxD.reshape(-1, dim), 0)
    gradient_MxD = jnp.concatenate([own_MxD, touched.shared_KxD])
    delivery = Delivery.of(row_M, gradient_MxD, held, exchange)

    # The first round, which is all in most steps, serves the norm and the update; further ones are made twice.
    own_T, g_TxD, later_M = delivery.round(delivery.all_open, across)
    more = anything_open(later_M, across)

    def measure(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        square, open_M, _ = carry
        own_T, g_TxD, open_M = delivery.round(open_M, across)
        return square + _square(own_T, g_TxD, held), open_M, anything_open(open_M, across)

    with jax.named_scope("norm_rounds"):
        start = (_square(own_T, g_TxD, held), later_M, more)
        square, _, _ = jax.lax.while_loop(lambda carry: carry[2], measure, start)
    square = jax.lax.psum(square, ITEM_AXES)
    if across:  # replicas may have added up in another order, and must not drift apart
        square = jax.lax.pmax(square, across)
    factor = Clip(norm, dense_square).factor(square)
    table_RxD, state = optimizer.update(table_RxD, state, told_apart(own_T, held), g_TxD * factor, rate)

    def move(carry: tuple[Array, Any, Array, Array]) -> tuple[Array, Any, Array, Array]:
        table_RxD, state, open_M, _ = carry
        own_T, g_TxD, open_M = delivery.round(open_M, across)
        table_RxD, state = optimizer.update(table_RxD, state, told_apart(own_T, held), g_TxD * factor, rate)
        return table_RxD, state, open_M, anything_open(open_M, across)

    with jax.named_scope("update_rounds"):
        begin = (table_RxD, state, later_M, more)
        table_RxD, state, _, _ = jax.lax.while_loop(lambda carry: carry[3], move, begin)
    return table_RxD, state, square


def _square(own_T: Array, g_TxD: Array, held: int) -> Array:
    return jnp.sum(jnp.where(own_T[:, None] < held, jnp.square(g_TxD), 0.0))
