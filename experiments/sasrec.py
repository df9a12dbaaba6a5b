"""SASRec (Kang & McAuley 2018) as a config: a causal Transformer with learned positions, read forward alone.

With the softmax over the whole catalogue in place of binary cross-entropy, which is stronger (Klenitskiy & Vasilev
2023); `--config.loss.kind=gbce --config.loss.calibration=0 --config.loss.negatives=1` is near the loss of the paper.

dynrec train --config=experiments/sasrec.py --config.dataset=data/shop --workdir=runs/sasrec
"""

from dynrec_jax.config import default_config


def get_config():
    c = default_config()
    c.dataset = "data/shop"
    c.data.windows = "last"
    c.model.block = "seed"
    c.model.feedforward = 1.0
    c.model.heads = 1
    c.model.backward_weight = 0.0
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.train.steps = 3_000
    c.train.checkpoint_every = 250
    c.train.evaluate_every = 250
    c.train.average = 0.0
    c.train.learning_rate = 1e-3
    c.train.weight_decay = 0.01
    return c
