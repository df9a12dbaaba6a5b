"""A recurrent model in the manner of GRU4Rec (Hidasi et al. 2016) as a config: one GRU over the history.

dynrec train --config=experiments/gru.py --config.dataset=data/shop --workdir=runs/gru
"""

from dynrec_jax.config import default_config


def get_config():
    c = default_config()
    c.dataset = "data/shop"
    c.data.windows = "last"
    c.model.block, c.model.positions, c.model.layers = "gru", "none", 1
    c.model.backward_weight = 0.0
    c.model.dropout = 0.2
    c.train.steps = 3_000
    c.train.checkpoint_every = 250
    c.train.evaluate_every = 250
    c.train.average = 0.0
    c.train.learning_rate = 1e-3
    c.train.weight_decay = 0.01
    return c
