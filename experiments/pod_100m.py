"""100 million items of 256 numbers over one slice of 256 chips: what the ids of a batch touch is all that moves.

Whether it fits, what it sends and how long a step should take, on a machine without a TPU and without data:

    dynrec compile --config=experiments/pod_100m.py --topology=v5e:16x16

To train, give it a dataset: --config.dataset=FOLDER --config.data.items=0.
"""

from dynrec_jax.config import default_config


def get_config():
    c = default_config()
    c.data.items = 100_000_000
    c.data.max_length = 63  # 64 ids of a history: the last one is only predicted
    c.data.windows = "last"
    c.model.dim = 256
    c.model.layers = 4
    c.model.heads = 4
    c.model.dtype = "bfloat16"
    c.model.backward_weight = 0.5
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.loss.kind = "sampled"
    c.loss.negatives = 512
    c.train.batch_size = 4_096
    c.train.row_optimizer = "adagrad"  # a number a row, where Adam has three of the table's size
    c.train.steps = 100_000
    c.train.average = 0.0
    c.train.evaluate_every = 500
    c.train.learning_rate = 1e-3
    c.train.weight_decay = 0.01
    c.evaluation.batch_size = 1_024
    return c
