"""The network that this project grew from: two LSTMs, one over a user's history and one over what an item is.

Averages of their outputs (of the user's, the last 5), one after the other, go through Dense 64, ReLU, and one unit
with a sigmoid: the probability that the user takes the item next. Trained by binary cross-entropy on each next item and
one item drawn at random that the user has not taken; the share of both that it tells right is its accuracy.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dynrec_jax.batch import PAD
from dynrec_jax.data.cold import cold_items, without
from dynrec_jax.data.kinds import TEXT
from dynrec_jax.evaluate.baselines.content import WORD
from dynrec_jax.evaluate.baselines.learned import Learning, Scorer, Unable
from dynrec_jax.evaluate.recommender import HistorySource

DIM = 64  # of words, of both LSTMs and of the dense layer
LONGEST = 200  # events of a history
POOLED = 5  # outputs of the user's LSTM that are averaged: the last ones, which have read all before them
WORDS = 5  # of an item, behind its id
USERS = 64  # of a step
EPOCHS = 70
DROPOUT = 0.2  # of what is read, while it trains
RATE = 3e-3
MOST = 50_000  # items: all of them are read at each step
BLOCK = 32  # users that are scored at a time: B x N x DIM is held

Array = jax.Array


def lstm(learning: Learning) -> Mapping[str, Scorer]:
    """Trains the network; raises Unable where it would take too long."""
    if learning.items > MOST:
        raise Unable(f"{learning.items:,} items, all read at each step; {MOST:,} at most")
    tokens_NxT, words = item_tokens(learning)
    params = _trained(learning, jnp.asarray(tokens_NxT), words)
    return {"": LstmScorer(params, tokens_NxT, min(LONGEST, learning.config.data.max_length))}


def item_tokens(learning: Learning) -> tuple[np.ndarray, int]:
    """int32[N, T], what the item LSTM reads: the item itself, and words of its texts; and how many there are."""
    dataset = learning.histories.dataset
    texts = [name for name, kind in dataset.item_column_kinds.items() if kind == TEXT]
    numbers: dict[str, int] = {}
    tokens_NxT = np.zeros((dataset.items, 1 + (WORDS if texts else 0)), np.int32)
    tokens_NxT[:, 0] = np.arange(1, dataset.items + 1)
    if texts:
        for item, row in enumerate(dataset.items_table().select(texts).to_pylist()):
            found = WORD.findall(" ".join(value for value in row.values() if value).lower())[:WORDS]
            tokens_NxT[item, 1 : 1 + len(found)] = [
                dataset.items + 1 + numbers.setdefault(word, len(numbers)) for word in found
            ]
    return tokens_NxT, dataset.items + 1 + len(numbers)


class LstmScorer:
    """Scores by a trained network; the logit behind the sigmoid."""

    def __init__(self, params: Any, tokens_NxT: np.ndarray, longest: int):
        self._params = params
        self._longest = longest
        items_NxH = jax.jit(_items)(params, jnp.asarray(tokens_NxT)) @ params["dense"][DIM:]
        self._right_NxH = np.asarray(items_NxH + params["dense_bias"][None])
        self._left = jax.jit(lambda p, x: _last(_users(p, x), x) @ p["dense"][:DIM])
        self._score = jax.jit(
            lambda p, left, right: jax.nn.relu(left[:, None] + right[None]) @ p["out"] + p["out_bias"]
        )

    def _users_of(self, source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(users_B), USERS):
            here = slice(start, start + USERS)
            items_BxL = source.last_items(users_B[here], ends_B[here], self._longest)
            short = USERS - len(items_BxL)
            left = self._left(self._params, np.pad(items_BxL, ((0, short), (0, 0))))
            parts.append(np.asarray(left)[: len(items_BxL)])
        return np.concatenate(parts) if parts else np.zeros((0, DIM), np.float32)

    def __call__(self, source: HistorySource, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        """float32[B, N], as `Scorer`."""
        left_BxH = self._users_of(source, users_B, ends_B)
        parts = []
        for start in range(0, len(left_BxH), BLOCK):
            left = left_BxH[start : start + BLOCK]
            padded = np.pad(left, ((0, BLOCK - len(left)), (0, 0)))
            parts.append(np.asarray(self._score(self._params, padded, self._right_NxH))[: len(left)])
        return np.concatenate(parts) if parts else np.zeros((0, len(self._right_NxH)), np.float32)

    def accuracy(
        self, source: HistorySource, users_U: np.ndarray, ends_U: np.ndarray, targets_U: np.ndarray
    ) -> float:
        """The share told right of the targets and of as many items, drawn at random, that are not in the history."""
        left_UxH = self._users_of(source, users_U, ends_U)
        taken_UxM = source.last_items(users_U, ends_U, int(ends_U.max(initial=1)))
        taken_UxM = np.concatenate([taken_UxM, targets_U[:, None]], axis=1)
        rng, items = np.random.default_rng(0), len(self._right_NxH)
        parts = [taken_UxM[start : start + USERS] for start in range(0, len(taken_UxM), USERS)]
        others_U = np.concatenate([_drawn(rng, part, items, (len(part), 1))[:, 0] for part in parts])
        out, bias = (np.asarray(self._params[name]) for name in ("out", "out_bias"))

        def logits(items_U: np.ndarray) -> np.ndarray:
            hidden = np.maximum(left_UxH + self._right_NxH[items_U - 1], 0.0)
            return np.asarray(hidden @ out + bias)

        return float(((logits(targets_U) > 0).mean() + (logits(others_U) <= 0).mean()) / 2)


def _fresh(key: Array, words: int) -> dict[str, Array]:
    keys = iter(jax.random.split(key, 8))

    def matrix(rows: int, columns: int) -> Array:
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    embedding = jax.random.normal(next(keys), (words, DIM)) * 0.1
    cell = {side: (matrix(DIM, 4 * DIM), matrix(DIM, 4 * DIM)) for side in ("user", "item")}
    return {
        "embedding": embedding.at[PAD].set(0.0),
        **{f"{side}_in": each[0] for side, each in cell.items()},
        **{f"{side}_back": each[1] for side, each in cell.items()},
        # Forget gates begin open (Jozefowicz et al. 2015).
        **{f"{side}_bias": jnp.zeros(4 * DIM).at[DIM : 2 * DIM].set(1.0) for side in cell},
        "dense": matrix(2 * DIM, DIM),
        "dense_bias": jnp.zeros(DIM),
        "out": matrix(DIM, 1)[:, 0],
        "out_bias": jnp.zeros(()),
    }


def _read(params: Any, side: str, x_BxLxD: Array) -> Array:
    """Outputs of an LSTM (Hochreiter & Schmidhuber 1997), `[B, L, D]`."""
    gates_BxLxG = x_BxLxD @ params[f"{side}_in"] + params[f"{side}_bias"][None, None]

    def step(carry: tuple[Array, Array], gates_BxG: Array) -> tuple[tuple[Array, Array], Array]:
        h_BxD, c_BxD = carry
        i, f, g, o = jnp.split(gates_BxG + h_BxD @ params[f"{side}_back"], 4, axis=-1)
        c_BxD = jax.nn.sigmoid(f) * c_BxD + jax.nn.sigmoid(i) * jnp.tanh(g)
        h_BxD = jax.nn.sigmoid(o) * jnp.tanh(c_BxD)
        return (h_BxD, c_BxD), h_BxD

    zero_BxD = jnp.zeros((x_BxLxD.shape[0], DIM))
    _, h_LxBxD = jax.lax.scan(step, (zero_BxD, zero_BxD), gates_BxLxG.swapaxes(0, 1))
    return h_LxBxD.swapaxes(0, 1)


def _users(params: Any, items_BxL: Array, key: Array | None = None) -> Array:
    """The average of the last outputs up to each event, `[B, L, D]`; histories are padded on the right.

    With a key, a share of what is read is dropped.
    """
    x_BxLxD = params["embedding"][items_BxL]
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - DROPOUT, x_BxLxD.shape)
        x_BxLxD = jnp.where(kept, x_BxLxD / (1 - DROPOUT), 0.0)
    h_BxLxD = _read(params, "user", x_BxLxD)
    total_BxLxD = jnp.cumsum(h_BxLxD, axis=1)
    before_BxLxD = jnp.pad(total_BxLxD, ((0, 0), (POOLED, 0), (0, 0)))[:, : items_BxL.shape[1]]
    count_L = jnp.minimum(jnp.arange(1, items_BxL.shape[1] + 1), POOLED)
    return (total_BxLxD - before_BxLxD) / count_L[None, :, None]


def _last(u_BxLxD: Array, items_BxL: Array) -> Array:
    last_B = jnp.maximum((items_BxL != PAD).sum(axis=1) - 1, 0)
    return u_BxLxD[jnp.arange(len(u_BxLxD)), last_B]


def _items(params: Any, tokens_NxT: Array) -> Array:
    real_NxT = (tokens_NxT != PAD).astype(jnp.float32)[..., None]
    h_NxTxD = _read(params, "item", params["embedding"][tokens_NxT])
    return (h_NxTxD * real_NxT).sum(axis=1) / real_NxT.sum(axis=1)


def _loss(params: Any, tokens_NxT: Array, items_BxM: Array, others_BxL: Array, key: Array) -> Array:
    """Mean cross-entropy of the next item of each event and of another one."""
    left_BxLxH = _users(params, items_BxM[:, :-1], key) @ params["dense"][:DIM]
    right_NxH = _items(params, tokens_NxT) @ params["dense"][DIM:] + params["dense_bias"][None]
    real_BxL = (items_BxM[:, 1:] != PAD).astype(jnp.float32)

    def logits(wanted_BxL: Array) -> Array:
        hidden = jax.nn.relu(left_BxLxH + right_NxH[jnp.maximum(wanted_BxL - 1, 0)])
        return hidden @ params["out"] + params["out_bias"]

    each_BxL = jax.nn.softplus(-logits(items_BxM[:, 1:])) + jax.nn.softplus(logits(others_BxL))
    return (each_BxL * real_BxL).sum() / (2 * real_BxL.sum())


def _drawn(
    rng: np.random.Generator,
    taken_BxM: np.ndarray,
    items: int,
    shape: tuple[int, int],
    never: np.ndarray | None = None,
) -> np.ndarray:
    """int32[B, L], items of the catalogue that are not among `taken` of their row, as far as five draws find one.

    Nor one of those that bool[N + 1] `never` names.
    """
    taken = np.zeros((len(taken_BxM), items + 1), bool)
    if never is not None:
        taken |= never
    np.put_along_axis(taken, taken_BxM.astype(np.int64), True, axis=1)
    drawn = rng.integers(1, items + 1, shape)
    for _ in range(4):
        bad = np.take_along_axis(taken, drawn, axis=1)
        drawn[bad] = rng.integers(1, items + 1, int(bad.sum()))
    return drawn.astype(np.int32)


def _trained(learning: Learning, tokens_NxT: Array, words: int) -> Any:
    histories, ends_U = learning.histories, learning.splits.train_end
    users = np.flatnonzero(ends_U >= 2)
    share = learning.config.data.cold_items
    cold = cold_items(learning.items, share) if share else None
    rng = np.random.default_rng(learning.config.seed)
    longest = min(LONGEST, learning.config.data.max_length) + 1
    per_epoch = -(-len(users) // USERS)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, EPOCHS * per_epoch, 0.02))
    root = jax.random.key(learning.config.seed)
    params = _fresh(root, words)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, items_BxM: Array, others_BxL: Array, key: Array) -> Any:
        loss, gradient = jax.value_and_grad(_loss)(params, tokens_NxT, items_BxM, others_BxL, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    for epoch in range(EPOCHS):
        order, losses = rng.permutation(users), []
        for start in range(0, len(order), USERS):
            some = np.pad(
                order[start : start + USERS], (0, max(0, start + USERS - len(order))), constant_values=-1
            )
            items_BxM = histories.last_items(some, np.where(some >= 0, ends_U[some], 0), longest)
            if cold is not None:
                place_BxM, kept_B = without(items_BxM, (items_BxM != PAD).sum(axis=1), cold)
                inside = np.arange(longest)[None] < kept_B[:, None]
                items_BxM = np.where(inside, np.take_along_axis(items_BxM, place_BxM, axis=1), PAD)
            others_BxL = _drawn(rng, items_BxM, learning.items, (USERS, longest - 1), cold)
            key = jax.random.fold_in(root, epoch * per_epoch + start // USERS)
            params, state, loss = step(params, state, items_BxM, others_BxL, key)
            losses.append(loss)
        learning.say(f"lstm: epoch {epoch + 1} of {EPOCHS}, loss {float(np.mean(losses)):.4f}")
    return params
