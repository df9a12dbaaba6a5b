"""A dynamic model and a static one on drifting interests: how soon recommendations follow a change.

The file's argument names the model: "dynamic", or "static", whose vector is the mean of the history. Trained on what
came before, and asked for every later event.

dynrec prepare --source=synthetic:users=2000,items=1000,seed=0 --out=data/drifting
dynrec train --config=experiments/drift.py:dynamic --workdir=runs/dynamic
dynrec evaluate --workdir=runs/dynamic --drift
"""

from dynrec_jax.config import default_config


def get_config(model="dynamic"):
    if model not in ("dynamic", "static"):
        raise ValueError(f"{model!r}: expected dynamic or static")
    c = default_config()
    c.dataset = "data/drifting"
    c.data.max_length = 50
    c.data.windows = "random"
    c.model.dropout = 0.3
    c.model.heads = 1
    c.model.backward_weight = 0.0
    c.model.positions = "absolute"
    if model == "static":
        c.model.block, c.model.positions, c.model.layers = "mean", "none", 1
    else:
        c.model.time, c.model.query_time = ("bias",), True
    c.evaluation.split, c.evaluation.holdout, c.evaluation.targets = "global_time", 0.15, "all"
    c.train.steps = 600
    c.train.learning_rate = 3e-3
    c.train.checkpoint_every = 200
    c.train.evaluate_every = 200
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    return c
