"""What launch/quickstart.sh trains: a small model in about a minute on two cores.

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
    # Read backward too (weight 0.5), a step costs nearly twice as much, and test ndcg@10 is 0.3535 instead of 0.3584.
    c.model.backward_weight = 0.0
    c.model.positions = "absolute"
    c.train.steps = 400
    c.train.learning_rate = 3e-3
    c.train.checkpoint_every = 100
    c.train.evaluate_every = 100
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    return c
