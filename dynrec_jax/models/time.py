"""Moments as angles: hands of clocks that go round in a minute up to in 68 years.

Seconds since the first event do not fit a float32 that is exact to a second, so the hands' turns are counted in whole
numbers first: `angle_j = 2π (t mod P_j) / P_j`, with whole periods P_j.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SHORTEST, LONGEST = 60.0, float(2**31 - 1)  # seconds


class Turns(NamedTuple):
    """By how much queries and keys are turned: cosines and sines of their angles, float32[B, L, E / 2] each."""

    queries: tuple[Array, Array]
    keys: tuple[Array, Array]


def periods(count: int) -> np.ndarray:
    """int32[count], whole seconds, in equal ratios from a minute to 2**31 - 1 seconds."""
    return np.round(np.geomspace(SHORTEST, LONGEST, count)).astype(np.int32)


def hands(times_BxL: Array, count: int) -> tuple[Array, Array]:
    """Cosines and sines of the clocks' hands at some moments, float32[B, L, count] each.

    Args:
      times_BxL: int32, seconds from 0.
      count: of clocks.
    """
    period_F = jnp.asarray(periods(count))[None, None]
    angle_BxLxF = (times_BxL[..., None] % period_F).astype(jnp.float32) / period_F.astype(jnp.float32)
    angle_BxLxF = angle_BxLxF * (2 * np.pi)
    return jnp.cos(angle_BxLxF), jnp.sin(angle_BxLxF)


def turns(asked_BxL: Array, times_BxL: Array, features: int) -> Turns:
    """What turns the queries that ask at some moments, and the keys of events at others, of `features` each.

    As rotary positions do (Su et al. 2021), with seconds in their place: a product of query and key then depends on
    the time between them.
    """
    return Turns(hands(asked_BxL, features // 2), hands(times_BxL, features // 2))


def turned(x_BxHxLxE: Array, cos_BxLxF: Array, sin_BxLxF: Array) -> Array:
    """Each pair of features (j, j + E/2) turned by its angle, in the type of `x`."""
    cos, sin = cos_BxLxF[:, None], sin_BxLxF[:, None]
    first, second = jnp.split(x_BxHxLxE.astype(jnp.float32), 2, axis=-1)
    both = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return both.astype(x_BxHxLxE.dtype)
