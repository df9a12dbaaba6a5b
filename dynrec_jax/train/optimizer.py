"""Optimizers and the learning rate, from the config."""

from typing import Any

import jax
import ml_collections
import optax

from dynrec_jax.config import tunes_text
from dynrec_jax.models.text_encoder import BERT
from dynrec_jax.parallel.rows import RowOptimizer, lazy_adam, rowwise_adagrad

BETA1 = 0.9


def make_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then a cosine down to `final_rate` of the peak."""
    t = config.train
    warmup = round(t.warmup * t.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else t.learning_rate,
        peak_value=t.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(t.steps, warmup + 1),
        end_value=t.final_rate * t.learning_rate,
    )


def decay_mask(tree: Any) -> Any:
    """True for what decays: matrices of the encoder; no item tables, embeddings, norms or biases, and nothing of BERT.

    Its weights come from elsewhere, or some of them are fixed: zero is not where they should go.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [getattr(part, "key", getattr(part, "name", "")) for part in path]
        # By name, not by axes: a scan over blocks gives each leaf one more.
        return "params" in names and names[-1] == "kernel" and BERT not in names

    return jax.tree_util.tree_map_with_path(decays, tree)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019). Clipping is the step's work: it must count table rows too."""
    t = config.train
    adam = optax.adamw(
        make_schedule(config), b1=BETA1, b2=t.beta2, weight_decay=t.weight_decay, mask=decay_mask
    )
    if not tunes_text(config):
        return adam
    # BERT's own rate: of a fraction, so that what it knows is not lost before the rest knows anything.
    return optax.chain(adam, optax.masked(optax.scale(config.item.text_rate), _is_bert))


def _is_bert(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(part, "key", "") == BERT for part in path), tree
    )


def make_row_optimizer(config: ml_collections.ConfigDict) -> RowOptimizer:
    """The optimizer of table rows where only touched rows move."""
    if config.train.row_optimizer == "adam":
        return lazy_adam(BETA1, config.train.beta2)
    return rowwise_adagrad()
