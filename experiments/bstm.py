"""BSTM with both traversals on MovieLens-1M: as ml1m.py, and each history is read backward as well.

    dynrec prepare --source=sequences:sequences.txt --out=data/ml-1m
    dynrec train --config=experiments/bstm.py --workdir=runs/bstm

A step costs about twice that of ml1m.py; what is served counts no neighbours (`ml1m.py:backward` does).
"""

from dynrec_jax.config import default_config


def get_config():
    c = default_config()
    c.dataset = "data/ml-1m"
    c.data.max_length = 200
    c.data.windows = "random"
    c.model.dim = 128
    c.model.heads = 1
    c.model.positions = "relative"
    c.model.dropout = 0.3
    c.model.backward_weight = 0.5
    c.train.steps = 1_500
    c.train.learning_rate = 6e-3
    c.train.average = 0.99
    c.train.checkpoint_every = 150
    c.train.evaluate_every = 150
    c.train.weight_decay = 0.01
    return c
