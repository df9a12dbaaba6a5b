"""BERT (Devlin et al. 2019): the encoder of texts, in the sizes and with the names of Hugging Face's checkpoints.

Word, position and type embeddings, a layer norm, then layers of bidirectional attention and a feed-forward, each
normalised behind its sum. There is no pooler and no head: what a checkpoint has of those is left out.
`from_pretrained` and `save_pretrained` read and write the folders, see `bert_weights`.

More dimensions in names: N texts, T tokens of a text, V vocabulary.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynrec_jax.models.attention import NEVER
from dynrec_jax.models.bert_config import BertConfig, read_config
from dynrec_jax.models.bert_weights import read_weights, resolve, write_weights
from dynrec_jax.models.layers import Dense, Dropout, LayerNorm
from dynrec_jax.parallel.counters import token_counters
from dynrec_jax.parallel.rules import constrain

Array = jax.Array
Pooling = Literal["cls", "mean"]
small = nn.initializers.normal(0.02)


def _gelu_tanh(x: Array) -> Array:
    return nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)


# The names of `bert_config.ACTIVATIONS`. The first is the paper's, by the error function.
ACTIVATION: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": nn.relu,
}


class BiasedDense(Dense):
    """`Dense` with a bias, float32, added in the type of the product."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.names[self.inputs :])
        bias = self.param("bias", init, self.features, jnp.float32)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class SelfAttention(nn.Module):
    """Multi-head attention of each token to all real tokens of its text; `[N, T, D]` to `[N, T, D]`.

    Attributes:
      heads: H.
      dtype: of products; scores and softmax are float32.
      dropout: rate at which weights are dropped.
    """

    heads: int
    dtype: Any
    dropout: float

    @nn.compact
    def __call__(self, x_NxTxD: Array, mask_NxT: Array, counters_NxT: Array) -> Array:
        dim = x_NxTxD.shape[-1]
        each = dim // self.heads

        def project(name: str) -> Array:
            kernel = BiasedDense((self.heads, each), ("embed", "heads", "head_dim"), self.dtype, name=name)
            return kernel(x_NxTxD).swapaxes(1, 2)

        q_NxHxTxE, k_NxHxTxE, v_NxHxTxE = project("query"), project("key"), project("value")
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        s_NxHxTxK = product("nhqe,nhke->nhqk", q_NxHxTxE, k_NxHxTxE) * each**-0.5
        p_NxHxTxK = jax.nn.softmax(jnp.where(mask_NxT[:, None, None, :], s_NxHxTxK, NEVER), axis=-1)
        if self.dropout and self.has_rng("dropout"):
            # The token's heads inside of the keys: a key's bits do not depend on how many follow it.
            n, h, t, k = p_NxHxTxK.shape
            p_NxTxKH = p_NxHxTxK.transpose(0, 2, 3, 1).reshape(n, t, k * h)
            p_NxTxKH = Dropout(self.dropout, name="dropout")(p_NxTxKH, counters_NxT)
            p_NxHxTxK = p_NxTxKH.reshape(n, t, k, h).transpose(0, 3, 1, 2)
        y_NxHxTxE = product("nhqk,nhke->nhqe", p_NxHxTxK.astype(self.dtype), v_NxHxTxE).astype(self.dtype)
        out = BiasedDense((dim,), ("heads", "head_dim", "embed"), self.dtype, inputs=2, name="out")
        return out(y_NxHxTxE.swapaxes(1, 2))


class Layer(nn.Module):
    """Attention and a feed-forward, each added to what it read and normalised behind the sum."""

    config: BertConfig
    dtype: Any
    dropout: float

    @nn.compact
    def __call__(self, x_NxTxD: Array, mask_NxT: Array, counters_NxT: Array) -> Array:
        c = self.config
        attention = SelfAttention(c.num_attention_heads, self.dtype, self.dropout, name="attention")
        a_NxTxD = Dropout(self.dropout)(attention(x_NxTxD, mask_NxT, counters_NxT), counters_NxT)
        x_NxTxD = LayerNorm(c.layer_norm_eps, name="attention_norm")(x_NxTxD + a_NxTxD)
        up = BiasedDense((c.intermediate_size,), ("embed", "hidden"), self.dtype, name="up")
        h_NxTxF = ACTIVATION[c.hidden_act](up(x_NxTxD))
        down = BiasedDense((c.hidden_size,), ("hidden", "embed"), self.dtype, name="down")
        y_NxTxD = Dropout(self.dropout)(down(h_NxTxF), counters_NxT)
        return LayerNorm(c.layer_norm_eps, name="feedforward_norm")(x_NxTxD + y_NxTxD)


class Bert(nn.Module):
    """Last hidden states of texts, `[N, T, D]` of type `dtype`, from token ids `int32[N, T]` and a mask of real tokens.

    What stands at padding is finite and means nothing; it never reaches a real token. A text without any token is all
    padding. On a mesh, N divides by the devices that "batch" lies over.

    Dropout is active where the rng stream "dropout" is given. Its bits come from `counters`, uint32[N, T]: give texts
    numbers of their own there (`token_counters`) where they may lie in other rows; the default goes by row and place.

    Attributes:
      config: sizes, of a checkpoint or one's own.
      dtype: of activations and products. Parameters, norms, scores and softmax are float32.
      remat: whether the gradient computes each layer again from its input.
      frozen_below: the first layer that trains, counted from 0. 0: everything trains, the embeddings too. n from 1 to
        the number of layers: the embeddings and layers 0 … n - 1 are fixed, get no gradient and have no dropout.
        Weight decay would still move them: see `frozen_mask`.
      dropout: rate, of embeddings, attention's weights and what each half of a layer adds. A checkpoint's own rates
        are not used.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    remat: bool = False
    frozen_below: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        counters: Array | None = None,
    ) -> Array:
        layers = self.config.num_hidden_layers
        if not 0 <= self.frozen_below <= layers:
            raise ValueError(
                f"frozen_below={self.frozen_below}: expected 0 to {layers}, the number of layers"
            )
        if counters is None:
            row_N, place_T = (jnp.arange(size, dtype=jnp.int32) for size in input_ids.shape)
            counters = token_counters(row_N[:, None], place_T[None, :])
        mask_NxT = attention_mask.astype(bool)
        x_NxTxD = self._embed(input_ids, token_type_ids, counters)
        layer_class = nn.remat(Layer) if self.remat else Layer
        for index in range(layers):
            fixed = index < self.frozen_below
            if index and index == self.frozen_below:
                x_NxTxD = jax.lax.stop_gradient(x_NxTxD)
            rate = 0.0 if fixed else self.dropout
            layer = (Layer if fixed else layer_class)(self.config, self.dtype, rate, name=f"layer_{index}")
            x_NxTxD = constrain(layer(x_NxTxD, mask_NxT, counters), "batch", None, None)
        return jax.lax.stop_gradient(x_NxTxD) if self.frozen_below == layers else x_NxTxD

    def _embed(self, ids_NxT: Array, types_NxT: Array | None, counters_NxT: Array) -> Array:
        c, length = self.config, ids_NxT.shape[1]
        if length > c.max_position_embeddings:
            raise ValueError(f"texts of {length} tokens: the model has {c.max_position_embeddings} positions")

        def table(name: str, rows: int) -> Array:
            init = nn.with_logical_partitioning(small, (None, "embed"))
            # Whole on each device: looked up where its features lie apart, the result would have to be put together.
            return constrain(self.param(name, init, (rows, c.hidden_size), jnp.float32), None, None)

        # An id that the table does not have gives NaN, which stops a run; clamped, it would be another word.
        x_NxTxD = jnp.take(table("word", c.vocab_size), ids_NxT, axis=0, mode="fill")
        x_NxTxD = x_NxTxD + table("position", c.max_position_embeddings)[None, :length]
        type_VxD = table("type", c.type_vocab_size)
        if types_NxT is None:
            x_NxTxD = x_NxTxD + type_VxD[:1][None]
        else:
            x_NxTxD = x_NxTxD + jnp.take(type_VxD, types_NxT, axis=0, mode="fill")
        x_NxTxD = LayerNorm(c.layer_norm_eps, name="embedding_norm")(x_NxTxD)
        rate = self.dropout if self.frozen_below == 0 else 0.0
        x_NxTxD = Dropout(rate, name="embedding_dropout")(x_NxTxD, counters_NxT).astype(self.dtype)
        return constrain(x_NxTxD, "batch", None, None)


def pool(hidden_NxTxD: Array, mask_NxT: Array, how: Pooling) -> Array:
    """A text's vector, float32[N, D]: the state of its first token, or the mean over its real tokens.

    A text without any token gets zeros.
    """
    mask_NxT = mask_NxT.astype(bool)
    if how == "cls":
        return jnp.where(mask_NxT[:, :1], hidden_NxTxD[:, 0].astype(jnp.float32), 0.0)
    if how == "mean":
        sum_NxD = jnp.where(mask_NxT[..., None], hidden_NxTxD.astype(jnp.float32), 0.0).sum(axis=1)
        return sum_NxD / jnp.maximum(mask_NxT.sum(axis=1), 1).astype(jnp.float32)[:, None]
    raise ValueError(f"pooling {how!r}: expected 'cls' or 'mean'")


def frozen_mask(params: Any, frozen_below: int) -> Any:
    """Bools in the shape of a Bert's params: True where `frozen_below` fixes a weight.

    A gradient of zero alone does not keep a weight where it is: weight decay moves it.
    """

    def is_fixed(name: str) -> bool:
        return (
            int(name.removeprefix("layer_")) < frozen_below if name.startswith("layer_") else frozen_below > 0
        )

    return {name: jax.tree.map(lambda _, name=name: is_fixed(name), part) for name, part in params.items()}


def from_pretrained(
    folder: str | Path,
    dtype: Any = jnp.float32,
    remat: bool = False,
    frozen_below: int = 0,
    dropout: float = 0.0,
) -> tuple[Bert, dict[str, Any]]:
    """The model of a Hugging Face BERT folder, and its variables `{"params": float32 arrays}`.

    `module.apply(variables, input_ids, attention_mask)` gives the last hidden states `[N, T, D]`.

    Args:
      folder: with `config.json` and safetensors; or a name on the hub, `owner/model`, which is downloaded.
      dtype: see `Bert`, as the others.
      remat: recompute layers for the gradient.
      frozen_below: the first layer that trains.
      dropout: rate.

    Raises:
      DataError: the folder is missing, damaged, or holds another model.
      ConfigError: there is no such folder, and the hub does not give it.
    """
    folder = resolve(folder)
    config = read_config(folder)
    params = jax.tree.map(jnp.asarray, read_weights(folder, config))
    return Bert(config, dtype, remat, frozen_below, dropout), {"params": params}


def save_pretrained(module: Bert, variables: Any, folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors`, which PyTorch's `BertModel.from_pretrained` reads."""
    write_weights(folder, module.config, nn.meta.unbox(variables["params"]))
