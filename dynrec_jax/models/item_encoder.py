"""The item encoder: from what is known of an item to its vector.

An item is described by towers, each of which makes a vector of one kind of thing that is known of it: its id (a row of
a trained table), its text, attributes, dense vectors, triples. With ids alone the row is the vector. Otherwise a
learned gate weighs the towers that an item has: `v = Σ_k g_k v_k`, `g = K · softmax_k` over the K towers that know of
the item, element by element, so that an item without an id, or without text, is described by what is left.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.models.layers import hash_bits, linear
from dynrec_jax.models.towers.ids import ID_TABLE, INDEX, IdTower
from dynrec_jax.models.towers.tower import Described, Maker
from dynrec_jax.parallel.table import STRIPED_FROM, ids_of, rows_for

Array = jax.Array
Seen = tuple[Array, Array]  # a tower's vectors [..., D], and which items have one, [..., 1]


def init_tables(key: Array, items: int, dim: int) -> dict[str, nn.LogicallyPartitioned]:
    """The row-sharded tables of N items, `{name: [R, D]}`, boxed with their logical axes.

    Rows start with length about 1, whatever D is; rows of no item are zero.
    """
    rows = rows_for(items)
    normal_RxD = (
        jax.random.normal(key, (rows, dim)) if rows < STRIPED_FROM else _hashed_normal(key, rows, dim)
    )
    table_RxD = normal_RxD * dim**-0.5
    id_Rx1 = ids_of(jnp.arange(rows), rows)[:, None]
    table_RxD = jnp.where((id_Rx1 >= 1) & (id_Rx1 <= items), table_RxD, 0.0)
    return {ID_TABLE: nn.LogicallyPartitioned(table_RxD, ("items", None))}


def _hashed_normal(key: Array, rows: int, dim: int) -> Array:
    """Standard normal numbers [R, D] from a hash of (key, row, column).

    JAX's own generator holds several arrays of the result's size on its way; this one holds none.
    """
    bits_RxD = hash_bits(key, jnp.arange(rows, dtype=jnp.uint32)[None, :], dim)[0]
    # The middles of 2^23 steps between -1 and 1, so that neither end is reached.
    middle_RxD = (bits_RxD >> 9).astype(jnp.float32) * 2.0**-22 + (2.0**-23 - 1.0)
    return jax.lax.erf_inv(middle_RxD) * 2**0.5


class ItemEncoder(nn.Module):
    """What was looked up of items, arrays `[..., width]` by name, to item vectors `[..., D]`.

    Attributes:
      towers: what describes items besides their id, by name; none of them, and the id's row is the vector.
      ids: whether the id is one of the towers.
      dim: D.
      dtype: of products.
      id_dropout: share of the items that go without their id where a key is given.
      unseen: whether items that training has not seen are told from others. False: the id's row is the vector.
    """

    towers: tuple[tuple[str, Maker], ...] = ()
    ids: bool = True
    dim: int = 0
    dtype: Any = jnp.float32
    id_dropout: float = 0.0
    unseen: bool = False

    def setup(self) -> None:
        if not self.unseen:
            return
        # One after the other: what a list of modules is called would be the list's name.
        for name, make in self.towers:
            setattr(self, name, make(self.dim, self.dtype))
            if self.gated:
                setattr(self, f"{name}_gate", Gate(self.dim, self.dtype))
        if self.ids:
            self.id = IdTower(self.id_dropout)
            if self.gated:
                self.id_gate = Gate(self.dim, self.dtype)
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
        self.unknown_D = self.param("unknown", init, (self.dim,), jnp.float32)

    @property
    def gated(self) -> bool:
        """Whether there is more than one tower."""
        return len(self.towers) + self.ids > 1

    def __call__(self, described: Described, key: Array | None = None) -> Array:
        """Item vectors; with a key some of the items go without their id.

        Items of which nothing is known share a learned vector; padding has none.
        """
        if not self.unseen:
            return described[ID_TABLE]
        own = [("id", self.id(described, key))] if self.ids else []
        v, there = self._fused(own + self._content(described))
        real = described[INDEX] != 0
        unknown = self.unknown_D.reshape((1,) * (v.ndim - 1) + (-1,))
        return jnp.where(there, v, jnp.where(real, unknown, 0.0))

    def apart(self, described: Described) -> tuple[Seen, Seen]:
        """The vector of the id, and what the towers say without it."""
        return self.id(described), self._fused(self._content(described))

    def _content(self, described: Described) -> list[tuple[str, Seen]]:
        return [(name, getattr(self, name)(described)) for name, _ in self.towers]

    def _fused(self, towers: list[tuple[str, Seen]]) -> Seen:
        """`Σ_k g_k v_k`, with as many parts of the gate in all as there are towers that know of the item."""
        if len(towers) == 1:
            return towers[0][1]
        v_KxD = jnp.stack([vector for _, (vector, _) in towers])
        there_Kx1 = jnp.stack([there for _, (_, there) in towers])
        logit_KxD = jnp.stack([getattr(self, f"{name}_gate")(vector) for name, (vector, _) in towers])
        # No infinity: an item of which no tower knows would have gradients that are no numbers.
        share_KxD = jax.nn.softmax(jnp.where(there_Kx1, logit_KxD, -1e9), axis=0)
        count = there_Kx1.sum(axis=0)
        fused = jnp.sum(jnp.where(there_Kx1, share_KxD, 0.0) * v_KxD, axis=0) * count
        return fused, count > 0


class Gate(nn.Module):
    """A tower's say in each element of the vector, from its own vector; all the same to begin with."""

    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, v: Array) -> Array:
        named = nn.with_logical_partitioning
        kernel = self.param(
            "kernel",
            named(nn.initializers.zeros_init(), (None, "embed")),
            (self.dim, self.dim),
            jnp.float32,
        )
        bias_D = self.param("bias", named(nn.initializers.zeros_init(), ("embed",)), (self.dim,), jnp.float32)
        x_PxD = v.reshape(-1, self.dim).astype(self.dtype) * self.dim**0.5
        return linear(x_PxD, kernel).astype(jnp.float32).reshape(v.shape) + bias_D.reshape(
            (1,) * (v.ndim - 1) + (-1,)
        )
