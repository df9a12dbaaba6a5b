"""A billion items of 128 numbers over two slices of 256 chips: each has the table, touched rows are exchanged.

Whether it fits, what it sends within and between slices, and how long a step should take, on a machine without a TPU
and without data:

    dynrec compile --config=experiments/pod_1b.py --topology=v5e:16x16 --slices=2

A table that a slice cannot hold lies over all of them: --config.mesh.tables=all. To train, give it a dataset:
--config.dataset=FOLDER --config.data.items=0.
"""

from dynrec_jax.config import default_config


def get_config():
    c = default_config()
    c.data.items = 1_000_000_000
    c.data.max_length = 63  # 64 ids of a history: the last one is only predicted
    c.data.windows = "last"
    c.model.dim = 128
    c.model.layers = 4
    c.model.heads = 4
    c.model.dtype = "bfloat16"
    c.model.backward_weight = 0.5
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.loss.kind = "sampled"
    c.loss.negatives = 512
    c.train.batch_size = 8_192
    c.train.row_optimizer = "adagrad"  # a number a row, where Adam has three of the table's size
    c.train.steps = 100_000
    c.train.average = 0.0
    c.train.evaluate_every = 500
    c.train.learning_rate = 1e-3
    c.train.weight_decay = 0.01
    c.evaluation.batch_size = 1_024
    return c
