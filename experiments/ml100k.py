r"""MovieLens-100K with times: what knowing them is worth. 943 users, 6 minutes of one core.

The file's argument says what the encoder is told: "plain", the order of events alone; or "time", the time between
events (attention's bias) and when the next one is asked for (`model.query_time`), as HSTU is.

    dynrec prepare --source=movielens:ml-100k --out=data/ml-100k
    dynrec train --config=experiments/ml100k.py:time --config.seed=0 --workdir=runs/time_0      # and 1, 2, and plain
    dynrec compare --workdirs=runs/plain_0+runs/plain_1+runs/plain_2,runs/time_0+runs/time_1+runs/time_2

Events after a moment, asked for as they came, with all baselines:

    dynrec train --config=experiments/ml100k.py:time --config.evaluation.split=global_time \
        --config.evaluation.targets=all --workdir=runs/later && dynrec compare --workdirs=runs/later
"""

from dynrec_jax.config import default_config


def get_config(told="time"):
    if told not in ("plain", "time"):
        raise ValueError(f"{told!r}: expected plain or time")
    c = default_config()
    c.dataset = "data/ml-100k"
    c.data.max_length = 200
    c.data.windows = "random"
    c.model.dim = 64
    c.model.heads = 1
    c.model.positions = "relative"
    c.model.dropout = 0.3
    c.model.backward_weight = 0.0
    c.model.neighbours = 1.0
    c.model.shrinkage = 0.0
    if told == "time":
        c.model.time, c.model.query_time = ("bias",), True
    c.train.steps = 600
    c.train.learning_rate = 6e-3
    c.train.weight_decay = 0.01
    c.train.average = 0.99
    c.train.checkpoint_every = 50
    c.train.evaluate_every = 50
    c.train.patience = 0
    return c
