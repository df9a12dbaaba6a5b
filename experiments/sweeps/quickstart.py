"""A first sweep, on the synthetic set that launch/quickstart.sh prepares: 12 trials on 2 cores.

dynrec sweep --config=experiments/sweeps/quickstart.py --workdir=sweeps/quickstart --workers=2
"""

from dynrec_jax.config import default_config
from dynrec_jax.sweep import over, product, zip_


def get_config():
    c = default_config()
    c.dataset = "quickstart/dataset"
    c.data.max_length = 50
    c.data.windows = "random"
    c.model.heads = 1
    c.model.dropout = 0.3
    c.model.backward_weight = 0.0
    c.model.positions = "absolute"
    c.train.steps = 200
    c.train.checkpoint_every = 50
    c.train.evaluate_every = 50
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    return c


def get_sweep():
    return product(
        zip_("model.dim", [32, 64], "model.feedforward", [2.0, 4.0]),
        over("train.learning_rate", [1e-3, 3e-3]),
        over("seed", range(3)),
    )
