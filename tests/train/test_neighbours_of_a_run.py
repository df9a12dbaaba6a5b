"""What a run counts of its histories: once, of what trains alone, and of use to lists where they are told so."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from dynrec_jax import workdir
from dynrec_jax.batch import History
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.neighbours import count_neighbours, read_neighbours

from ..commands import STEPS, dynrec, make, one_line


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
    for found, want in zip(read_neighbours(made.workdir, histories.dataset.items), expected, strict=True):
        np.testing.assert_array_equal(found, want)
    before = path.stat().st_mtime_ns
    shutil.rmtree(made.workdir / "checkpoints" / str(STEPS))
    assert dynrec("train", config=made.experiment, workdir=made.workdir) == 0
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert dynrec("evaluate", workdir=made.workdir) == 0
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "lists", k=5) == 0


def test_what_is_served_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Lists against every item's score written out: by vectors drawn to the neighbours', and what these add."""
    made = make(tmp_path, model__neighbours=2.0, model__shrinkage=4.0, loss__neighbours=0.3)
    assert (
        dynrec("score", "filter_seen", workdir=made.workdir, out=tmp_path / "lists", k=5, split="test") == 0
    )
    run = workdir.open(made.workdir)
    near = read_neighbours(made.workdir, run.dataset.items)
    histories = Histories(run.dataset, tmp_path / "cache")
    number = {user: i for i, user in enumerate(histories.ids_of(np.arange(histories.users)))}
    names = run.item_ids.to_pylist()
    own_RxD = np.asarray(run.tables["item_id"], np.float64)
    drawn_RxD = own_RxD.copy()
    for item in range(1, len(names) + 1):
        ids, weights, events = near.ids[item - 1, :24], near.weights[item - 1, :24], near.events[item - 1]
        if weights.any():
            mean_D = weights @ own_RxD[ids] / weights.sum()
            drawn_RxD[item] = (events * own_RxD[item] + 4 * mean_D) / (events + 4)
    table = jnp.asarray(drawn_RxD, jnp.float32)
    moved = 0
    for row in pq.read_table(tmp_path / "lists").to_pylist()[:15]:
        user = number[row["user_id"]]
        end = int(histories.lengths[user]) - 1
        own = histories.last_items(np.array([user]), np.array([end]), run.config.data.max_length)
        u_BxD = run.model.last_vector(run.params, table[own], History(jnp.asarray(own)))
        plain_N = np.asarray(run.model.abra.logits(u_BxD, table))[0, 1 : len(names) + 1].astype(np.float64)
        h_N = np.zeros(len(names))
        for back, item in enumerate(histories.item_at(np.full(end, user), np.arange(end))[::-1][:3]):
            for other, weight in zip(near.ids[item - 1], near.weights[item - 1], strict=True):
                h_N[other - 1] += 0.8**back * weight  # of no neighbour, 0
        seen = histories.item_at(np.full(end, user), np.arange(end)) - 1
        score_N = plain_N + 2.0 * np.log(1 + h_N / 0.1)
        score_N[seen] = plain_N[seen] = -np.inf
        order = np.argsort(-score_N, kind="stable")[:5]
        np.testing.assert_allclose(row["scores"], score_N[order], rtol=1e-5, atol=1e-6)
        assert row["item_ids"] == [names[i] for i in order]
        moved += order.tolist() != np.argsort(-plain_N, kind="stable")[:5].tolist()
    assert moved > 5
    (made.workdir / "neighbours.safetensors").unlink()
    capsys.readouterr()
    assert dynrec("evaluate", workdir=made.workdir) == 2
    assert "neighbours.safetensors" in one_line(capsys)
