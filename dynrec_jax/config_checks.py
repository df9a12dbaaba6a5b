"""What the values of a config must be, alone and beside each other."""

import math
from typing import Any

import ml_collections

from dynrec_jax.errors import ConfigError

CHOICES = {
    "data.windows": ("last", "random"),
    "model.name": ("bstm",),
    "model.block": ("prenorm", "seed", "hstu", "gru", "mean"),
    "model.positions": ("absolute", "relative", "none"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "block", "products"),
    "loss.kind": ("full", "sampled", "gbce"),
    "loss.sampler": ("uniform", "popularity", "in_batch", "mixed"),
    "mesh.tables": ("slice", "all"),
    "item.fusion": ("id", "text", "both", "ensemble"),
    "item.text_mode": ("frozen", "tuned"),
    "item.text_pooling": ("mean", "cls"),
    "train.row_optimizer": ("adam", "adagrad"),
    "evaluation.split": ("leave_one_out", "global_time"),
    "evaluation.targets": ("first", "last", "all", "random"),
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for a value that is out of range or contradicts another."""
    for key, choices in CHOICES.items():
        if _get(config, key) not in choices:
            raise ConfigError(f"config.{key}: {_get(config, key)!r} is not one of {', '.join(choices)}")
    _check_numbers(config)
    _check_items(config)
    _check_sight(config)
    _check_events(config)
    c = config
    if c.model.dropout == 1.0:
        raise ConfigError("config.model.dropout: 1.0 would drop everything; expected less than 1")
    for key in ("model.temperature", "model.feedforward", "train.learning_rate"):
        if _get(config, key) <= 0:
            raise ConfigError(f"config.{key}: {_get(config, key)!r}; expected a number greater than 0")
    if c.train.average != -1:
        _within(config, 0.0, 1.0, "train.average")
    for key in ("train.beta2", "train.average"):
        if _get(config, key) == 1.0:
            raise ConfigError(f"config.{key}: 1.0 would never forget; expected less than 1")
    if c.model.dim % c.model.heads:
        raise ConfigError(f"config.model.dim: {c.model.dim} does not divide by model.heads={c.model.heads}")
    if c.model.forward_weight + c.model.backward_weight == 0:
        raise ConfigError(
            "config.model: forward_weight and backward_weight are both 0; nothing would be trained"
        )
    if c.model.hops and c.loss.kind != "full":
        raise ConfigError(
            "config.model.hops: a refined query needs the whole catalogue; use loss.kind=full, or hops=0"
        )
    if c.loss.neighbours and c.loss.kind != "full":
        raise ConfigError(
            f"config.loss.neighbours: {c.loss.neighbours} shares a target in the softmax over all items; use "
            "loss.kind=full, or 0"
        )
    if c.train.accumulation and c.train.batch_size % c.train.accumulation:
        raise ConfigError(
            f"config.train.batch_size: {c.train.batch_size} does not divide by accumulation={c.train.accumulation}"
        )
    if not c.evaluation.ks or any(not isinstance(k, int) or k < 1 for k in c.evaluation.ks):
        raise ConfigError(f"config.evaluation.ks: {tuple(c.evaluation.ks)} must be integers from 1 up")
    names = [f"{m}@{k}" for k in c.evaluation.ks for m in ("ndcg", "recall", "coverage")] + ["mrr"]
    if c.evaluation.metric not in names:
        raise ConfigError(
            f"config.evaluation.metric: {c.evaluation.metric!r} is not one of {', '.join(names)}"
        )


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for a number that is out of range."""
    _at_least(
        config,
        1,
        *(
            "model.interests",
            "data.max_length",
            "data.prefetch",
            "model.dim",
            "model.layers",
            "model.heads",
            "loss.block_items",
        ),
        *("loss.block_positions", "loss.negatives", "train.steps", "train.batch_size"),
        *("train.checkpoint_every", "train.keep_last", "evaluation.batch_size", "logging.every"),
    )
    _at_least(
        config,
        0,
        "train.accumulation",
        "train.evaluate_every",
        "train.patience",
        "train.clip_norm",
        "train.weight_decay",
    )
    _at_least(config, 0, "mesh.slices", "model.attention_window")
    _within(config, 1, 2**16, "model.time_buckets")
    _at_least(config, 0, "model.forward_weight", "model.backward_weight", "model.hops")
    _at_least(config, 0, "model.neighbours", "model.shrinkage")
    _within(config, 0, 2**32 - 1, "seed")
    _within(config, 0.0, 1.0, "model.dropout", "train.warmup", "train.final_rate", "train.beta2")
    _within(config, 0.0, 1.0, "loss.uniform_share", "loss.calibration", "data.augmented", "data.crop")
    _within(config, 0.0, 0.9, "loss.neighbours")
    _within(config, 0.0, 0.9, "data.drop")
    _at_least(config, 0, "data.reorder")
    _within(config, 0.0, 0.9, "data.cold_items", "item.id_dropout", "item.text_dropout")
    _at_least(config, 0, "loss.alignment", "item.text_from", "item.text_rate")
    _at_least(config, 8, "item.text_tokens", "item.text_vocabulary")
    _at_least(config, 1, "item.text_refresh", "item.text_dim", "item.text_layers", "item.text_heads")
    for key, value in flat(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{key}: {value}; expected a finite number")
    _within(config, 0.0, 0.5, "evaluation.holdout")
    _at_least(config, 0, "evaluation.validation_from", "evaluation.test_from")
    e = config.evaluation
    if bool(e.validation_from) != bool(e.test_from) or e.validation_from > e.test_from:
        raise ConfigError(
            f"config.evaluation: validation_from={e.validation_from} and test_from={e.test_from}; expected both, the "
            "first no later than the second, or neither"
        )
    _within(config, 0.0, 1.0, "evaluation.recent")


def _check_sight(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where what is known of events contradicts itself."""
    m = config.model
    ways = ("bias", "rotary", "sinusoidal")
    if wrong := [name for name in m.time if name not in ways]:
        raise ConfigError(f"config.model.time: {wrong[0]!r} is not one of {', '.join(ways)}")
    if m.block == "mean" and {"bias", "rotary"} & set(m.time):
        raise ConfigError(
            "config.model.block: a mean has no weights that the times bias and rotary could change; leave them out"
        )
    if m.attention_window > config.data.max_length:
        raise ConfigError(
            f"config.model.attention_window: {m.attention_window} is more than "
            f"data.max_length={config.data.max_length}, the most that is ever trained; use no more"
        )
    if m.block == "gru" and (m.attention_window or {"bias", "rotary"} & set(m.time)):
        raise ConfigError(
            "config.model.block: a gru has no attention; leave out model.attention_window and the times bias and "
            "rotary (it can do with model.time=sinusoidal)"
        )
    if m.interests > 1 and (m.hops or config.item.fusion == "ensemble"):
        raise ConfigError(
            f"config.model.interests: {m.interests} vectors of a user are neither refined nor summed; use "
            "model.hops=0, and no ensemble"
        )
    if "rotary" in m.time and m.dim // m.heads % 2:
        raise ConfigError(
            f"config.model.time: rotary turns pairs of features, and each of {m.heads} heads has {m.dim // m.heads}; "
            "choose model.dim and model.heads so that it is even"
        )


def _check_events(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where event types are not named as they must be."""
    if any(not isinstance(name, str) or not name for name in config.data.target_events):
        raise ConfigError(
            f"config.data.target_events: {tuple(config.data.target_events)!r}; expected names of event types"
        )
    for text in config.loss.event_weights:
        name, _, number = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        try:
            good = bool(name) and 0 <= float(number) < math.inf
        except ValueError:
            good = False
        if not good:
            raise ConfigError(
                f'config.loss.event_weights: {text!r}; expected a type and its weight, such as "purchase:5"'
            )


def needs_times(config: ml_collections.ConfigDict) -> bool:
    """Whether the model cannot do without the events' times."""
    return bool(config.model.time) or bool(config.model.query_time)


def describes_items(config: ml_collections.ConfigDict) -> bool:
    """Whether items are more than their ids."""
    return bool(config.item.fusion != "id")


def serves_neighbours(config: ml_collections.ConfigDict) -> bool:
    """Whether what is served depends on which items are near each other in the histories that train."""
    return bool(config.model.neighbours or config.model.shrinkage)


def tunes_text(config: ml_collections.ConfigDict) -> bool:
    """Whether BERT is trained with the rest."""
    return describes_items(config) and bool(config.item.text) and bool(config.item.text_mode == "tuned")


def _check_items(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where what describes the items contradicts itself."""
    item = config.item
    for key in ("text", "attributes", "vectors"):
        if any(not isinstance(name, str) or not name for name in item[key]):
            raise ConfigError(f"config.item.{key}: {tuple(item[key])!r}; expected names of item columns")
    named = [f"item.{key}" for key in ("text", "attributes", "vectors", "triples") if item[key]]
    if describes_items(config) and not named:
        raise ConfigError(
            f"config.item.fusion: {item.fusion!r} needs something that describes the items; set item.text, "
            "item.attributes, item.vectors or item.triples"
        )
    if named and not describes_items(config):
        raise ConfigError(
            f"config.{named[0]}: is not looked at with item.fusion=id; use fusion text, both or ensemble"
        )
    if item.text and not item.bert and item.text_mode == "frozen":
        raise ConfigError(
            "config.item.bert: is empty, and a BERT of random weights says nothing while it is frozen; name a folder, "
            "or set item.text_mode=tuned"
        )
    if item.text_dim % item.text_heads:
        raise ConfigError(
            f"config.item.text_dim: {item.text_dim} does not divide by item.text_heads={item.text_heads}"
        )
    if config.loss.alignment and item.fusion != "both":
        raise ConfigError(
            f"config.loss.alignment: has two vectors to align with item.fusion=both alone, not {item.fusion!r}"
        )
    if item.fusion == "ensemble" and config.model.hops:
        raise ConfigError("config.model.hops: scores of an ensemble are summed and not refined; use hops=0")


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All keys with their full names, `{"train.steps": 2000, …}`."""
    return flattened(plain(config))


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _at_least(config: ml_collections.ConfigDict, low: int, *keys: str) -> None:
    for key in keys:
        if not _get(config, key) >= low:
            raise ConfigError(f"config.{key}: {_get(config, key)!r}; expected {low} or more")


def _within(config: ml_collections.ConfigDict, low: float, high: float, *keys: str) -> None:
    for key in keys:
        value = _get(config, key)
        if not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"config.{key}: {value!r}; expected a number from {low} to {high}")


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as dicts and lists."""
    return {
        key: plain(value)
        if isinstance(value, ml_collections.ConfigDict)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in config.items()
    }


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of dicts in dicts by their full names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(
            flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat
