"""What a run counts of its histories: once, of what trains alone, and of no use to what comes after training."""

import shutil
from pathlib import Path

import numpy as np

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.neighbours import count_neighbours, read_neighbours

from ..commands import STEPS, dynrec, make


def test_what_trains_is_counted_and_kept_for_the_next_start(tmp_path: Path):
    made = make(tmp_path, loss__neighbours=0.3)
    path = made.workdir / "neighbours.safetensors"
    histories = Histories(open_dataset(made.dataset), tmp_path / "cache")
    assert histories.lengths.min() >= 3, "everybody has a validation and a test target"
    training = [
        histories.item_at(np.full(length - 2, user), np.arange(length - 2))
        for user, length in enumerate(histories.lengths)
    ]
    users = np.repeat(np.arange(len(training)), [len(own) for own in training])
    expected = count_neighbours(users, np.concatenate(training), histories.dataset.items)
    for found, want in zip(read_neighbours(path), expected, strict=True):
        np.testing.assert_array_equal(found, want)
    before = path.stat().st_mtime_ns
    shutil.rmtree(made.workdir / "checkpoints" / str(STEPS))
    assert dynrec("train", config=made.experiment, workdir=made.workdir) == 0
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert dynrec("evaluate", workdir=made.workdir) == 0
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "lists", k=5) == 0
