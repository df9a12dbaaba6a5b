"""Sizes of the exchange come from the batches of the run, or from Zipf ids, and hold what they need."""

import numpy as np
import pytest

from dynrec_jax.data.pipeline import BatchSource, make_splits
from dynrec_jax.parallel.mesh import Feed, feed
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.train.plan import described, exchange_of_batches, exchange_of_zipf

from .. import tiny


def asked_most(items_BxL: np.ndarray, owners: int, held: int) -> int:
    """By sets: the most rows that one of so many devices, each with as many rows of the batch, asks one owner for."""
    parts = np.split(items_BxL, owners)
    return max(
        len({i for i in part.reshape(-1).tolist() if i // held == o}) for part in parts for o in range(owners)
    )


def test_the_first_batches_of_a_run_need_one_round(histories):
    config = tiny.config(loss__kind="full", train__batch_size=16)
    mesh = tiny.mesh(2, 2, 1)
    source = BatchSource(histories, make_splits(histories, config), config, 4)
    found = exchange_of_batches(config, mesh, source, feed(mesh, 0), ALONE)
    held = 256 // 4  # the tiny catalogue has 25 items, all on the first owner
    needs = [asked_most(source[step].items, 4, held) for step in range(4)]
    assert found.sizes == (4,)
    assert max(needs) <= found.capacities[0] <= 1.03 * max(needs) + 4
    assert found.touched >= len(np.unique(source[0].items))


def test_negatives_need_room_too(histories):
    mesh = tiny.mesh(4, 1, 1)

    def capacity(negatives: int) -> int:
        config = tiny.config(loss__kind="sampled", loss__negatives=negatives, train__batch_size=16)
        source = BatchSource(histories, make_splits(histories, config), config, 4)
        return exchange_of_batches(config, mesh, source, feed(mesh, 0), ALONE).capacities[0]

    assert capacity(400) > capacity(1)


def test_one_device_exchanges_nothing(histories):
    config = tiny.config()
    source = BatchSource(histories, make_splits(histories, config), config)
    assert exchange_of_batches(config, tiny.mesh(1, 1, 1), source, Feed(), ALONE) is None


def test_all_processes_take_the_sizes_of_the_one_that_needs_most(histories, monkeypatch: pytest.MonkeyPatch):
    config = tiny.config(loss__kind="full", train__batch_size=16)
    mesh = tiny.mesh(2, 2, 1)
    source = BatchSource(histories, make_splits(histories, config), config, 4)
    other = [[[10, 70]], 80]
    monkeypatch.setattr(Processes, "exchange", lambda self, mine: [mine, other])
    found = exchange_of_batches(config, mesh, source, feed(mesh, 0), Processes(0, 2))
    assert found.touched == 76


def test_zipf_ids_need_less_than_as_many_rows_as_ids():
    config = tiny.config(loss__kind="sampled", loss__negatives=8)
    exchange, rounds = exchange_of_zipf(config, tiny.mesh(8, 1, 1), 1_000_000, (64, 16))
    assert 1 <= rounds < 2
    assert exchange.sizes == (8,)
    # Each of 8 devices asks for 128 ids and one negative: 16 of each owner, were they spread evenly without repetition.
    assert 12 <= exchange.capacities[0] <= 40
    assert exchange_of_zipf(config, tiny.mesh(8, 1, 1), 1_000_000, (64, 16)) == (exchange, rounds)


def test_the_sizes_are_told(histories):
    config = tiny.config(loss__kind="sampled")
    exchange, _ = exchange_of_zipf(config, tiny.mesh(4, 1, 1), 1_000, (8, 9))
    told = described(exchange)
    assert f"{exchange.capacities[0]} rows to each of 4 devices" in told
    assert f"{exchange.touched} of its own" in told
