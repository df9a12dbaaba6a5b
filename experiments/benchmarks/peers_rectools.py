"""RecTools' SASRec, as its users train it and get recommendations from it; run by `peers.py`.

    python peers_rectools.py HISTORIES.npz SETTINGS.json RESULT.json

Training is timed by a callback of Lightning's trainer, so RecTools' own loader is part of it. `recommend` is timed as a
whole, after a call for a few users: it takes a dataset and gives a table, and prepares the data in between. RecTools
puts dropout on the attention's weights too, and computes the softmax at padded positions as well as at real ones.
"""

import importlib.metadata
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


class Stopwatch(Callback):
    """Counts histories and seconds of the steps behind the warm-up."""

    def __init__(self, warm_up: int):
        self.warm_up, self.steps, self.histories, self.loss = warm_up, 0, 0, 0.0
        self.began = self.ended = 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, number) -> None:
        """Called after each step."""
        self.steps += 1
        if self.steps <= self.warm_up:
            self.began = time.perf_counter()
            return
        self.histories += len(batch["x"])
        self.loss, self.ended = float(outputs["loss"]), time.perf_counter()


def dataset(items: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Dataset:
    """Events `starts` to `ends` of each history; their order is their time."""
    counts = ends - starts
    first = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.arange(counts.sum()) - first
    frame = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(starts)), counts),
            Columns.Item: items[np.repeat(starts, counts) + place],
            Columns.Weight: 1,
            Columns.Datetime: pd.to_datetime(place, unit="s"),
        }
    )
    return Dataset.construct(frame)


def make_model(settings: dict) -> SASRecModel:
    """SASRec of the sizes that all peers have."""

    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu",
            max_steps=settings["warm_up"] + settings["measured"],
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Stopwatch(settings["warm_up"])],
        )

    return SASRecModel(
        n_blocks=settings["layers"],
        n_heads=settings["heads"],
        n_factors=settings["dim"],
        dropout_rate=settings["dropout"],
        session_max_len=settings["length"],
        loss="softmax",
        lr=settings["learning_rate"],
        batch_size=settings["batch"],
        recommend_torch_device="cpu",
        get_trainer_func=trainer,
    )


def main(histories: str, settings_file: str, result: str) -> None:
    """Trains, recommends to everybody, and writes what was measured."""
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["cores"])
    warnings.filterwarnings("ignore")  # pandas and Lightning warn of RecTools' own calls
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    seed_everything(0)
    with np.load(histories) as data:
        items, starts, train_ends = data["items"], data["starts"], data["train_ends"]
    starts, ends = starts[:-1], starts[1:]
    model = make_model(settings)
    model.fit(dataset(items, starts, train_ends))
    clock = next(each for each in model.fit_trainer.callbacks if isinstance(each, Stopwatch))
    whole = dataset(items, starts, ends)
    everybody = np.arange(len(starts))
    k = min(settings["k"], settings["items"])
    model.recommend(users=everybody[:256], dataset=whole, k=k, filter_viewed=True)  # warm
    began = time.perf_counter()
    lists = model.recommend(users=everybody, dataset=whole, k=k, filter_viewed=True)
    scoring = lists[Columns.User].nunique() / (time.perf_counter() - began)
    names = ("rectools", "pytorch-lightning", "torch", "numpy", "pandas")
    measured = {
        "training": clock.histories / (clock.ended - clock.began),
        "scoring": scoring,
        "loss": clock.loss,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
