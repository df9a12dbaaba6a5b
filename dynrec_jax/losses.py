"""Training losses over the catalogue. All are sums over positions; the step divides by their number.

Sums, not means, so that a batch computed in parts, or on several devices, adds up to the same number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.parallel import stream

Array = jax.Array


class Positions(NamedTuple):
    """Positions that have a target, gathered to the front.

    Attributes:
      query: float[P, D], what is scored.
      vector: float[P, D], the target's item vector.
      target: int32[P], the target's index.
      weight: float[P], 0 from `number` on.
      number: int32 scalar, how many positions are real.
    """

    query: Array
    vector: Array
    target: Array
    weight: Array
    number: Array


class Negatives(NamedTuple):
    """Items drawn for a batch, shared by its positions.

    Attributes:
      ids: int32[K].
      log_expected: float[K], log of how often each was expected among the K draws; zeros without correction.
    """

    ids: Array
    log_expected: Array


def gather_positions(
    query_BxLxD: Array, vector_BxLxD: Array, target_BxL: Array, valid_BxL: Array
) -> Positions:
    """Brings the positions of `valid` to the front, so that a loss spends nothing on padding."""
    size = valid_BxL.size
    dim = query_BxLxD.shape[-1]
    (place_P,) = jnp.nonzero(valid_BxL.reshape(-1), size=size, fill_value=0)
    number = jnp.sum(valid_BxL, dtype=jnp.int32)
    return Positions(
        query=query_BxLxD.reshape(size, dim)[place_P],
        vector=vector_BxLxD.reshape(size, dim)[place_P],
        target=target_BxL.reshape(size)[place_P],
        weight=(jnp.arange(size) < number).astype(jnp.float32),
        number=number,
    )


def full_softmax(at: Positions, table_RxD: Array, blocks: stream.Blocks, dtype: jnp.dtype) -> Array:
    """`Σ_p w_p (log Σ_i exp s_pi - s_p,target)` over all items i, `s = scale · u·v`, streamed.

    The target's score uses the row that was looked up, so that its gradient takes the way of the rows.
    """
    cast_u, cast_v = at.query.astype(dtype), table_RxD.astype(dtype)
    with jax.named_scope("softmax"):  # the name that profiles show
        normaliser = stream.logsumexp_sum(cast_u, at.weight, at.number, cast_v, blocks)
    target_P = _target_scores(at.query, at.vector, blocks.scale, dtype)
    return normaliser - jnp.sum(jnp.where(at.weight != 0, at.weight * target_P, 0.0))


def sampled_softmax(
    at: Positions, negatives_KxD: Array, negatives: Negatives, blocks: stream.Blocks, dtype: jnp.dtype
) -> Array:
    """Softmax over the target and K shared negatives, `Σ_p w_p (log(e^{s_t} + Σ_k e^{s_k} / (K q_k)) - s_t)`.

    Dividing by the expected count K·q_k makes the sum over the negatives an unbiased estimate of the sum over all
    items but the target (Bengio & Senécal 2008); the target itself is always there and is not corrected. A
    negative that is the target (an accidental hit) is left out. Scored in blocks of positions, which are computed
    again for the gradient.
    """
    size = min(blocks.positions, at.target.shape[0])
    cast_KxD = negatives_KxD.astype(dtype)

    @jax.checkpoint
    def block(part: tuple[Array, Array, Array, Array]) -> Array:
        u_QxD, v_QxD, target_Q, weight_Q = part
        s_QxK = jnp.einsum("qd,kd->qk", u_QxD.astype(dtype), cast_KxD, preferred_element_type=jnp.float32)
        s_QxK = s_QxK * blocks.scale - negatives.log_expected[None, :]
        s_QxK = jnp.where(target_Q[:, None] == negatives.ids[None, :], -jnp.inf, s_QxK)
        target_score_Q = _target_scores(u_QxD, v_QxD, blocks.scale, dtype)
        z_Q = jax.nn.logsumexp(jnp.concatenate([target_score_Q[:, None], s_QxK], axis=1), axis=1)
        return jnp.sum(jnp.where(weight_Q != 0, weight_Q * (z_Q - target_score_Q), 0.0))

    parts = tuple(stream.split_positions(x, size) for x in (at.query, at.vector, at.target, at.weight))
    with jax.named_scope("softmax"):
        return jnp.sum(jax.lax.map(block, parts))


def _target_scores(u_PxD: Array, v_PxD: Array, scale: float, dtype: jnp.dtype) -> Array:
    """Scores of targets, rounded as all other scores are: a target's own term in the sum and its score agree."""
    return (
        jnp.sum(u_PxD.astype(dtype).astype(jnp.float32) * v_PxD.astype(dtype).astype(jnp.float32), -1) * scale
    )


def draw_negatives(key: Array, number: int, items: int, running_R: Array | None, logq: bool) -> Negatives:
    """K items, with replacement: uniform, or by counts (`running` int32[R], the sum up to and with each row).

    A whole number below the total names the first row whose running count exceeds it, exactly; padding has no
    count, so it is never drawn.
    """
    if running_R is None:
        ids_K = jax.random.randint(key, (number,), 1, items + 1, jnp.int32)
        expected_K = jnp.full((number,), number / items, jnp.float32)
    else:
        total = running_R[items]
        at_K = jax.random.randint(key, (number,), 0, total, jnp.int32)
        ids_K = jnp.searchsorted(running_R, at_K, side="right").astype(jnp.int32)
        count_K = running_R[ids_K] - running_R[ids_K - 1]
        expected_K = number * (count_K.astype(jnp.float32) / total.astype(jnp.float32))
    log_expected_K = jnp.log(expected_K)
    return Negatives(ids_K, log_expected_K if logq else jnp.zeros_like(log_expected_K))
