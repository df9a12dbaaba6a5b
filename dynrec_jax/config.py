"""Every config key with its default, unit and reason; experiment files state differences from this one.

Code never supplies a default: it reads `config.train.learning_rate`, and a key that is not here is an error. A
config is locked as soon as it is made, so an unknown key or a value of another type stops a run before any data
is opened.
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_collections

from dynrec_jax.errors import ConfigError

# Keys that may change between a run and its continuation: they move the work, not the result.
FREE_ON_RESUME = (
    "mesh",
    "logging",
    "compiled_dir",
    "data.cache_dir",
    "data.prefetch",
    "train.checkpoint_every",
    "train.keep_last",
    "evaluation.batch_size",
)

CHOICES = {
    "data.windows": ("last", "random"),
    "model.name": ("bstm",),
    "model.block": ("prenorm", "seed"),
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
}


def default_config() -> ml_collections.ConfigDict:
    """All keys with their defaults, locked."""
    c = ml_collections.ConfigDict()
    c.dataset = ""  # the dataset folder that `dynrec prepare` wrote
    c.seed = 0  # initial weights, order of the histories, dropout, negatives
    c.compiled_dir = ""  # compiled programs, for the next start; empty: in the cache; "off": none are kept

    c.data = ml_collections.ConfigDict()
    c.data.max_length = 200  # events of a history that the encoder reads
    c.data.windows = "last"  # of a longer history: its end, or a window drawn anew each time ("random")
    c.data.items = 0  # a catalogue's size in place of a dataset, for planning without data
    c.data.cache_dir = ""  # memory-mapped copies of the shards; empty: ~/.cache/dynrec_jax
    c.data.prefetch = 4  # batches assembled ahead of the device
    # Share of the items that no training history has, as if they came later; `evaluate` tells how they are found.
    c.data.cold_items = 0.0

    c.model = ml_collections.ConfigDict()
    c.model.name = "bstm"
    c.model.dim = 64  # D, of users and of items alike
    c.model.layers = 2
    c.model.heads = 2
    c.model.block = "prenorm"  # one of models.layers.BLOCKS
    c.model.feedforward = 4.0  # hidden width of the feed-forward as a multiple of D
    c.model.dropout = 0.2
    c.model.normalise = False  # unit-length user and item vectors in ABRA
    c.model.temperature = 0.1  # divides ABRA's logits, next to sqrt(d_u + d_v)
    c.model.hops = 0  # how often ABRA's mixture refines the query
    c.model.forward_weight = 1.0  # of the traversal that predicts the next item
    c.model.backward_weight = 0.5  # of the traversal that predicts the previous item; 0 leaves it out
    c.model.dtype = "float32"  # of activations and matrix products; parameters stay float32
    # What the gradient computes again instead of keeping it: nothing; all of a "block", a third more work; or all but
    # "products" of matrices and attention's means, little more work. Of a BERT that is trained nothing is kept but for
    # "none".
    c.model.remat = "none"
    c.model.scan_layers = False  # one program for all blocks but the last: compiled once, however many layers

    c.item = ml_collections.ConfigDict()
    # What an item's vector is made of: its "id" alone; what the towers below say of it ("text": text, attributes,
    # vectors, triples); "both", weighed by a learned gate; or the summed scores of two models, one of ids and one of
    # the towers ("ensemble").
    c.item.fusion = "id"
    # "both", "ensemble": share of the items that a step sees without their id, so that the rest must speak, and so that
    # the vector of items of which nothing is known is learned.
    c.item.id_dropout = 0.1
    c.item.text = ()  # text columns of the items, joined in this order
    c.item.bert = (
        ""  # folder of a Hugging Face BERT, or a hub's id; empty: one of random weights, to be tuned
    )
    c.item.text_mode = "frozen"  # text vectors computed once, or BERT "tuned" with the rest
    c.item.text_from = (
        0  # "tuned": layers from here on, counted from 0; all of it, embeddings included, for 0
    )
    c.item.text_tokens = 64  # of an item's text at most
    c.item.text_pooling = "mean"  # over an item's tokens, or the vector of the first one ("cls")
    c.item.text_refresh = (
        200  # "tuned": steps after which vectors of items that a batch has not are made anew
    )
    c.item.text_rate = 0.05  # "tuned": BERT's learning rate as a share of train.learning_rate
    c.item.text_dropout = 0.1  # "tuned": inside of BERT
    c.item.text_vocabulary = 8192  # without a `bert` folder: words of a tokenizer trained on the items' text
    c.item.text_dim = 128  # without a `bert` folder: its width,
    c.item.text_layers = 2  # layers
    c.item.text_heads = 2  # and heads
    # Columns of attribute sets; a text column is one attribute, or several with a separator: "genres:,".
    c.item.attributes = ()
    c.item.vectors = ()  # columns of dense vectors
    c.item.triples = False  # whether the dataset's knowledge graph describes the items

    c.loss = ml_collections.ConfigDict()
    # Softmax over the whole catalogue; softmax over the target and negatives ("sampled"); or binary cross-entropy
    # over them, generalised so that few negatives do not make a model too sure of itself ("gbce").
    c.loss.kind = "full"
    c.loss.block_items = 8192  # catalogue rows that a device scores at a time
    # Positions that are scored at a time: of a slice, one of each device at least ("full"); of a device (the others).
    c.loss.block_positions = 512
    c.loss.negatives = 512  # negatives that a batch shares
    # Where negatives come from: all items alike; training counts ("popularity"); events of the batch ("in_batch"); or
    # both, so that items that no batch has are seen too ("mixed").
    c.loss.sampler = "uniform"
    c.loss.uniform_share = 0.5  # "mixed": share of the negatives that are uniform
    c.loss.logq = True  # "sampled": correct for how likely a negative was drawn
    c.loss.calibration = (
        0.75  # "gbce": its t, from 0, plain cross-entropy, to 1, probabilities as without sampling
    )
    # "both": weight of telling an item's id vector by its other vector, in the catalogue or among the negatives.
    c.loss.alignment = 0.0

    c.train = ml_collections.ConfigDict()
    c.train.steps = 5_000  # optimizer steps
    c.train.batch_size = 128  # histories a step, over all devices
    # Parts that a batch is computed in, one after the other. 0: on CPU as many as keep a part near 4,096 positions,
    # which takes 0.6 of the memory of a small catalogue and no more time (each further part holds one more gradient
    # of the table, however many there are); elsewhere one. The texts of a batch fall into as many, or, for 0, into
    # parts near 2,048 tokens on CPU.
    c.train.accumulation = 0
    c.train.learning_rate = 1e-3  # at its peak
    c.train.warmup = 0.05  # share of the steps in which the rate rises from 0
    c.train.final_rate = 0.05  # share of the peak that is left at the end of the cosine
    c.train.weight_decay = 0.01  # of matrices of the encoder; never of item tables, norms or biases
    c.train.clip_norm = 1.0  # of the whole gradient; 0 does not clip
    c.train.beta2 = 0.98  # Adam's second moment: recent enough for rates that fall
    c.train.row_optimizer = "adam"  # of table rows where only touched rows move (all losses but "full")
    c.train.checkpoint_every = 500  # steps
    c.train.evaluate_every = 500  # steps; 0 evaluates after the last one alone
    c.train.keep_last = 2  # checkpoints kept beside the best one
    c.train.patience = 0  # evaluations without a better metric until the run stops; 0 never stops early

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.split = "leave_one_out"  # or "global_time"
    c.evaluation.holdout = (
        0.1  # "global_time": share of the events after the test cut, and again for validation
    )
    c.evaluation.filter_seen = True  # items of the history are not recommended
    c.evaluation.ks = (1, 5, 10, 20, 50, 100)
    c.evaluation.metric = "ndcg@10"  # chooses the checkpoint, on validation
    c.evaluation.batch_size = 256  # users at a time
    c.evaluation.recent = (
        0.1  # "recent popularity" counts training events among the latest share of all events
    )

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices of a slice along each axis; -1 takes those that are left
    c.mesh.fsdp = 1  # histories and dense weights lie over this axis
    c.mesh.tensor = 1  # heads and hidden units lie over this axis
    c.mesh.slices = 0  # groups of devices with a fast network inside; 0: as the devices say
    c.mesh.tables = (
        "slice"  # rows of item tables over the devices of a slice, a replica in each; or over "all"
    )

    c.logging = ml_collections.ConfigDict()
    c.logging.every = 50  # steps between lines of metrics
    c.logging.tensorboard = False  # needs the extra "tensorboard"
    return c.lock()


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for a value that is out of range or contradicts another."""
    for key, choices in CHOICES.items():
        if _get(config, key) not in choices:
            raise ConfigError(f"config.{key}: {_get(config, key)!r} is not one of {', '.join(choices)}")
    _check_numbers(config)
    _check_items(config)
    c = config
    if c.model.dropout == 1.0:
        raise ConfigError("config.model.dropout: 1.0 would drop everything; expected less than 1")
    for key in ("model.temperature", "model.feedforward", "train.learning_rate"):
        if _get(config, key) <= 0:
            raise ConfigError(f"config.{key}: {_get(config, key)!r}; expected a number greater than 0")
    if c.train.beta2 == 1.0:
        raise ConfigError("config.train.beta2: 1.0 would never forget; expected less than 1")
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
        *("data.max_length", "data.prefetch", "model.dim", "model.layers", "model.heads", "loss.block_items"),
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
    _at_least(config, 0, "mesh.slices")
    _at_least(config, 0, "model.forward_weight", "model.backward_weight", "model.hops")
    _within(config, 0, 2**32 - 1, "seed")
    _within(config, 0.0, 1.0, "model.dropout", "train.warmup", "train.final_rate", "train.beta2")
    _within(config, 0.0, 1.0, "loss.uniform_share", "loss.calibration")
    _within(config, 0.0, 0.9, "data.cold_items", "item.id_dropout", "item.text_dropout")
    _at_least(config, 0, "loss.alignment", "item.text_from", "item.text_rate")
    _at_least(config, 8, "item.text_tokens", "item.text_vocabulary")
    _at_least(config, 1, "item.text_refresh", "item.text_dim", "item.text_layers", "item.text_heads")
    for key, value in flat(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{key}: {value}; expected a finite number")
    _within(config, 0.0, 0.5, "evaluation.holdout")
    _within(config, 0.0, 1.0, "evaluation.recent")


def describes_items(config: ml_collections.ConfigDict) -> bool:
    """Whether items are more than their ids."""
    return bool(config.item.fusion != "id")


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


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON text with sorted keys."""
    return json.dumps(_plain(config), indent=2, sort_keys=True) + "\n"


def from_json(path: Path) -> ml_collections.ConfigDict:
    """A config written by `to_json`; data, never executed.

    Raises:
      ConfigError: the file is missing, not JSON, or has keys that this version does not know.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a run folder made by `dynrec train`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path}: not readable as JSON ({error}); expected what `dynrec train` wrote"
        ) from None
    config = default_config()
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: holds a {type(stored).__name__}; expected a JSON object of config keys")
    _fill(config, stored, path, "")
    if missing := sorted(flat(config).keys() - _flat(stored).keys()):
        raise ConfigError(f"{path}: has no {', '.join(missing)}; it was written by another version")
    validate(config)
    return config


def difference(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """The keys whose values differ and may not differ on resume, as `key: old -> new`."""
    before, after = flat(old), flat(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME):
            continue
        if before.get(key) != after.get(key):
            lines.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    return lines


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All keys with their full names, `{"train.steps": 5000, …}`."""
    return _flat(_plain(config))


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


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return {
        key: _plain(value)
        if isinstance(value, ml_collections.ConfigDict)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in config.items()
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _fill(config: ml_collections.ConfigDict, stored: dict[str, Any], path: Path, prefix: str) -> None:
    for key, value in stored.items():
        if key not in config:
            raise ConfigError(f"{path}: unknown key {prefix}{key}; it was written by another version")
        if isinstance(config[key], ml_collections.ConfigDict):
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {prefix}{key} is {value!r}; expected a JSON object")
            _fill(config[key], value, path, f"{prefix}{key}.")
            continue
        try:
            config[key] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise ConfigError(f"{path}: {prefix}{key}: {error}") from None
