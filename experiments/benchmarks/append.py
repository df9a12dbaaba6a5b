"""What one more event costs a user's state, beside reading the whole history again.

    python experiments/benchmarks/append.py

A history of 1,024 events, D 64, 2 layers, 2 heads, relative positions and bias by time; windows of 128 and of all 1,024
positions. Both programs are compiled before. A run is a whole pass and then 20 events, each waited for; medians over
31 runs, and of the ratio within each.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynrec_jax.batch import History
from dynrec_jax.config import default_config
from dynrec_jax.models.model import make_bstm
from dynrec_jax.models.user_state import Event, Stream

ITEMS, LENGTH, RUNS, TOGETHER = 2_000, 1_024, 31, 20
CASES = [
    (block, window, users) for block in ("prenorm", "hstu") for window in (128, LENGTH) for users in (1, 32)
]


def seconds(run: Callable[[], Any]) -> float:
    """Of one call, until what it gives is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def measure(block: str, window: int, users: int) -> tuple[float, float, float]:
    """Seconds of a whole pass and of an append, and the median of their ratios."""
    c = default_config()
    c.data.max_length, c.model.block, c.model.attention_window = LENGTH, block, window
    c.model.positions, c.model.time = "relative", ("bias",)
    model = make_bstm(c, ITEMS)
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))
    params, table = variables["params"], variables["tables"]["item_id"]
    rng = np.random.default_rng(0)
    items = rng.integers(1, ITEMS + 1, (users, LENGTH)).astype(np.int32)
    times = rng.integers(1, 5_000, (users, LENGTH)).cumsum(axis=1).astype(np.int32)
    events = [Event(items[:, i], times[:, i], np.zeros(users, np.int32)) for i in range(LENGTH)]
    stream = Stream(model)
    whole = jax.jit(lambda p, t, h: model.last_vector(p, t[h.items], h))
    append = jax.jit(stream.append, donate_argnums=2)
    state = jax.jit(stream.empty, static_argnums=1)(params, users)

    def step(event: int) -> None:
        nonlocal state
        state = append(params, table, state, events[event])

    history = jax.tree.map(jnp.asarray, History(items, times))
    u = jax.block_until_ready(whole(params, table, history))
    for event in range(LENGTH):
        step(event)
    error = float(abs(state.vector - u).max())
    if error > 1e-4:
        raise ArithmeticError(f"{block}, window {window}: states are {error:.1e} from the whole pass")
    ratios, fulls, appends = [], [], []
    for run in range(RUNS):
        full = seconds(lambda: whole(params, table, history))

        def stream_of_events(first: int = run) -> Any:
            for event in range(first, first + TOGETHER):
                step(event)
                jax.block_until_ready(state.vector)

        append_seconds = seconds(stream_of_events) / TOGETHER
        fulls.append(full)
        appends.append(append_seconds)
        ratios.append(full / append_seconds)
    return statistics.median(fulls), statistics.median(appends), statistics.median(ratios)


def main() -> None:
    """Prints the table; exit status 1 where a whole pass is not twenty times an append to a window of 128."""
    worst = float("inf")
    print("block    window  users   whole pass, ms   append, ms   ratio")
    for block, window, users in CASES:
        full, append, ratio = measure(block, window, users)
        worst = min(worst, ratio) if window < LENGTH else worst
        print(
            f"{block:8} {window:6} {users:6}   {1e3 * full:14.2f} {1e3 * append:12.3f} {ratio:7.1f}",
            flush=True,
        )
    if worst < 20:
        sys.exit(f"an append takes 1/{worst:.1f} of a whole pass; expected a twentieth at most")


if __name__ == "__main__":
    main()
