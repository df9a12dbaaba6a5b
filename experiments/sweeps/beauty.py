"""Amazon Beauty (2014, 5-core), ids alone: a search over what matters on short histories. 20 minutes on 2 cores.

    dynrec prepare --source=sequences:sequences.txt --out=data/beauty
    dynrec sweep --config=experiments/sweeps/beauty.py --workdir=sweeps/beauty --workers=2

Each trial has 7 epochs at most, a fraction of what a model to be used would get.
"""

from dynrec_jax.config import default_config
from dynrec_jax.sweep import choice, real, search


def get_config():
    c = default_config()
    c.dataset = "data/beauty"
    c.data.max_length = 50
    c.data.windows = "last"
    c.model.heads = 1
    c.model.backward_weight = 0.0
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.train.batch_size = 256
    c.train.steps = 600
    c.train.checkpoint_every = 150
    c.train.evaluate_every = 75
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    return c


def get_sweep():
    space = {
        "train.learning_rate": real(1e-3, 1e-2, log=True),
        "model.dropout": choice(0.2, 0.35, 0.5),
        "model.layers": choice(1, 2),
        "model.normalise": choice(False, True),
        "model.temperature": real(0.03, 0.3, log=True),
    }
    return search(space, trials=14, sampler="tpe", pruner="hyperband", startup=6)
