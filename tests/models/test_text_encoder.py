"""The text encoder in parts: the same vectors and gradients as in one, and less kept for the gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dynrec_jax.models import text_encoder
from dynrec_jax.models.bert import Bert
from dynrec_jax.models.bert_config import BertConfig
from dynrec_jax.models.text_encoder import TextEncoder, Tokens
from dynrec_jax.parallel.mesh import place_rows

from .. import tiny

TEXTS, LENGTH = 16, 6


def encoder(remat: bool = False) -> TextEncoder:
    sizes = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
    )
    return TextEncoder(Bert(sizes, dropout=0.2, remat=remat), "mean")


def tokens(seed: int, width: int) -> Tokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, TEXTS)
    ids = np.where(np.arange(width) < lengths[:, None], rng.integers(1, 30, (TEXTS, width)), 0)
    # Items go on from one width to the next, and the last one of each only fills up.
    items = np.arange(1, TEXTS + 1) + seed * TEXTS
    items[-1], ids[-1], lengths[-1] = 0, 0, 0
    return Tokens(*(np.asarray(x, np.int32) for x in (items, ids, lengths)))


TEXT = (tokens(0, LENGTH // 2), tokens(1, LENGTH))


@functools.cache
def weights() -> Any:
    return nn.meta.unbox(jax.jit(encoder().init)(jax.random.key(0)))


def loss(made: TextEncoder, parts: tuple[int, ...] | None, weights: Any, text: Any) -> Any:
    vectors = made.encode(weights, text, jax.random.key(1), parts)
    return jnp.sum(vectors * jnp.sin(jnp.arange(vectors.size)).reshape(vectors.shape)), vectors


@functools.cache
def expected() -> Any:
    return gradient(encoder(), None)


def gradient(made: TextEncoder, parts: tuple[int, ...] | None, text: Any = TEXT) -> Any:
    return jax.jit(jax.grad(functools.partial(loss, made, parts), has_aux=True))(weights(), text)


@pytest.mark.parametrize(("remat", "devices"), [(False, 1), (True, 4)])
def test_texts_in_parts_have_the_vectors_and_gradients_of_texts_in_one(remat: bool, devices: int):
    assert float(jnp.abs(expected()[1][1] - expected()[1][0]).max()) > 0.1  # texts are told apart
    mesh = tiny.mesh(devices, 1, 1)
    with jax.set_mesh(mesh):
        text = jax.tree.map(functools.partial(place_rows, mesh), TEXT)
        found = gradient(encoder(remat), (2, 4), text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected())


def test_the_gradient_of_parts_keeps_less(monkeypatch: pytest.MonkeyPatch):
    def kept(made: TextEncoder, parts: tuple[int, ...]) -> int:
        back = jax.eval_shape(
            lambda w: jax.vjp(functools.partial(loss, made, parts, text=TEXT), w)[1], weights()
        )
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    whole, products, nothing = kept(encoder(), (1, 1)), kept(encoder(), (4, 4)), kept(encoder(True), (4, 4))
    assert nothing < products < whole / 2
    monkeypatch.setattr(text_encoder, "MOST_KEPT", 0)
    assert kept(encoder(), (4, 4)) == nothing
