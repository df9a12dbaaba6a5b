"""The text encoder that is trained with the rest: BERT over the items' tokens, and where its vectors go.

A step encodes the distinct items of its batch, each once. Wherever it meets one of them, in a history, as a target or
in the catalogue, it uses that vector, and gradients of all of these places go through it; for all other items it uses
vectors made some steps before.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.batch import PAD
from dynrec_jax.models.attention import SAVED
from dynrec_jax.models.bert import Bert, Pooling, pool
from dynrec_jax.models.towers.tower import Described
from dynrec_jax.parallel.rules import constrain
from dynrec_jax.parallel.table import rows_of

Array = jax.Array
BERT = "bert"  # its weights' name
TEXT = "text"  # name of the text's vectors in what describes items
NOBODY = 2**31 - 1
# Bytes of products of matrices that the gradient of parts keeps, of all texts together. A process needs twice that, as
# long as what a step has freed lies in pieces. To keep nothing takes a fifth more time.
MOST_KEPT = 2**30


class Tokens(NamedTuple):
    """Text of some items, padded on the right.

    Attributes:
      items: int32[U], their indices; 0 fills up.
      ids: int32[U, T].
      lengths: int32[U], tokens of each; an item without text has none.
    """

    items: Any
    ids: Any
    lengths: Any


Text = tuple[Tokens, ...]  # of items whose texts are about as long, one after the other


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """BERT and how its states become one vector.

    Attributes:
      bert: its module.
      pooling: "mean" or "cls".
    """

    bert: Bert
    pooling: Pooling

    @property
    def width(self) -> int:
        """E, numbers of a text's vector."""
        return int(self.bert.config.hidden_size)

    def init(self, key: Array) -> Any:
        """Boxed weights."""
        one = jnp.ones((1, 2), jnp.int32)
        return self.bert.init(key, one, one)["params"]

    def encode(
        self, weights: Any, text: Text, key: Array | None = None, parts: Sequence[int] | None = None
    ) -> Array:
        """Vectors `[U, E]` of all items of `text` in order, in float32; zeros for an item without text.

        Args:
          weights: BERT's.
          text: of the items.
          key: of dropout; None leaves it out.
          parts: in how many parts each of `text` is encoded, one after the other. The gradient then keeps of each part
            products of matrices alone, or nothing (with `bert.remat`, or where these exceed `MOST_KEPT`), and makes the
            rest again when it comes to it.
        """
        each = [1] * len(text) if parts is None else parts
        keeps = not self.bert.remat and self._product_bytes(text) <= MOST_KEPT
        made = [self._in_parts(weights, tokens, key, n, keeps) for tokens, n in zip(text, each, strict=True)]
        return jnp.concatenate(made)

    def _product_bytes(self, text: Text) -> int:
        """Of what products give: in a layer queries, keys, values, two more of that width, and a wide one."""
        c = self.bert.config
        each = 5 * c.hidden_size + c.intermediate_size
        trained = c.num_hidden_layers - self.bert.frozen_below
        size = jnp.dtype(self.bert.dtype).itemsize
        return sum(int(tokens.ids.size) for tokens in text) * trained * each * size

    def _in_parts(self, weights: Any, tokens: Tokens, key: Array | None, parts: int, keeps: bool) -> Array:
        if parts == 1:
            return self._encode(weights, tokens, key)
        # What is made again is said by the loop: XLA on CPU pays no heed to it outside of one.
        policies = jax.checkpoint_policies
        policy = policies.save_only_these_names(SAVED) if keeps else policies.nothing_saveable
        plain = dataclasses.replace(self, bert=self.bert.clone(remat=False))
        part = jax.checkpoint(functools.partial(plain._encode, key=key), policy=policy, prevent_cse=False)
        # Every parts-th text: each device keeps its share of every part.
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tokens)
        vectors_PxUxE = jax.lax.map(lambda each: part(weights, each), split)
        return vectors_PxUxE.swapaxes(0, 1).reshape(-1, vectors_PxUxE.shape[-1])

    def _encode(self, weights: Any, tokens: Tokens, key: Array | None = None) -> Array:
        places_T = jnp.arange(tokens.ids.shape[1], dtype=jnp.int32)
        mask_UxT = (places_T[None, :] < tokens.lengths[:, None]).astype(jnp.int32)
        ids_UxT = constrain(tokens.ids, "batch", None)
        rngs = None if key is None else {"dropout": key}
        # The bits go by item and place, so that they are the same however items lie over devices.
        counters_UxT = tokens.items[:, None].astype(jnp.uint32) * jnp.uint32(4096)
        counters_UxT = counters_UxT + places_T[None, :].astype(jnp.uint32)
        hidden = self.bert.apply({"params": weights}, ids_UxT, mask_UxT, counters=counters_UxT, rngs=rngs)
        vector_UxE = pool(hidden, mask_UxT, self.pooling)
        return jnp.where(tokens.lengths[:, None] > 0, vector_UxE, 0.0)


class Fresh(NamedTuple):
    """Vectors that a step has just made, by item.

    Attributes:
      items: int32[U], ascending; `NOBODY` behind.
      vectors: float[U, E].
    """

    items: Array
    vectors: Array

    @classmethod
    def of(cls, text: Text, vectors_UxE: Array) -> "Fresh":
        """Brings them in order; all devices get all of them."""
        items_U = constrain(jnp.concatenate([tokens.items for tokens in text]), None)
        items_U = jnp.where(items_U == PAD, NOBODY, items_U)
        order_U = jnp.argsort(items_U)
        return cls(items_U[order_U], constrain(vectors_UxE, None, None)[order_U])

    def over(self, described: Described, ids: Array) -> Described:
        """What describes items `ids`, with their new vectors where there are any."""
        place = jnp.clip(jnp.searchsorted(self.items, ids), 0, self.items.shape[0] - 1)
        found = (self.items[place] == ids)[..., None]
        return {**described, TEXT: jnp.where(found, self.vectors[place], described[TEXT])}

    def over_rows(self, described: Described) -> Described:
        """What describes the rows of a whole table, with the new vectors in their places."""
        vectors_RxE = described[TEXT]
        rows = vectors_RxE.shape[0]
        first_U = jnp.concatenate([jnp.ones((1,), bool), self.items[1:] != self.items[:-1]])
        real_U = first_U & (self.items != NOBODY)
        # An item that two devices have encoded has two vectors that are the same; one of them counts.
        row_U = jnp.where(real_U, rows_of(jnp.where(real_U, self.items, PAD), rows), rows)
        return {**described, TEXT: vectors_RxE.at[row_U].set(self.vectors, mode="drop")}

    def distance(self, described: Described, ids: Array) -> Array:
        """How far vectors are from those of `described`, which were made earlier: mean of 1 - cosine over `ids`."""
        old, new = described[TEXT], self.over(described, ids)[TEXT]
        size = jnp.linalg.norm(old, axis=-1) * jnp.linalg.norm(new, axis=-1)
        real = size > 0
        cosine = jnp.sum(old * new, -1) / jnp.where(real, size, 1.0)
        return jnp.sum(jnp.where(real, 1 - cosine, 0.0)) / jnp.maximum(real.sum(), 1)
