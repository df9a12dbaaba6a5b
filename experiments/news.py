"""News: a small BERT, trained from nothing in the loop, reads the titles of a made-up log in MIND's format.

    python experiments/make_news.py --out=data/mind
    dynrec prepare --source=mind:data/mind --out=data/news
    dynrec train --config=experiments/news.py --workdir=runs/news
    dynrec evaluate --workdir=runs/news

A minute of one core. `--config=experiments/news.py:id` trains with ids alone, `:text` with titles alone, `:ensemble`
two models side by side. The log is cut at two moments (global_time). One seed, measured 2026-11-25:
validation ndcg@10 0.0544, ids alone (500 steps) 0.0455, recently popular news 0.0381; test 0.0059, ids alone 0.0313,
recently popular 0.0077. After the second cut nearly all news is new, and 400 titles do not teach a BERT that begins
with nothing what words have in common: this shows how tuning is set up, not what text is worth. A published BERT
(`item.bert`) knows words already.
"""

from dynrec_jax.config import default_config


def get_config(fusion="both"):
    c = default_config()
    c.dataset = "data/news"
    c.data.max_length = 50
    c.data.windows = "last"
    c.model.heads = 1
    c.model.backward_weight = 0.0
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.item.fusion = fusion
    if fusion != "id":
        c.item.text = ("title",)
        c.item.text_mode = "tuned"
        c.item.text_tokens = 32
        c.item.text_dim = 64
        c.item.text_refresh = 25  # 400 news are read again in a moment
        c.item.text_rate = 1.0  # this BERT knows nothing yet that it could lose
        # Against items of the batch, which have all just been read. Against the whole catalogue the model would learn
        # to tell those from news whose vectors are some steps old, since no target is among the latter.
        c.loss.kind = "sampled"
        c.loss.sampler = "in_batch"
    c.train.steps = 300
    c.train.batch_size = 64
    c.train.learning_rate = 2e-3
    c.train.checkpoint_every = 50
    c.train.evaluate_every = 50
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    c.evaluation.split = "global_time"
    return c
