"""Time never leaks: what a traversal has not read yet has no influence at all, not even a small one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynrec_jax.batch import History
from dynrec_jax.models.bstm import Bstm
from dynrec_jax.models.user_encoder import Direction, Moments

from .. import tiny

ITEMS = 20
# Two histories and a place of padding in one row of L = 8.
ROW = tiny.batch([[(1, [3, 7, 1, 9]), (2, [4, 4, 12])]], 8)
WINDOWS = (range(0, 4), range(4, 7))
# Every kind of block, every way to tell time, events and positions, and a refined query.
TIMED = {"model__query_time": True, "model__events": True}
CASES: dict[str, dict[str, Any]] = {
    "prenorm": {},
    "seed": {"model__block": "seed", "model__hops": 1},
    "hstu": {"model__block": "hstu", "model__positions": "none", "model__time": ("rotary",)},
    "hstu-relative": {
        "model__block": "hstu",
        "model__positions": "relative",
        "model__time": ("bias",),
        **TIMED,
    },
    "gru": {"model__block": "gru", "model__time": ("sinusoidal",), **TIMED},
    "mean": {"model__block": "mean"},
    "seed-window": {
        "model__block": "seed",
        "model__attention_window": 2,
        "model__time": ("sinusoidal",),
        **TIMED,
    },
    "prenorm-all": {"model__positions": "relative", "model__time": ("bias", "rotary", "sinusoidal"), **TIMED},
}
TYPES = ("view", "purchase")
TIMES = np.array([[5, 90, 4000, 4001, 7, 8, 300_000, 0]], np.int32)
EVENTS = np.array([[1, 2, 1, 0, 2, 2, 1, 0]], np.int32)
REACH = 2  # of two layers that look one event further each, where there is a window of 2
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def make(case: str) -> tuple[Callable[..., Any], Any]:
    """A function from (direction, vectors of the row's items, times, events) to what is scored; and the vectors."""
    model, params, tables = tiny.bstm(ITEMS, event_types=TYPES, model__layers=2, **CASES[case])
    params = tiny.shaken(params)
    table_RxD = model.catalogue(params, tables)

    def queries(direction: Direction, rows_1xLxD: Any, times: Any = TIMES, events: Any = EVENTS) -> Any:
        positions = ROW.positions if direction == "forward" else ROW.remaining
        asked = np.asarray(asked_at(direction)).tolist()
        at = Moments(ROW.segments, positions, jnp.asarray(times), jnp.asarray(events), times[:, asked])
        u_1xLxD = model.user_vectors(params, rows_1xLxD, at, direction)
        return model.abra.query(u_1xLxD[0], table_RxD)

    return queries, table_RxD[ROW.items]


def asked_at(direction: Direction) -> np.ndarray:
    """int[L], whose time each place asks at: that of the event it predicts, where there is one."""
    step = 1 if direction == "forward" else -1
    window_of = {place: window for window in WINDOWS for place in window}
    return np.array([p + step if p + step in window_of.get(p, ()) else p for p in range(8)])


def may_see(direction: Direction, reach: int = 8) -> np.ndarray:
    """bool[L, L], written out by hand: place t (row) may depend on place s (column)."""
    allowed = np.zeros((8, 8), bool)
    for window in WINDOWS:
        for t in window:
            for s in window:
                allowed[t, s] = (s <= t if direction == "forward" else s >= t) and abs(s - t) <= reach
    return allowed


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_with_respect_to_what_is_not_read_is_exactly_zero(case: str):
    queries, rows_1xLxD = make(case)
    reach = REACH if "model__attention_window" in CASES[case] else 8
    jacobians = jax.jit(lambda x: [jax.jacrev(lambda y, d=d: queries(d, y))(x) for d in DIRECTIONS])(
        rows_1xLxD
    )
    for direction, jacobian in zip(DIRECTIONS, jacobians, strict=True):
        depends_LxL = (np.asarray(jacobian)[:, :, 0] != 0).any(axis=(1, 3))
        real = np.arange(8) < 7
        assert np.array_equal(depends_LxL[real], may_see(direction, reach)[real]), direction
        # Padding may look at itself or at nothing; no history looks at it.
        assert not depends_LxL[:7, 7].any()


@pytest.mark.parametrize("case", CASES)
def test_other_later_events_leave_earlier_outputs_bit_identical(case: str):
    queries, rows_1xLxD = make(case)
    run = jax.jit(lambda *given: [queries(d, *given) for d in DIRECTIONS])
    before = run(rows_1xLxD, TIMES, EVENTS)
    for t in range(7):
        # All that place t may not see in either direction is replaced, once for each direction.
        for at, direction in enumerate(DIRECTIONS):
            hidden_L = ~may_see(direction)[t]
            noise = 100.0 * jax.random.normal(jax.random.key(t), rows_1xLxD.shape)
            changed = jnp.where(hidden_L[None, :, None], noise, rows_1xLxD)
            # The time at which it is asked is told to it.
            untold_L = hidden_L & (np.arange(8) != asked_at(direction)[t])
            times, events = np.where(untold_L, 77_777, TIMES), np.where(hidden_L, (EVENTS + 1) % 3, EVENTS)
            after = np.asarray(run(changed, times, events)[at])
            assert np.array_equal(after[t], np.asarray(before[at])[t]), (direction, t)
            assert not np.array_equal(after, np.asarray(before[at])), "the change must be felt somewhere"


@pytest.mark.parametrize("case", [case for case in CASES if "model__query_time" in CASES[case]])
def test_times_and_types_that_are_read_are_felt(case: str):
    queries, rows_1xLxD = make(case)
    run = jax.jit(lambda *given: [queries(d, *given) for d in DIRECTIONS])
    before = run(rows_1xLxD, TIMES, EVENTS)
    for t in range(7):
        here_L = np.arange(8) == t
        for times, events in (
            (TIMES + 1_000_003 * here_L, EVENTS),
            (TIMES, np.where(here_L, (EVENTS + 1) % 3, EVENTS)),
        ):
            for one, other in zip(before, run(rows_1xLxD, times.astype(np.int32), events), strict=True):
                assert not np.array_equal(np.asarray(one)[t], np.asarray(other)[t]), t


def lists(model: Bstm, params: Any, tables: Any, histories: np.ndarray) -> Any:
    """Recommendations after histories, int32[B, L]."""
    table_RxD = model.catalogue(params, tables)
    seen = jnp.zeros((len(histories), 1), jnp.int32)
    return model.recommend(params, table_RxD[histories], History(jnp.asarray(histories)), table_RxD, seen, 5)


@pytest.mark.parametrize("block", ["prenorm", "seed"])
def test_padding_behind_a_history_is_not_read(block: str):
    """A history in a wider row gives the same vector: padding on the right is no event."""
    model, params, tables = tiny.bstm(ITEMS, model__block=block)
    narrow = np.array([[5, 2, 8, 0, 0]])
    wide = np.array([[5, 2, 8, 0, 0, 0, 0, 0]])
    run = jax.jit(lambda h: lists(model, params, tables, h).scores)
    np.testing.assert_allclose(run(narrow), run(wide), rtol=1e-6)
