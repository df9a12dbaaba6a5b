"""The framework's own settings, for a log that nobody has tuned for; dynrec_jax/config.py says what each of them does.

    dynrec train --config=experiments/default.py:shop --workdir=runs/shop      # the dataset is data/shop

They were chosen on four sets at once (README.md, "Defaults"). What the models that were tuned for one of these sets
have besides, and what is worth trying: `model.neighbours=1`; `model.shrinkage=3` where most items are rare; a larger
`model.dim`; another `model.dropout`, 0.3 or 0.5.
"""

from dynrec_jax.config import default_config


def get_config(name="shop"):
    c = default_config()
    c.dataset = f"data/{name}"
    return c
