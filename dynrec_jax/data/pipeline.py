"""The input pipeline: an element is a whole batch, addressed by its step.

Built on Grain: reading ahead in threads, and a position that is one integer. The batches are a function of
(dataset, config, step) alone, so continuing a run means starting at its step.
"""

import math
from collections.abc import Iterator
from typing import Any

import grain
import ml_collections
import numpy as np

from dynrec_jax.batch import Batch
from dynrec_jax.data import examples
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.packing import first_fit, pack
from dynrec_jax.errors import ConfigError, DataError

PLANNED_STEPS = 64


def make_splits(histories: Histories, config: ml_collections.ConfigDict) -> examples.Splits:
    """Cuts the histories by the config's evaluation protocol.

    Raises:
      ConfigError: a time split of a dataset without times.
    """
    if config.evaluation.split == "leave_one_out":
        return examples.leave_one_out(histories.lengths)
    validation, test = time_cuts(histories, config.evaluation.holdout)
    before_validation = histories.count_before(validation)
    return examples.global_time(histories.lengths, before_validation, histories.count_before(test))


def time_cuts(histories: Histories, holdout: float) -> tuple[int, int]:
    """The moments (seconds since 1970) from which validation and test events lie.

    Raises:
      ConfigError: the dataset has no times.
    """
    dataset = histories.dataset
    if not dataset.has_times:
        raise ConfigError(
            f"config.evaluation.split: 'global_time' needs times, and {dataset.path} has none; use 'leave_one_out'"
        )
    quantiles = dataset.info["time_quantiles"]
    last = len(quantiles) - 1
    return int(quantiles[round((1 - 2 * holdout) * last)]), int(quantiles[round((1 - holdout) * last)])


def trains(histories: Histories, splits: examples.Splits) -> np.ndarray:
    """bool[U], users that train: those with two training events, for only they have a target.

    Raises:
      DataError: there is none, so nothing to learn from.
    """
    able_U = splits.train_end >= 2
    if not able_U.any():
        raise DataError(f"{histories.dataset.path}: no user has two training events; nothing can be learnt")
    return able_U


class BatchSource:
    """Random access to the training batches, by step."""

    def __init__(
        self,
        histories: Histories,
        splits: examples.Splits,
        config: ml_collections.ConfigDict,
        multiple: int = 1,
    ):
        """Plans the rows of a batch; their number divides by `multiple` (of the devices that share a batch).

        Raises:
          ConfigError: the batch size does not fit the shards.
          DataError: there is nothing to learn from.
        """
        examples.check_batch(config.train.batch_size, histories.dataset.shards)
        self._histories = histories
        self._config = config
        able_U = trains(histories, splits)
        self._user = np.nonzero(able_U)[0]
        self._train_end = splits.train_end
        before_U = np.concatenate([[0], np.cumsum(able_U)])
        first, users = histories.shard_first, histories.shard_users
        self._first = before_U[first]
        self._count = before_U[first + users] - self._first
        self.trained_users = len(self._user)
        self.filled = float(
            (self._count > 0).mean()
        )  # share of the draws that name a history: a shard may be empty
        self.width = config.data.max_length + 1
        self._multiple = math.lcm(multiple * config.train.accumulation, 8)
        self.rows = self._plan()

    def _plan(self) -> int:
        """Rows that hold the batches of the first steps: a later batch that needs more gets a shape of its own."""
        needed = 1
        for step in range(min(PLANNED_STEPS, len(self))):
            lengths_B = self._draw(step)[2]
            needed = max(needed, first_fit(lengths_B, self.width)[2])
        return -(-needed // self._multiple) * self._multiple

    def __len__(self) -> int:
        return int(self._config.train.steps)

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Users, ends and lengths of the windows of a step, in the order of `examples.draws`."""
        c = self._config
        drawn = examples.draws(step, c.train.batch_size, self._histories.dataset.shards)
        picked_B = examples.pick_users(c.seed, drawn, self._first, self._count)
        users_B = np.where(picked_B >= 0, self._user[np.maximum(picked_B, 0)], -1)
        train_end_B = np.where(users_B >= 0, self._train_end[np.maximum(users_B, 0)], 0)
        ends_B = examples.window_ends(c.seed, drawn, train_end_B, self.width, c.data.windows)
        return users_B, ends_B, np.minimum(ends_B, self.width)

    def __getitem__(self, step: Any) -> Batch:
        """The batch of a step."""
        users_B, ends_B, lengths_B = self._draw(int(step))
        windows = self._histories.windows(users_B, ends_B, self.width)
        return pack(windows, lengths_B, self.rows, self._multiple)


def batches(source: BatchSource, start: int, prefetch: int) -> Iterator[Batch]:
    """The training batches from step `start` on, assembled ahead in threads."""
    dataset = grain.MapDataset.source(source)[start:]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))
