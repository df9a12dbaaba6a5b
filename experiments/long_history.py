"""BSTM over histories of up to 8,192 events, for a small slice of TPUs: 16 histories a step, two a chip on eight.

    dynrec prepare --source=table:events.parquet --out=data/long
    dynrec train --config=experiments/long_history.py --workdir=runs/long_history

Not trained yet, so there is no number to expect.
"""

from dynrec_jax.config import default_config


def get_config():
    c = default_config()
    c.dataset = "data/long"
    c.data.max_length = 8_192
    c.data.windows = "random"
    c.model.dim = 512
    c.model.layers = 8
    c.model.heads = 4  # of 128 features each, as wide as a TPU's matrix unit
    c.model.feedforward = 3.75  # 1,280 hidden features, which divide by 128 too
    c.model.dtype = "bfloat16"
    c.model.remat = "block"
    c.model.scan_layers = True
    c.model.backward_weight = 0.5
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.loss.kind = "sampled"
    c.loss.sampler = "uniform"
    c.loss.negatives = 4_096
    c.loss.block_items = 4_096
    c.loss.block_positions = 2_048
    c.train.steps = 20_000
    c.train.batch_size = 16
    c.train.checkpoint_every = 1_000
    c.train.evaluate_every = 1_000
    c.train.average = 0.0
    c.train.learning_rate = 1e-3
    c.train.weight_decay = 0.01
    c.evaluation.batch_size = 64
    return c
