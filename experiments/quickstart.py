"""What launch/quickstart.sh trains: a small model in about two minutes on two cores.

bash launch/quickstart.sh [movielens:FOLDER]
"""

from dynrec_jax.config import default_config


def get_config():
    c = default_config()
    c.dataset = "quickstart/dataset"
    c.data.max_length = 50
    c.data.windows = "random"
    c.model.heads = 1
    c.model.dropout = 0.3
    c.train.steps = 500
    c.train.learning_rate = 3e-3
    c.train.checkpoint_every = 125
    c.train.evaluate_every = 125
    return c
