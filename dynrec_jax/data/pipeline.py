"""The input pipeline: an element is a whole batch, addressed by its step.

Built on Grain: reading ahead in threads, and a position that is one integer. The batches are a function of
(dataset, config, step) alone, so continuing a run means starting at its step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import ml_collections
import numpy as np

from dynrec_jax.batch import Batch
from dynrec_jax.config import needs_times
from dynrec_jax.data import examples
from dynrec_jax.data.augment import Augmentation, augmented, rearranged
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.cold import cold_items, without
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.event_types import target_types
from dynrec_jax.data.packing import add_rows, first_fit, pack
from dynrec_jax.errors import ConfigError, DataError

PLANNED_STEPS = 64


def make_splits(histories: Histories, config: ml_collections.ConfigDict) -> examples.Splits:
    """Cuts the histories by the config's evaluation protocol.

    Raises:
      ConfigError: a time split, or a model that needs times, of a dataset without; an event type that it has not.
    """
    check_events(histories.dataset, config)
    types = target_types(config, histories.dataset.event_types)
    if config.evaluation.split == "leave_one_out":
        none_U = np.zeros_like(histories.lengths)
        test_U = histories.last_target(types, none_U, histories.lengths)
        return examples.leave_one_out(histories.lengths, histories.last_target(types, none_U, test_U), test_U)
    before_U = [histories.count_before(cut) for cut in time_cuts(histories, config.evaluation)]
    validation, test = (
        asked_between(histories, config, types, start_U, stop_U)
        for start_U, stop_U in zip(before_U, [before_U[1], histories.lengths], strict=True)
    )
    return examples.Splits(before_U[0].astype(np.int64), validation, test)


def asked_between(
    histories: Histories,
    config: ml_collections.ConfigDict,
    types: frozenset[int] | None,
    start_U: np.ndarray,
    stop_U: np.ndarray,
) -> examples.Asked:
    """What `evaluation.targets` asks for of the events from number `start` to `stop - 1` of each user."""
    how = config.evaluation.targets
    if how in ("first", "last"):
        find = histories.first_target if how == "first" else histories.last_target
        return examples.able(examples.one_each(find(types, start_U, stop_U)), histories.lengths)
    every = examples.able(examples.between(start_U, stop_U), histories.lengths)
    if types is not None:
        chosen = np.isin(histories.event_at(*every), list(types))
        every = examples.Asked(every.users[chosen], every.ends[chosen])
    return every if how == "all" else examples.one_at_random(every, histories.keys, config.seed)


def check_events(dataset: Dataset, config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where the model needs to know of events what the dataset does not tell."""
    if needs_times(config) and not dataset.has_times:
        key = "time" if config.model.time else "query_time"
        raise ConfigError(
            f"config.model.{key}: {config.model[key]!r} needs times, and {dataset.path} has none; leave it out"
        )
    if config.model.events and not dataset.has_events:
        raise ConfigError(
            f"config.model.events: True needs event types, and {dataset.path} has none; prepare with --event_column, "
            "or leave it out"
        )


def time_cuts(histories: Histories, evaluation: ml_collections.ConfigDict) -> tuple[int, int]:
    """The moments (seconds since 1970) from which validation and test events lie, by a config's `evaluation`.

    Raises:
      ConfigError: the dataset has no times.
    """
    dataset = histories.dataset
    if not dataset.has_times:
        raise ConfigError(
            f"config.evaluation.split: 'global_time' needs times, and {dataset.path} has none; use 'leave_one_out'"
        )
    if evaluation.test_from:
        return int(evaluation.validation_from), int(evaluation.test_from)
    quantiles, holdout = dataset.info["time_quantiles"], evaluation.holdout
    last = len(quantiles) - 1
    return int(quantiles[round((1 - 2 * holdout) * last)]), int(quantiles[round((1 - holdout) * last)])


def trains(splits: examples.Splits) -> np.ndarray:
    """bool[U], users that train: those with two training events, for only they have a target."""
    return splits.train_end >= 2


def check_trains(dataset: Dataset, users: int) -> None:
    """Raises DataError where nobody trains, so that there is nothing to learn from."""
    if users == 0:
        raise DataError(f"{dataset.path}: no user has two training events; nothing can be learnt")


class BatchSource:
    """Random access to the training batches, by step; of several processes each has its part of every batch.

    Attributes:
      items: int, size of the catalogue.
      trained_users: int, histories of this part that train.
      filled: float, share of this part's draws that name a history: a shard may be empty.
      width: events of a row.
      rows: rows of a batch, unless it needs more.
    """

    def __init__(
        self,
        histories: Histories,
        splits: examples.Splits,
        config: ml_collections.ConfigDict,
        multiple: int = 1,
        part: int = 0,
        parts: int = 1,
    ):
        """Plans the rows of a batch; their number divides by `multiple` (of the devices that share a part).

        Args:
          histories: of the shards `part`, `part + parts`, …, at least.
          splits: of these histories.
          config: of the run.
          multiple: see above.
          part: which part of every batch this is.
          parts: how many there are.

        Raises:
          ConfigError: the batch size does not fit the shards or the parts.
        """
        examples.check_batch(config.train.batch_size, histories.dataset.shards, parts)
        self._histories = histories
        self._config = config
        self.items = histories.dataset.items
        self._part, self._parts = part, parts
        able_U = trains(splits)
        self._user = np.nonzero(able_U)[0]
        self._train_end = splits.train_end
        before_U = np.concatenate([[0], np.cumsum(able_U)])
        first, users = histories.shard_first, histories.shard_users
        self._first = before_U[first]
        self._count = before_U[first + users] - self._first
        self.trained_users = len(self._user)
        self.filled = float((self._count[part::parts] > 0).mean())
        self.width = config.data.max_length + 1
        d = config.data
        self._augmentation = Augmentation(d.augmented, d.crop, d.drop, d.reorder)
        share = config.data.cold_items
        self._cold = cold_items(self.items, share) if share else None
        self._multiple = math.lcm(multiple * max(config.train.accumulation, 1), 8)
        self.rows = self.needed(range(min(PLANNED_STEPS, len(self))))

    def needed(self, steps: range) -> int:
        """Rows that hold this part of each of some batches."""
        rows = max((first_fit(self._draw(step)[3], self.width)[2] for step in steps), default=0)
        return max(-(-rows // self._multiple), 1) * self._multiple

    def sizes(self, step: int) -> list[int]:
        """Rows of this part of a step's batch."""
        return [max(self.rows, self.needed(range(step, step + 1)))]

    def grown(self, batch: Batch, sizes: Sequence[int]) -> Batch:
        """The batch with empty rows up to `sizes`."""
        return add_rows(batch, sizes[0])

    def __len__(self) -> int:
        return int(self._config.train.steps)

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Numbers, users, ends and lengths of the windows of a step, in the order of `examples.draws`."""
        c = self._config
        drawn = examples.draws(step, c.train.batch_size, self._histories.dataset.shards)
        drawn = examples.part_of(drawn, self._part, self._parts)
        picked_B = examples.pick_users(c.seed, drawn, self._first, self._count)
        users_B, train_end_B = np.full_like(picked_B, -1), np.zeros_like(picked_B)
        real_B = picked_B >= 0
        users_B[real_B] = self._user[picked_B[real_B]]
        train_end_B[real_B] = self._train_end[users_B[real_B]]
        ends_B = examples.window_ends(c.seed, drawn, train_end_B, self.width, c.data.windows)
        return drawn.window, users_B, ends_B, np.minimum(ends_B, self.width)

    def __getitem__(self, step: Any) -> Batch:
        """This part of the batch of a step."""
        numbers_B, users_B, ends_B, lengths_B = self._draw(int(step))
        windows = self._histories.windows(users_B, ends_B, self.width)
        if self._cold is not None:
            place_BxW, lengths_B = without(windows.items, lengths_B, self._cold)
            windows = rearranged(windows, place_BxW, lengths_B)
        if self._augmentation.changes:
            first = int(step) * self._config.train.batch_size - 1  # numbers in the batch count from 1
            seed = self._config.seed
            windows, lengths_B = augmented(windows, lengths_B, first + numbers_B, seed, self._augmentation)
        return pack(windows, lengths_B, numbers_B, self.rows, self._multiple)


class Source(Protocol):
    """Random access to what each step reads, as `BatchSource` gives it."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: Any) -> Any: ...

    def sizes(self, step: int) -> list[int]:
        """Sizes of a step's arrays that all parts of a batch must have in common."""
        ...

    def grown(self, element: Any, sizes: Sequence[int]) -> Any:
        """A step's arrays, filled up to these sizes."""
        ...


def batches(source: Source, start: int, prefetch: int) -> Iterator[Any]:
    """The training batches from step `start` on, assembled ahead in threads."""
    dataset = grain.MapDataset.source(source)[start:]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))


def agreed(
    source: Source, stream: Iterator[Any], start: int, exchange: Callable[[list[Any]], list[list[Any]]]
) -> Iterator[Any]:
    """The stream in the sizes of the part of a batch that needs most, which only an exchange can tell.

    It is made for `PLANNED_STEPS` steps at once, and at steps that do not depend on `start`.

    Args:
      source: where `stream` comes from.
      stream: this process's parts of the batches from step `start` on.
      start: the first step.
      exchange: the sizes that this part needs -> those that each part needs.
    """
    for first in range(start // PLANNED_STEPS * PLANNED_STEPS, len(source), PLANNED_STEPS):
        steps = range(max(first, start), min(first + PLANNED_STEPS, len(source)))
        own = [source.sizes(step) for step in steps]
        for sizes in np.max(exchange(own), axis=0):
            yield source.grown(next(stream), sizes.tolist())
