"""Every config key with its default, unit and reason; experiment files state differences from this one.

Code never supplies a default: it reads `config.train.learning_rate`, and a key that is not here is an error. A
config is locked as soon as it is made, so an unknown key or a value of another type stops a run before any data
is opened.
"""

import json
from pathlib import Path
from typing import Any

import ml_collections

from dynrec_jax.config_checks import (
    CHOICES,
    describes_items,
    flat,
    flattened,
    needs_times,
    plain,
    serves_neighbours,
    tunes_text,
    validate,
)
from dynrec_jax.errors import ConfigError

__all__ = [
    "CHOICES", "FREE_ON_RESUME", "default_config", "describes_items", "difference", "flat", "from_json", "needs_times",
    "serves_neighbours", "to_json", "tunes_text", "validate",
]  # fmt: skip

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


def default_config() -> ml_collections.ConfigDict:
    """All keys with their defaults, locked."""
    c = ml_collections.ConfigDict()
    c.dataset = ""  # the dataset folder that `dynrec prepare` wrote
    c.seed = 0  # initial weights, order of the histories, dropout, negatives
    c.compiled_dir = ""  # compiled programs, for the next start; empty: in the cache; "off": none are kept

    c.data = ml_collections.ConfigDict()
    c.data.max_length = 200  # events of a history that the encoder reads
    c.data.windows = "random"  # of a longer history: a window drawn anew each time, or its end ("last")
    # Share of the windows that are augmented, each time anew: of its events a part in one piece (`crop`, 1: all of
    # them), some left out (`drop`, the share), and moved by so many places at most (`reorder`).
    c.data.augmented = 0.0
    c.data.crop = 1.0
    c.data.drop = 0.0
    c.data.reorder = 0
    c.data.items = 0  # a catalogue's size in place of a dataset, for planning without data
    c.data.cache_dir = ""  # memory-mapped copies of the shards; empty: ~/.cache/dynrec_jax
    c.data.prefetch = 4  # batches assembled ahead of the device
    # Event types that are predicted and asked for, such as ("purchase",); histories keep the others. Empty: all.
    c.data.target_events = ()
    # Share of the items that no training history has, as if they came later; `evaluate` tells how they are found.
    c.data.cold_items = 0.0

    c.model = ml_collections.ConfigDict()
    c.model.name = "bstm"
    c.model.dim = 64  # D, of users and of items alike
    c.model.layers = 2
    c.model.heads = 2
    # One of models.blocks.BLOCKS: "hstu" attends pointwise behind a gate, a "gru" does not attend, and "mean" is what a
    # model without dynamics would do.
    c.model.block = "prenorm"
    # Where an event stands: attention's bias by the events between two ("relative"), with which a user's state can be
    # continued forever; a learned vector of each of the `data.max_length` positions ("absolute"); or "none". For a
    # "gru" and a "mean", which have no such attention, "relative" is "none".
    c.model.positions = "relative"
    # How time is told, any of: attention's "bias" by the time between events; queries and keys turned by it ("rotary");
    # clocks' hands added to each event ("sinusoidal").
    c.model.time = ()
    c.model.time_buckets = 64  # "bias": kinds of gaps, from a second to 68 years, in equal ratios
    # Whether the model is told when the next event is asked for: its own time in training and evaluation, that of the
    # request in scoring.
    c.model.query_time = False
    c.model.events = False  # whether the history's event types are told
    c.model.attention_window = 0  # events that attention looks at in each layer, its own included; 0: all
    c.model.feedforward = 4.0  # hidden width of the feed-forward as a multiple of D
    c.model.dropout = 0.4
    c.model.normalise = False  # unit-length user and item vectors in ABRA
    c.model.temperature = 0.1  # divides ABRA's logits, next to sqrt(d_u + d_v)
    # Vectors of a user: each target trains the one that scores it highest, and an item's score is that of the best one.
    c.model.interests = 1
    c.model.hops = 0  # how often ABRA's mixture refines the query
    # Weight of counts in what is served: items that were near the user's last ones in the histories that train are
    # scored higher, by this times log(1 + 10 · their weight). It changes nothing in training.
    c.model.neighbours = 0.0
    # In what is served, an item's vector is drawn to the mean of its neighbours', as if that had been seen in so many
    # events of the item: the rarer it is, the more. It changes nothing in training.
    c.model.shrinkage = 0.0
    c.model.forward_weight = 1.0  # of the traversal that predicts the next item
    c.model.backward_weight = 0.0  # of the traversal that predicts the previous item; 0 leaves it out
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
    c.item.text_rate = 0.005  # "tuned": BERT's learning rate as a share of train.learning_rate
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
    c.loss.event_weights = ()  # of targets by their event type, such as ("purchase:5", "view:0.2"); others count 1
    c.loss.negatives = 512  # negatives that a batch shares
    # Where negatives come from: all items alike; training counts ("popularity"); events of the batch ("in_batch"); or
    # both, so that items that no batch has are seen too ("mixed"). Of few negatives, "mixed" learns the most; "uniform"
    # alone needs no counts of the whole catalogue.
    c.loss.sampler = "uniform"
    c.loss.uniform_share = 0.5  # "mixed": share of the negatives that are uniform
    c.loss.logq = True  # "sampled": correct for how likely a negative was drawn
    c.loss.calibration = (
        0.75  # "gbce": its t, from 0, plain cross-entropy, to 1, probabilities as without sampling
    )
    # "full": share of each target that goes to the items that were near the user's last ones in the histories that
    # train, so that rare items learn from counts too; counted once, by process 0, from all histories.
    c.loss.neighbours = 0.0
    # "both": weight of telling an item's id vector by its other vector, in the catalogue or among the negatives.
    c.loss.alignment = 0.0

    c.train = ml_collections.ConfigDict()
    c.train.steps = 2_000  # optimizer steps
    c.train.batch_size = 128  # histories a step, over all devices
    # Parts that a batch is computed in, one after the other. 0: on CPU as many as keep a part near 4,096 positions,
    # which takes 0.6 of the memory of a small catalogue and no more time (each further part holds one more gradient
    # of the table, however many there are); elsewhere one. The texts of a batch fall into as many, or, for 0, into
    # parts near 2,048 tokens on CPU.
    c.train.accumulation = 0
    c.train.learning_rate = 8e-3  # at its peak
    c.train.warmup = 0.05  # share of the steps in which the rate rises from 0
    c.train.final_rate = 0.05  # share of the peak that is left at the end of the cosine
    c.train.weight_decay = 0.3  # of matrices of the encoder; never of item tables, norms or biases
    c.train.clip_norm = 1.0  # of the whole gradient; 0 does not clip
    c.train.beta2 = 0.98  # Adam's second moment: recent enough for rates that fall
    # Decay of running means of all weights, which are evaluated and served in place of the last ones; 0: none are kept.
    # -1: 0.99 with the softmax over all items, whose steps pass over the whole table anyway, and none with the others.
    c.train.average = -1.0
    c.train.row_optimizer = "adam"  # of table rows where only touched rows move (all losses but "full")
    c.train.checkpoint_every = 500  # steps
    c.train.evaluate_every = 200  # steps; 0 evaluates after the last one alone
    c.train.keep_last = 2  # checkpoints kept beside the best one
    c.train.patience = 0  # evaluations without a better metric until the run stops; 0 never stops early

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.split = "leave_one_out"  # or "global_time"
    c.evaluation.holdout = (
        0.1  # "global_time": share of the events after the test cut, and again for validation
    )
    # "global_time": the moments (seconds since 1970) from which validation and test events lie; 0: as `holdout` says.
    c.evaluation.validation_from = 0
    c.evaluation.test_from = 0
    # "global_time": which of a user's events of a period are asked for, each given all before it: the "first", the
    # "last", "all" one after the other, or one at "random".
    c.evaluation.targets = "first"
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
    c.logging.wandb = ""  # a project of Weights & Biases; needs the extra "wandb"
    c.logging.mlflow = ""  # an experiment of MLflow, where MLFLOW_TRACKING_URI says; needs the extra "mlflow"
    c.logging.group = ""  # what runs belong together there; of a sweep's trials, the sweep
    return c.lock()


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON text with sorted keys."""
    return json.dumps(plain(config), indent=2, sort_keys=True) + "\n"


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
    if missing := sorted(flat(config).keys() - flattened(stored).keys()):
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
