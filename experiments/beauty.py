r"""Amazon Beauty (2014, 5-core): 22,363 users, 12,101 items, short histories, no times; 15 min of a core.

    dynrec prepare --source=sequences:sequences.txt --items=item2attributes.json --out=data/beauty
    dynrec train --config=experiments/beauty.py --config.seed=0 --workdir=runs/beauty/seed0
    dynrec evaluate --workdir=runs/beauty/seed0

Ids alone; the files are those that S3-Rec's authors published. `--config=experiments/beauty.py:NAME` changes one thing,
to see what it is worth: NAME is a key of `CHANGES`. What came out stands in README.md and in experiments/results.
"""

from dynrec_jax.config import default_config

ATTRIBUTES = {"item.attributes": ("attributes",), "item.id_dropout": 0.0}
SAMPLED = {"loss.kind": "sampled", "loss.sampler": "mixed", "loss.negatives": 2_048, "loss.neighbours": 0.0}
CHANGES = {
    "": {},
    # What only this model has.
    "backward": {"model.backward_weight": 0.5},
    "hops": {"model.hops": 1},
    "interests": {"model.interests": 4},
    # What describes an item.
    "attributes": {"item.fusion": "both", **ATTRIBUTES},
    "ensemble": {"item.fusion": "ensemble", **ATTRIBUTES},
    # The loss.
    "sampled": {**SAMPLED, "train.steps": 2_000},  # which take as long as those of the softmax over all
    "gbce": {"loss.kind": "gbce", "loss.negatives": 512, "loss.neighbours": 0.0},
    "normalised": {"model.normalise": True, "model.temperature": 0.005, "model.shrinkage": 0.0},
    # What counts of neighbours are worth: in all places, as what the loss teaches, and in what is served.
    "alone": {"loss.neighbours": 0.0, "model.neighbours": 0.0, "model.shrinkage": 0.0},
    "untaught": {"loss.neighbours": 0.0},
    "unserved": {"model.neighbours": 0.0, "model.shrinkage": 0.0},
    "unshrunk": {"model.shrinkage": 0.0},
    # The encoder.
    "seed": {"model.block": "seed"},
    "hstu": {"model.block": "hstu"},
    "gru": {"model.block": "gru", "model.positions": "absolute"},
    "absolute": {"model.positions": "absolute"},
    # What is read.
    "augmented": {"data.augmented": 0.5, "data.drop": 0.2, "data.reorder": 2},
    # The weights as the last step left them; and the width of most published models.
    "plain": {"train.average": 0.0},
    "narrow": {"model.dim": 64},
}


def get_config(change=""):
    if change not in CHANGES:
        raise ValueError(f"{change!r}: expected one of {', '.join(filter(None, CHANGES))}")
    c = default_config()
    c.dataset = "data/beauty"
    c.data.max_length = 50
    c.data.windows = "last"
    c.model.dim = 192
    c.model.heads = 4
    c.model.positions = "relative"
    c.model.backward_weight = 0.0
    c.model.dropout = 0.5
    c.model.neighbours = 1.0
    c.model.shrinkage = 3.0
    c.loss.neighbours = 0.2
    c.train.batch_size = 256
    c.train.steps = 1_050
    c.train.learning_rate = 1e-2
    c.train.weight_decay = 0.7
    c.train.average = 0.98
    c.train.checkpoint_every = 350
    c.train.evaluate_every = 175
    c.train.patience = 0
    c.update_from_flattened_dict(CHANGES[change])
    return c
