"""Item tables: `float[R, D]`, one row an item, and which row that is.

Neither the number of rows nor an item's row depends on the mesh, so that a checkpoint opens on any other. In a small
table the row of item i is row i. A large one lies over many devices in contiguous pieces, and popular items, whose
numbers may be neighbours, must not all have the same owner: there item i lies in strip `i mod STRIPS`, and the strips
follow each other in the order of their reversed bits, so that over any power of two of devices the owner goes by
`i mod devices`. Row 0 is padding; rows of no item are zero and never used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynrec_jax.parallel import capacity
from dynrec_jax.parallel.exchange import Delivery, Exchange, anything_open, gather_rows
from dynrec_jax.parallel.mesh import table_devices
from dynrec_jax.parallel.rules import BATCH, ITEM_AXES, ROWS, several_devices

Array = jax.Array

ROWS_MULTIPLE = 256  # tables divide over any power of two of devices up to so many
STRIPED_FROM = 2**16  # rows; smaller tables keep the order of the items
STRIP_BITS = 12
STRIPS = 2**STRIP_BITS


def rows_for(items: int) -> int:
    """Rows of a table for N items and the padding row, rounded up to `ROWS_MULTIPLE`, or `STRIPS` of a large one."""
    rows = -(-(items + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return rows if rows < STRIPED_FROM else -(-rows // STRIPS) * STRIPS


def rows_of(ids: Any, rows: int) -> Any:
    """The row of each item index, int32 of any shape, NumPy's or JAX's, in a table of so many rows."""
    if rows < STRIPED_FROM:
        return ids
    return _reversed(ids & (STRIPS - 1)) * (rows // STRIPS) + (ids >> STRIP_BITS)


def ids_of(row: Any, rows: int) -> Any:
    """The item index of each row: undoes `rows_of`."""
    if rows < STRIPED_FROM:
        return row
    strip = rows // STRIPS
    return (row % strip << STRIP_BITS) + _reversed(row // strip)


def in_rows(values: np.ndarray, rows: int) -> np.ndarray:
    """Values by item index, of the items 0 .. N, as the rows of a table of so many rows; 0 in rows of no item."""
    found = np.zeros(rows, values.dtype)
    found[rows_of(np.arange(len(values)), rows)] = values
    return found


def _reversed(strip: Any) -> Any:
    """The strip's number with its bits in the opposite order."""
    mirrored = strip & 0
    for _ in range(STRIP_BITS):
        mirrored = (mirrored << 1) | (strip & 1)
        strip = strip >> 1
    return mirrored


def lookup(table_RxD: Array, ids_BxL: Array, exchange: Exchange | None = None) -> Array:
    """The rows of item indices, `[B, L, D]`; differentiable in the table, with a gradient of its size.

    Args:
      table_RxD: rows over `ITEM_AXES`.
      ids_BxL: in 0 .. R-1, over the axes of the batch; padding gives row 0.
      exchange: sizes of the exchange between devices; by default, those for ids that are spread evenly.
    """
    with jax.named_scope("lookup"):
        mesh = several_devices()
        if mesh is None:
            return _take(table_RxD, ids_BxL)
        inside = functools.partial(_lookup, exchange or capacity.default(mesh, ids_BxL.size))
        whole = jax.shard_map(inside, in_specs=(ROWS, BATCH), out_specs=BATCH, check_vma=False)
        return whole(table_RxD, ids_BxL)


def lookup_both(
    table_RxD: Array, ids_BxL: Array, shared_K: Array, exchange: Exchange | None = None
) -> tuple[Array, Array]:
    """`lookup` of a batch, and of ids that all devices share, `[K, D]`, in one exchange; not differentiable."""
    with jax.named_scope("lookup"):
        mesh = several_devices()
        if mesh is None:
            return _take(table_RxD, ids_BxL), _take(table_RxD, shared_K)
        exchange = exchange or capacity.default(mesh, ids_BxL.size + shared_K.size)
        inside = functools.partial(_lookup_both, exchange)
        whole = jax.shard_map(inside, in_specs=(ROWS, BATCH, ROWS), out_specs=(BATCH, ROWS), check_vma=False)
        # Each device asks for its share of them, and all get all of it behind the lookup.
        rows_BxLxD, shared_KxD = whole(table_RxD, ids_BxL, filled_up(shared_K, table_devices(mesh)))
        return rows_BxLxD, shared_KxD[: shared_K.shape[0]]


def lookup_by_row(table_RxD: Array, ids_R: Array) -> Array:
    """The row of one item index for each row of a table, `[R, D]`, lying as the table does; not differentiable."""
    mesh = several_devices()
    if mesh is None:
        return _take(table_RxD, ids_R)
    replicas = mesh.size // table_devices(mesh)
    exchange = capacity.default(mesh, ids_R.size * replicas)

    def inside(table_RxD: Array, ids_M: Array) -> Array:
        return gather_rows(table_RxD, rows_of(ids_M, _rows_in(table_RxD)), exchange)

    with jax.named_scope("lookup"):
        return jax.shard_map(inside, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=False)(table_RxD, ids_R)


def filled_up(x: Array, multiple: int) -> Array:
    """`x` with zeros behind its first axis, up to a multiple."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), *((0, 0),) * (x.ndim - 1)))


def _take(table_RxD: Array, ids: Array) -> Array:
    return jnp.take(table_RxD, rows_of(ids, table_RxD.shape[0]), axis=0, mode="clip")


# --- inside shard_map ------------------------------------------------------------------------------------------


def own_share(x: Array, fill: int | float) -> Array:
    """[M, …] -> [M / T, …]: the T devices of a tensor axis hold the same of a batch, and each takes a share of it."""
    tensor = jax.lax.axis_size("tensor")
    if tensor == 1:
        return x
    more = ((0, -x.shape[0] % tensor), *((0, 0),) * (x.ndim - 1))
    parts = jnp.pad(x, more, constant_values=fill).reshape(tensor, -1, *x.shape[1:])
    return parts[jax.lax.axis_index("tensor")]


def _whole(share: Array, size: int) -> Array:
    """Undoes `own_share`."""
    return jax.lax.all_gather(share, "tensor", tiled=True)[:size]


def _rows_in(table_RxD: Array) -> int:
    """Rows of the whole table, by this device's piece of it."""
    return table_RxD.shape[0] * jax.lax.axis_size(ITEM_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(exchange: Exchange, table_RxD: Array, ids_BxL: Array) -> Array:
    rows = _rows_in(table_RxD)
    row_M = own_share(rows_of(ids_BxL, rows).reshape(-1), rows)
    found_MxD = gather_rows(table_RxD, row_M, exchange)
    return _whole(found_MxD, ids_BxL.size).reshape(*ids_BxL.shape, -1)


def _lookup_forward(exchange: Exchange, table_RxD: Array, ids_BxL: Array) -> tuple[Array, Any]:
    return _lookup(exchange, table_RxD, ids_BxL), (ids_BxL, table_RxD[:0], table_RxD.shape[0])


def _lookup_backward(exchange: Exchange, saved: Any, g_BxLxD: Array) -> tuple[Array, None]:
    ids_BxL, like, held = saved
    rows = held * jax.lax.axis_size(ITEM_AXES)
    # shard_map hands each device of the tensor axis its share of the gradient of what they all hold.
    g_MxD = own_share(g_BxLxD.reshape(-1, g_BxLxD.shape[-1]) * jax.lax.axis_size("tensor"), 0)
    delivery = Delivery.of(own_share(rows_of(ids_BxL, rows).reshape(-1), rows), g_MxD, held, exchange)

    def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sum_RxD, open_M, _ = carry
        own_T, g_TxD, open_M = delivery.round(open_M)
        return sum_RxD.at[own_T].add(g_TxD, mode="drop"), open_M, anything_open(open_M)

    start = (jnp.zeros((held, g_MxD.shape[1]), g_MxD.dtype), delivery.all_open, jnp.bool_(True))
    with jax.named_scope("lookup_rounds"):
        sum_RxD, _, _ = jax.lax.while_loop(lambda carry: carry[2], add, start)
    return sum_RxD.astype(like.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _lookup_both(
    exchange: Exchange, table_RxD: Array, ids_BxL: Array, shared_K: Array
) -> tuple[Array, Array]:
    rows = _rows_in(table_RxD)
    share_M = own_share(rows_of(ids_BxL, rows).reshape(-1), rows)
    found = gather_rows(table_RxD, jnp.concatenate([share_M, rows_of(shared_K, rows)]), exchange)
    own_MxD, shared_KxD = found[: share_M.shape[0]], found[share_M.shape[0] :]
    return _whole(own_MxD, ids_BxL.size).reshape(*ids_BxL.shape, -1), shared_KxD
