"""TPE with Hyperband against every config of a grid, on the synthetic set: 64 configs, and a search among them.

    dynrec prepare --source=synthetic:users=600,items=300,seed=0 --out=data/synthetic
    dynrec sweep --config=experiments/sweeps/search.py:grid --workdir=sweeps/grid --workers=2
    dynrec sweep --config=experiments/sweeps/search.py:search --workdir=sweeps/search

The search draws from the same 64 configs, one at a time, and gives up those that are behind.
"""

from dynrec_jax.config import default_config
from dynrec_jax.sweep import choice, over, product, search

SPACE = {
    "train.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2],
    "model.dim": [8, 16, 32, 64],
    "model.dropout": [0.0, 0.15, 0.3, 0.5],
}


def get_config(kind="search"):
    c = default_config()
    c.dataset = "data/synthetic"
    c.data.max_length = 50
    c.data.windows = "last"
    c.model.heads = 1
    c.model.layers = 1
    c.model.backward_weight = 0.0
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.train.steps = 180
    c.train.checkpoint_every = 60
    c.train.evaluate_every = 20
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    return c


def get_sweep(kind="search"):
    if kind == "grid":
        return product(*(over(key, values) for key, values in SPACE.items()))
    space = {key: choice(*values) for key, values in SPACE.items()}
    return search(space, trials=28, sampler="tpe", pruner="hyperband")
