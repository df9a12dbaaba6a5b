"""Positions and the catalogue in blocks, and how positions travel between the devices that hold the catalogue.

Positions lie over the devices as the rows of a batch do, a device's own first and its padding behind them; each slice
has all rows of the catalogue. A block is a few positions of every device of a slice: they are brought together, each
device scores them against its own rows, and the partial results are combined and go home. So a device never holds
more than one block of other devices' positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.parallel.compressed import Compressed, Table
from dynrec_jax.parallel.rules import BATCH_AXES, ITEM_AXES, several_devices
from dynrec_jax.parallel.table import STRIPED_FROM, ids_of

Array = jax.Array

PEER_AXES = tuple(axis for axis in ITEM_AXES if axis in BATCH_AXES)  # devices of a slice with other positions
TWIN_AXES = tuple(axis for axis in ITEM_AXES if axis not in BATCH_AXES)  # with the same ones
SLICE_AXES = tuple(axis for axis in BATCH_AXES if axis not in ITEM_AXES)  # with replicas of the catalogue
EVERYWHERE = BATCH_AXES + TWIN_AXES


class Blocks(NamedTuple):
    """How the catalogue is streamed.

    Attributes:
      items: N; items are 1 .. N, all other rows of the table are left out.
      scale: what multiplies u·v.
      rows: catalogue rows that a device scores at a time.
      positions: positions that a slice scores at a time, at least one of each device.
      dtype: of matrix products; sums are float32.
      given: whether rows of zeros are left out as well: items that are not to be had.
    """

    items: int
    scale: float
    rows: int = 8192
    positions: int = 512
    dtype: Any = jnp.dtype("float32")
    given: bool = False


class Devices(NamedTuple):
    """What a device does together with the others; nothing where it is alone.

    Attributes:
      several: whether there are others: the code runs inside `shard_map` then.
    """

    several: bool

    def size(self, axes: tuple[str, ...]) -> int:
        """How many devices there are along mesh axes."""
        return jax.lax.axis_size(axes) if self.several else 1

    def place(self, axes: tuple[str, ...]) -> Array:
        """Which of the devices along mesh axes this one is, int32 scalar."""
        return jax.lax.axis_index(axes) if self.several else jnp.int32(0)

    def each(self, blocks: Blocks, held: int) -> int:
        """How many positions a device gives to a block, of those that it holds."""
        return min(max(blocks.positions // self.size(PEER_AXES), 1), held)

    def number_of_blocks(self, count: Array, each: int) -> Array:
        """Blocks until all devices of the slice are through, int32 scalar, of a device's `count` (int32[1])."""
        number = -(-count[0] // each)
        return jax.lax.pmax(number, ITEM_AXES) if self.several else number

    def gather(self, x: Array) -> Array:
        """A block `[Q, …]` from what each device gives to it."""
        return jax.lax.all_gather(x, PEER_AXES, tiled=True) if self.several else x

    def own(self, x_Q: Array, each: int) -> Array:
        """What of a block is this device's: undoes `gather`."""
        if not self.several:
            return x_Q
        return jax.lax.dynamic_slice_in_dim(x_Q, jax.lax.axis_index(PEER_AXES) * each, each)

    def scatter(self, x_QxD: Array) -> Array:
        """`own` of the sum over `PEER_AXES`; the parts of the twins are still to be added."""
        return jax.lax.psum_scatter(x_QxD, PEER_AXES, tiled=True) if self.several else x_QxD

    def add(self, x: Array, axes: tuple[str, ...]) -> Array:
        """The sum over mesh axes."""
        return jax.lax.psum(x, axes) if self.size(axes) > 1 else x

    def together(self, x: Array, axes: tuple[str, ...], axis: int) -> Array:
        """Parts of an array's axis, that of the first device first."""
        return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if self.size(axes) > 1 else x


def on_devices(function: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
    """`function(devices, *arguments)`: directly on one device, by `shard_map` on the mesh that is set.

    It is never differentiated: gradients are formulas of their own, and every sum over devices is written down.
    """
    if several_devices() is None:
        return function(Devices(False), *arguments)

    def inside(*parts: Array) -> Any:
        return function(Devices(True), *parts)

    return jax.shard_map(inside, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)


def split_positions(x: Array, size: int) -> Array:
    """[P, …] -> [P/Q, Q, …], filled up with zeros."""
    short = -x.shape[0] % size
    return jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])


def join_positions(x: Array, number: int) -> Array:
    """[P/Q, Q, …] -> [P, …]: undoes `split_positions`."""
    return x.reshape(-1, *x.shape[2:])[:number]


def in_loop(x: Array, index: Array, dtype: Any) -> Array:
    """`x.astype(dtype)`, made at each turn of a loop over `index`, an int32 from 0 up.

    XLA would round a whole table to bfloat16 before the loop, for products in bfloat16 and on TPUs for others too, and
    hold both. It does not look through an operation that leaves all bits as they are because `index` is not negative.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(bits ^ (index >> 31).astype(bits.dtype), x.dtype).astype(dtype)


def in_turn(rows: Table, index: Array, dtype: Any) -> tuple[Array, Array | None]:
    """Rows of a table in `dtype`, `[C, D]`, made at this turn of a loop, and what multiplies each of them, if any."""
    if not isinstance(rows, Compressed):
        return in_loop(rows, index, dtype), None
    if rows.scales is not None:
        return in_loop(rows.values, index, dtype), rows.scales
    bits_CxD = in_loop(rows.values, index, rows.values.dtype)
    return jax.lax.bitcast_convert_type(bits_CxD, jnp.bfloat16).astype(dtype), None


class Tiles(NamedTuple):
    """How a device's rows are cut into blocks of C rows, without a copy of the table.

    The last block starts early enough to be full; rows that it shares with the one before count once, there.

    Attributes:
      table_RxD: the rows; compressed ones are turned back block by block.
      first: int32 scalar, number of the first row in the whole table.
      total: rows of the whole table.
      number: how many blocks.
      size: C.
      dtype: of a block.
    """

    table_RxD: Table
    first: Array
    total: int
    number: int
    size: int
    dtype: Any

    def start(self, index: Array) -> Array:
        """First row of a block, counted from the device's own first row."""
        return jnp.minimum(index * self.size, self.table_RxD.shape[0] - self.size)

    def block(self, index: Array) -> Array:
        """The rows of a block, [C, D]."""
        start = self.start(index)
        rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.size), self.table_RxD)
        v_CxD, scale_C = in_turn(rows, index, self.dtype)
        return v_CxD if scale_C is None else v_CxD * scale_C[:, None].astype(self.dtype)

    def add(self, sum_RxD: Array, index: Array, part_CxD: Array) -> Array:
        """Adds a block's part to a sum in the table's layout."""
        old_CxD = jax.lax.dynamic_slice_in_dim(sum_RxD, self.start(index), self.size)
        return jax.lax.dynamic_update_slice_in_dim(sum_RxD, old_CxD + part_CxD, self.start(index), 0)


def tiles(table_RxD: Table, blocks: Blocks, devices: Devices) -> Tiles:
    """Cuts a device's rows."""
    held = rows = table_RxD.shape[0]
    if not devices.several and held < STRIPED_FROM:  # rows behind the last item cost nothing on one device
        rows = min(rows, -(-(blocks.items + 1) // 8) * 8)
    number = -(-rows // blocks.rows)
    size = min(-(-rows // (number * 8)) * 8, held)
    first, total = devices.place(ITEM_AXES) * held, devices.size(ITEM_AXES) * held
    return Tiles(table_RxD, first, total, number, size, blocks.dtype)


def scores(u_QxD: Array, cut: Tiles, index: Array, blocks: Blocks) -> Array:
    """Scaled scores [Q, C] of a block in float32; -inf for rows that are no items or belong to the block before."""
    v_CxD = cut.block(index)
    s_QxC = jnp.einsum("qd,cd->qc", u_QxD, v_CxD, preferred_element_type=jnp.float32) * blocks.scale
    own_C = cut.start(index) + jnp.arange(cut.size)
    id_C = ids_of(cut.first + own_C, cut.total)
    real_C = (id_C >= 1) & (id_C <= blocks.items) & (own_C >= index * cut.size)
    if blocks.given:
        real_C &= jnp.any(v_CxD != 0, axis=1)
    return jnp.where(real_C[None, :], s_QxC, -jnp.inf)


def normaliser(u_QxD: Array, cut: Tiles, blocks: Blocks, devices: Devices) -> Array:
    """log Σ exp over all items of all devices, [Q]."""

    def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        top_Q, sum_Q = carry
        s_QxC = scores(u_QxD, cut, index, blocks)
        new_Q = jnp.maximum(top_Q, s_QxC.max(axis=1))
        safe_Q = jnp.where(jnp.isfinite(new_Q), new_Q, 0.0)
        sum_Q = sum_Q * jnp.exp(top_Q - safe_Q) + jnp.exp(s_QxC - safe_Q[:, None]).sum(axis=1)
        return (new_Q, sum_Q), None

    start = (jnp.full(u_QxD.shape[:1], -jnp.inf), jnp.zeros(u_QxD.shape[:1]))
    (top_Q, sum_Q), _ = jax.lax.scan(step, start, jnp.arange(cut.number))
    if not devices.several:
        return top_Q + jnp.log(sum_Q)
    all_Q = jax.lax.pmax(top_Q, ITEM_AXES)
    return all_Q + jnp.log(jax.lax.psum(sum_Q * jnp.exp(top_Q - all_Q), ITEM_AXES))


def products(p_QxC: Array, u_QxD: Array, v_CxD: Array, scale: float) -> tuple[Array, Array]:
    """Gradients of Σ p·s with respect to `u` and to `v`, float32."""
    du_QxD = jnp.einsum("qc,cd->qd", p_QxC, v_CxD, preferred_element_type=jnp.float32) * scale
    dv_CxD = jnp.einsum("qc,qd->cd", p_QxC, u_QxD, preferred_element_type=jnp.float32) * scale
    return du_QxD, dv_CxD
