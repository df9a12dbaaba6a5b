"""A user's state against a pass over the whole history: one event after the other, far past the window."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.models.user_encoder import moments
from dynrec_jax.models.user_state import Event, Stream, UserState

from .. import tiny

ITEMS, WINDOW, LENGTH = 30, 6, 8
TYPES = ("view", "purchase")
BANDED = {"model__attention_window": WINDOW, "model__layers": 2, "model__events": True}
CASES: dict[str, dict[str, Any]] = {
    "prenorm": {"model__positions": "relative", "model__time": ("bias",), **BANDED},
    "asked": {
        "model__positions": "relative",
        "model__time": ("bias", "rotary", "sinusoidal"),
        "model__query_time": True,
        **BANDED,
    },
    "hstu": {"model__block": "hstu", "model__positions": "none", "model__time": ("rotary",), **BANDED},
    "seed-scanned": {
        "model__block": "seed",
        "model__positions": "relative",
        "model__scan_layers": True,
        **BANDED,
    },
    "interests": {"model__interests": 3, "model__positions": "relative", **BANDED},
    "gru": {"model__block": "gru", "model__positions": "none", "model__layers": 2, "model__query_time": True},
    "mean": {"model__block": "mean", "model__positions": "none", **BANDED},
}


# Models whose state reads the last events again once there are more than it sees.
READS_AGAIN: dict[str, dict[str, Any]] = {
    "absolute": {},
    "absolute, asked": {"model__time": ("bias",), "model__query_time": True},
    "absolute in a window": {"model__attention_window": 3, "model__layers": 2},
    "relative without a window": {"model__positions": "relative", "model__layers": 2},
}


def made(changes: dict[str, Any]) -> tuple[Stream, Any, Any]:
    model, params, tables = tiny.bstm(ITEMS, event_types=TYPES, **changes)
    return Stream(model), tiny.shaken(params, scale=0.1), tables["item_id"]


def random_events(users: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Items, times, types and lengths of histories of 1 to `steps` events, padded on the right."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, steps + 1, users)
    inside = np.arange(steps) < lengths[:, None]
    items = np.where(inside, rng.integers(1, ITEMS + 1, (users, steps)), 0)
    gaps = (2 ** rng.uniform(0, 20, (users, steps))).astype(np.int64)
    times = np.where(inside, np.cumsum(gaps, axis=1), 0)
    types = np.where(inside, rng.integers(0, 3, (users, steps)), 0)
    return items.astype(np.int32), times.astype(np.int32), types.astype(np.int32), lengths


def appended(stream: Stream, params: Any, table: Any, events: tuple[Any, ...]) -> UserState:
    """The states after all events, one after the other."""

    def step(state: UserState, event: tuple[Any, ...]) -> tuple[UserState, None]:
        return stream.append(params, table, state, Event(*event)), None

    columns = tuple(jnp.asarray(values).T for values in events)
    return jax.lax.scan(step, stream.empty(params, len(events[0])), columns)[0]


@pytest.mark.parametrize("case", CASES)
def test_appending_gives_what_a_pass_over_the_whole_history_gives(case: str):
    users, steps = 1_000, 6 * WINDOW
    stream, params, table = made(CASES[case])
    assert stream.continues
    items, times, types, lengths = random_events(users, steps)
    later = (times.max(axis=1) + np.random.default_rng(1).integers(0, 10**6, users)).astype(np.int32)

    @jax.jit
    def both() -> Any:
        state = appended(stream, params, table, (items, times, types))
        asked = jnp.asarray(later) if stream.model.sight.query_time else None
        history = History(jnp.asarray(items), jnp.asarray(times), jnp.asarray(types), asked)
        whole = stream.model.user_vectors(params, table[items], moments(history))
        return stream.interest(params, table, state, jnp.asarray(later)), state.length, whole

    found, count, whole = (np.asarray(x) for x in both())
    assert count.tolist() == lengths.tolist()
    assert lengths.max() == steps
    np.testing.assert_allclose(found, whole[np.arange(users), lengths - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", READS_AGAIN)
def test_other_models_see_their_last_events_as_scoring_does(case: str):
    """Below their length one event after the other, from then on by reading again."""
    users, steps = 200, 2 * LENGTH
    stream, params, table = made(READS_AGAIN[case])
    assert not stream.continues
    items, times, types, lengths = random_events(users, steps)
    rows, at = np.arange(users)[:, None], np.maximum(lengths - LENGTH, 0)[:, None] + np.arange(LENGTH)
    inside = at < lengths[:, None]
    ends = [np.where(inside, x[rows, np.minimum(at, steps - 1)], 0) for x in (items, times, types)]
    later = (times.max(axis=1) + 1_000).astype(np.int32)

    @jax.jit
    def both() -> Any:
        state = appended(stream, params, table, (items, times, types))
        sight = stream.model.sight
        asked = jnp.asarray(later) if sight.query_time else None
        last = stream.model.last_vector(params, table[ends[0]], History(*map(jnp.asarray, ends), asked))
        return stream.interest(params, table, state, jnp.asarray(later)), last

    found, last = both()
    assert (lengths < LENGTH).any()
    assert (lengths > LENGTH).any()
    np.testing.assert_allclose(found, last, rtol=0, atol=1e-5)
