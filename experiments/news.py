"""News that is new: a small BERT, trained from nothing with the rest, reads what nobody has clicked yet.

The log is a made-up one in MIND's format (experiments/make_news.py), cut at a moment: what is clicked after it was
mostly published after it, and its id says little.

    python experiments/make_news.py --out=data/mind
    dynrec prepare --source=mind:data/mind --out=data/news
    dynrec train --config=experiments/news.py --workdir=runs/news
    dynrec evaluate --workdir=runs/news

`--config=experiments/news.py:id` trains the same with ids alone, `:both` with both, `:ensemble` two models side by
side.
"""

from dynrec_jax.config import default_config


def get_config(fusion="text"):
    c = default_config()
    c.dataset = "data/news"
    c.data.max_length = 50
    c.model.heads = 1
    c.model.backward_weight = 0.0
    c.item.fusion = fusion
    if fusion != "id":
        c.item.text = ("title", "abstract")
        c.item.text_mode = "tuned"
        c.item.text_tokens = 32
        c.item.text_dim = 64
        c.item.text_refresh = 25  # 400 news are read again in a moment
        c.item.text_rate = 1.0  # this BERT knows nothing yet that it could lose
    c.train.steps = 400
    c.train.batch_size = 64
    c.train.checkpoint_every = 50
    c.train.evaluate_every = 50
    c.evaluation.split = "global_time"
    return c
