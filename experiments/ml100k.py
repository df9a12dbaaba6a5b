r"""MovieLens-100K with times: what knowing them is worth. 943 users, some 4 minutes on 2 cores.

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
    c.data.windows = "last"
    # By how far apart events are, and of the last ones alone: with so few users, less is learnt by heart.
    c.model.positions = "relative"
    c.model.attention_window = 48
    c.model.dropout = 0.3
    c.model.backward_weight = 0.5
    if told == "time":
        c.model.time, c.model.query_time = ("bias",), True
    c.train.steps = 300
    c.train.learning_rate = 3e-3
    c.train.checkpoint_every = 50
    c.train.evaluate_every = 50
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    return c
