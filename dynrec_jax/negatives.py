"""Negatives of a sampled loss: items that all positions of a batch share.

They are a function of (key, windows of the batch, training counts): the same on any mesh, for any number of processes,
and however windows are packed into rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dynrec_jax.batch import PAD, Batch
from dynrec_jax.parallel.blocks import Devices, on_devices
from dynrec_jax.parallel.counters import token_bits, token_counters
from dynrec_jax.parallel.rules import BATCH, BATCH_AXES, ITEM_AXES, ROWS, WHOLE
from dynrec_jax.parallel.table import ids_of, in_rows, rows_of

Array = jax.Array

MOST = 2**31 - 1


class Negatives(NamedTuple):
    """Items drawn for a batch, shared by its positions.

    Attributes:
      ids: int32[K]; 0 where a batch has too few events to draw from.
      log_expected: float[K], log of how often each was expected among the K draws; zeros without correction.
    """

    ids: Array
    log_expected: Array


class Sampling(NamedTuple):
    """How negatives are drawn.

    Attributes:
      sampler: "uniform" or "popularity" draw from the catalogue, with replacement; "in_batch" draws events of the
        batch, without; "mixed" does `uniform` and `in_batch`.
      items: N.
      number: K.
      uniform: how many of them are uniform in "mixed".
      logq: whether the loss corrects for how often each was expected.
    """

    sampler: str
    items: int
    number: int
    uniform: int
    logq: bool

    @property
    def by_counts(self) -> bool:
        """Whether training counts are needed, to draw by or to tell what was expected."""
        return self.sampler == "popularity" or (self.logq and self.sampler in ("in_batch", "mixed"))


def sampling(config: ml_collections.ConfigDict, items: int) -> Sampling:
    """What a config says, for a catalogue of N items."""
    c = config.loss
    return Sampling(c.sampler, items, c.negatives, round(c.negatives * c.uniform_share), c.logq)


def running_counts(counts: np.ndarray, rows: int) -> np.ndarray:
    """int32[R], the sum of the counts of all rows up to and with each one.

    Whole numbers below 2^31, so that each item has its exact place; at least one each, so that it can be drawn.

    Args:
      counts: int64[N + 1], training events of each item.
      rows: R, of the item table; the sums lie as its rows do.
    """
    room = MOST - len(counts)  # beside the one that each item has at least
    counts = np.maximum(counts // (counts.sum() // room + 1), 1)
    counts[PAD] = 0
    return np.cumsum(in_rows(counts, rows)).astype(np.int32)


def draw_negatives(key: Array, batch: Batch, running_R: Array | None, settings: Sampling) -> Negatives:
    """K items.

    Args:
      key: of this step.
      batch: the whole batch, not a part of it; only "in_batch" and "mixed" look at it.
      running_R: what `running_counts` gives, where `settings.by_counts`; over the devices as the item table's rows.
      settings: see `Sampling`.
    """
    s = settings
    uniform_key, event_key = jax.random.split(key) if s.sampler == "mixed" else (key, key)
    uniform = {"uniform": s.number, "mixed": s.uniform}.get(s.sampler, 0)
    parts, expected_K = [], jnp.float32(uniform / s.items)
    if s.by_counts and running_R is None:
        raise ValueError("these negatives need the running counts of the items")
    if s.sampler == "popularity":
        parts.append(on_devices(functools.partial(_popular, s.number), (WHOLE, ROWS), WHOLE, key, running_R))
    if uniform:
        parts.append(jax.random.randint(uniform_key, (uniform,), 1, s.items + 1, jnp.int32))
    if s.sampler in ("in_batch", "mixed"):
        parts.append(_events(event_key, batch, s.number - uniform))
    ids_K = jnp.concatenate(parts)
    if not s.logq:
        return Negatives(ids_K, jnp.zeros(ids_K.shape, jnp.float32))
    if s.by_counts:
        counted = s.number if s.sampler == "popularity" else jnp.sum(parts[-1] != PAD, dtype=jnp.float32)
        share_K = on_devices(_shares, (WHOLE, ROWS), WHOLE, ids_K, running_R)
        expected_K = expected_K + counted * share_K
    expected_K = jnp.broadcast_to(expected_K, ids_K.shape)
    return Negatives(ids_K, jnp.log(jnp.where(ids_K == PAD, 1.0, expected_K)))


def _before(devices: Devices, running_R: Array) -> tuple[Array, Array]:
    """The sum of the counts of all rows before a device's own, and of all rows."""
    if not devices.several:
        return jnp.int32(0), running_R[-1]
    ends = jax.lax.all_gather(running_R[-1], ITEM_AXES)
    own = jax.lax.axis_index(ITEM_AXES)
    return jnp.where(own == 0, 0, ends[own - 1]), ends[-1]


def _popular(number: int, devices: Devices, key: Array, running_R: Array) -> Array:
    """Items by their counts, with replacement.

    A whole number below the total names the first row whose running count exceeds it, exactly, and that row lies on
    one device; padding has no count, so it is never drawn.
    """
    before, total = _before(devices, running_R)
    at_K = jax.random.randint(key, (number,), 0, total, jnp.int32)
    row_K = jnp.searchsorted(running_R, at_K, side="right").astype(jnp.int32)
    first = devices.place(ITEM_AXES) * running_R.shape[0]
    id_K = ids_of(first + row_K, devices.size(ITEM_AXES) * running_R.shape[0])
    return devices.add(jnp.where((before <= at_K) & (at_K < running_R[-1]), id_K, 0), ITEM_AXES)


def _shares(devices: Devices, ids_K: Array, running_R: Array) -> Array:
    """Each item's share of all counts, float32[K]."""
    held = running_R.shape[0]
    before, total = _before(devices, running_R)
    row_K = rows_of(ids_K, devices.size(ITEM_AXES) * held) - devices.place(ITEM_AXES) * held
    own_K = jnp.clip(row_K, 0, held - 1)
    count_K = running_R[own_K] - jnp.where(own_K == 0, before, running_R[own_K - 1])
    count_K = devices.add(jnp.where(row_K == own_K, count_K, 0), ITEM_AXES)
    return count_K.astype(jnp.float32) / total.astype(jnp.float32)


def _events(key: Array, batch: Batch, number: int) -> Array:
    """Items of so many events of the batch, those with the smallest hashes; 0 where it has fewer."""

    def inside(devices: Devices, key: Array, items: Array, segments: Array, positions: Array) -> Array:
        hash_BxL = token_bits(key, token_counters(segments, positions))
        real_BxL = segments != 0
        hashes = jnp.where(real_BxL, hash_BxL, jnp.uint32(0xFFFFFFFF)).reshape(-1)
        ids = jnp.where(real_BxL, items, MOST).reshape(-1)
        hashes, ids = (x[:number] for x in jax.lax.sort((hashes, ids), num_keys=2))
        if devices.several:
            hashes, ids = (jax.lax.all_gather(x, BATCH_AXES, tiled=True) for x in (hashes, ids))
            hashes, ids = (x[:number] for x in jax.lax.sort((hashes, ids), num_keys=2))
        ids = jnp.where(ids == MOST, PAD, ids)
        return jnp.pad(ids, (0, number - ids.shape[0]))

    specs = (WHOLE, BATCH, BATCH, BATCH)
    return on_devices(inside, specs, WHOLE, key, batch.items, batch.segments, batch.positions)
