"""Training losses over the catalogue. All are sums over positions; the step divides by their number.

Sums, not means, so that a batch computed in parts, or on several devices, adds up to the same number.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynrec_jax.batch import PAD
from dynrec_jax.negatives import Negatives
from dynrec_jax.parallel import stream
from dynrec_jax.parallel.blocks import (
    EVERYWHERE,
    TWIN_AXES,
    Blocks,
    Devices,
    join_positions,
    on_devices,
    split_positions,
)
from dynrec_jax.parallel.rules import BATCH, WHOLE

Array = jax.Array


class Positions(NamedTuple):
    """Positions that have a target; each device has its own ones, gathered to its front.

    Attributes:
      query: float[P, D], what is scored.
      vector: float[P, D], the target's item vector.
      target: int32[P], the target's index.
      weight: float[P], of each position in the sum; 0 for what fills up a device's part.
      number: int32[n], how many real positions each of the n devices has; int32[1] on a single one.
    """

    query: Array
    vector: Array
    target: Array
    weight: Array
    number: Array


def gather_positions(
    query_BxLxD: Array, vector_BxLxD: Array, target_BxL: Array, weight_BxL: Array
) -> Positions:
    """Brings the positions whose weight is not 0 to the front, so that a loss spends nothing on padding."""
    place_P, weight_P, number = on_devices(_places, (BATCH,), BATCH, weight_BxL)
    return Positions(
        query=_take(query_BxLxD, place_P),
        vector=_take(vector_BxLxD, place_P),
        target=on_devices(_taken, (BATCH, BATCH), BATCH, target_BxL, place_P),
        weight=weight_P,
        number=number,
    )


def _places(_: Devices, weight_BxL: Array) -> tuple[Array, Array, Array]:
    """Where a device's positions are, int32[P], the weight of each, and how many of them are real."""
    weight_P = weight_BxL.reshape(-1).astype(jnp.float32)
    size = weight_P.shape[0]
    (place_P,) = jnp.nonzero(weight_P, size=size, fill_value=0)
    number = jnp.sum(weight_P != 0, dtype=jnp.int32)
    return place_P, jnp.where(jnp.arange(size) < number, weight_P[place_P], 0.0), number[None]


def _taken(_: Devices, x: Array, place_P: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])[place_P]


@jax.custom_vjp
def _take(x_BxLxD: Array, place_P: Array) -> Array:
    """Positions `[P, D]`. Its own rule, because devices that hold the same ones need not add up their gradients."""
    return on_devices(_taken, (BATCH, BATCH), BATCH, x_BxLxD, place_P)


def _take_forward(x_BxLxD: Array, place_P: Array) -> tuple[Array, Any]:
    return _take(x_BxLxD, place_P), (place_P, x_BxLxD[:0])


def _take_backward(saved: Any, g_PxD: Array) -> tuple[Array, None]:
    place_P, like = saved

    def put_back(_: Devices, g_PxD: Array, place_P: Array) -> Array:
        return jnp.zeros_like(g_PxD).at[place_P].add(g_PxD).reshape(-1, *like.shape[1:])

    return on_devices(put_back, (BATCH, BATCH), BATCH, g_PxD, place_P), None


_take.defvjp(_take_forward, _take_backward)


def full_softmax(at: Positions, table_RxD: Array, blocks: Blocks, dtype: jnp.dtype) -> Array:
    """`Σ_p w_p (log Σ_i exp s_pi - s_p,target)` over all items i, `s = scale · u·v`, streamed.

    The target's score uses the row that was looked up, so that its gradient takes the way of the rows.
    """
    blocks = blocks._replace(dtype=dtype)
    with jax.named_scope("softmax"):  # the name that profiles show
        normaliser = stream.logsumexp_sum(at.query, at.weight, at.number, table_RxD, blocks)
    target_P = _target_scores(at.query, at.vector, blocks.scale, dtype)
    return normaliser - jnp.sum(jnp.where(at.weight != 0, at.weight * target_P, 0.0))


def _target_scores(u_PxD: Array, v_PxD: Array, scale: float, dtype: jnp.dtype) -> Array:
    """Scores of targets, rounded as all other scores are: a target's own term in the sum and its score agree."""
    return (
        jnp.sum(u_PxD.astype(dtype).astype(jnp.float32) * v_PxD.astype(dtype).astype(jnp.float32), -1) * scale
    )


# --- sampled negatives -----------------------------------------------------------------------------------------


def sampled_softmax(
    at: Positions, negatives_KxD: Array, negatives: Negatives, blocks: Blocks, dtype: jnp.dtype
) -> Array:
    """Softmax over the target and K shared negatives, `Σ_p w_p (log(e^{s_t} + Σ_k e^{s_k} / (K q_k)) - s_t)`.

    Dividing by the expected count K·q_k makes the sum over the negatives an unbiased estimate of the sum over all
    items but the target (Bengio & Senécal 2008); the target itself is always there and is not corrected. A
    negative that is the target (an accidental hit) is left out, and so is padding. Differentiable in queries, target
    vectors and negatives.
    """
    rule = _Rule(blocks.scale, blocks.positions, dtype, None)
    return _against(rule, at, negatives_KxD, negatives)


def generalised_bce(
    at: Positions,
    negatives_KxD: Array,
    negatives: Negatives,
    blocks: Blocks,
    dtype: jnp.dtype,
    calibration: float,
) -> Array:
    """gBCE (Petrov & Macdonald 2023): `-Σ_p w_p (β log σ(s_t) + Σ_k log(1 - σ(s_k))) / (K + 1)`.

    `β = α (t (1 - 1/α) + 1/α)` with the sampling rate `α = K / (N - 1)`, at most 1, and the calibration t: 0 is binary
    cross-entropy, whose probabilities K negatives of N - 1 make too large; 1 undoes that wholly. The negatives'
    expected counts play no part; hits and padding are left out as in `sampled_softmax`.
    """
    number = negatives_KxD.shape[0]
    rate = min(number / max(blocks.items - 1, 1), 1.0)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    rule = _Rule(blocks.scale, blocks.positions, dtype, beta)
    uncorrected = negatives._replace(log_expected=jnp.zeros_like(negatives.log_expected))
    return _against(rule, at, negatives_KxD, uncorrected)


class _Rule(NamedTuple):
    """A loss of one position's scores.

    Attributes:
      scale: what multiplies u·v.
      positions: positions that a device scores at a time.
      dtype: of matrix products.
      beta: gBCE's exponent of the target's probability; None for the softmax.
    """

    scale: float
    positions: int
    dtype: Any
    beta: float | None

    def terms(self, t_Q: Array, s_QxK: Array) -> tuple[Array, Array, Array]:
        """The loss [Q] of targets' and negatives' scores, and its derivatives; a score of -inf counts for nothing."""
        if self.beta is None:
            z_Q = jax.nn.logsumexp(jnp.concatenate([t_Q[:, None], s_QxK], axis=1), axis=1)
            return z_Q - t_Q, jnp.exp(t_Q - z_Q) - 1.0, jnp.exp(s_QxK - z_Q[:, None])
        share = 1.0 / (s_QxK.shape[1] + 1)
        loss_Q = (self.beta * jax.nn.softplus(-t_Q) + jax.nn.softplus(s_QxK).sum(axis=1)) * share
        return loss_Q, -self.beta * share * jax.nn.sigmoid(-t_Q), share * jax.nn.sigmoid(s_QxK)


def _against(rule: _Rule, at: Positions, negatives_KxD: Array, negatives: Negatives) -> Array:
    with jax.named_scope("softmax"):
        return _sampled(
            at.query, at.vector, negatives_KxD, (at.target, at.weight, at.number), negatives, rule
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sampled(u: Array, v: Array, v_KxD: Array, places: Any, negatives: Negatives, rule: _Rule) -> Array:
    return _sampled_forward(u, v, v_KxD, places, negatives, rule)[0]


def _sampled_forward(
    u: Array, v: Array, v_KxD: Array, places: Any, negatives: Negatives, rule: _Rule
) -> tuple[Array, Any]:
    total, du_PxD, dt_P, dv_KxD = on_devices(
        functools.partial(_sampled_gradients, rule),
        (*(BATCH,) * 2, WHOLE, *(BATCH,) * 3, WHOLE, WHOLE),
        (WHOLE, BATCH, BATCH, WHOLE),
        *(u, v, v_KxD, *places, *negatives),
    )
    return total, (du_PxD, dt_P, dv_KxD, u, v[:0], v_KxD[:0])


def _sampled_gradients(
    rule: _Rule,
    devices: Devices,
    u: Array,
    v: Array,
    v_KxD: Array,
    target: Array,
    weight: Array,
    number: Array,
    ids_K: Array,
    log_expected_K: Array,
) -> tuple[Array, Array, Array, Array]:
    """The loss and its derivatives by queries [P, D], targets' scores [P] and negatives [K, D], in blocks of positions.

    Devices that hold the same positions share the work: each takes its part of every block.
    """
    twins = devices.size(TWIN_AXES)
    each = max(min(rule.positions, u.shape[0]) // twins, 1)
    first = devices.place(TWIN_AXES) * each
    u_BxQxD, v_BxQxD, target_BxQ, w_BxQ = (split_positions(x, each * twins) for x in (u, v, target, weight))
    cast_KxD = v_KxD.astype(rule.dtype)
    left_out_K = jnp.where(ids_K == PAD, jnp.inf, log_expected_K)

    def block(b: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        total, du_BxqxD, dt_Bxq, dv_KxD = carry
        u_QxD, v_QxD, target_Q, w_Q = (
            jax.lax.dynamic_slice_in_dim(x[b], first, each) for x in (u_BxQxD, v_BxQxD, target_BxQ, w_BxQ)
        )
        cast_QxD = u_QxD.astype(rule.dtype)
        s_QxK = jnp.einsum("qd,kd->qk", cast_QxD, cast_KxD, preferred_element_type=jnp.float32)
        s_QxK = s_QxK * rule.scale - left_out_K[None, :]
        s_QxK = jnp.where(target_Q[:, None] == ids_K[None, :], -jnp.inf, s_QxK)
        loss_Q, dt_Q, ds_QxK = rule.terms(_target_scores(u_QxD, v_QxD, rule.scale, rule.dtype), s_QxK)
        dt_Q = dt_Q * w_Q
        ds_QxK = (ds_QxK * w_Q[:, None]).astype(rule.dtype)
        du_QxD = jnp.einsum("qk,kd->qd", ds_QxK, cast_KxD, preferred_element_type=jnp.float32)
        du_QxD = (du_QxD + dt_Q[:, None] * v_QxD.astype(rule.dtype).astype(jnp.float32)) * rule.scale
        part_KxD = jnp.einsum("qk,qd->kd", ds_QxK, cast_QxD, preferred_element_type=jnp.float32)
        total = total + jnp.sum(jnp.where(w_Q != 0, w_Q * loss_Q, 0.0))
        return total, du_BxqxD.at[b].set(du_QxD), dt_Bxq.at[b].set(dt_Q), dv_KxD + part_KxD * rule.scale

    shape = (u_BxQxD.shape[0], each)
    start = (
        jnp.float32(0),
        jnp.zeros((*shape, u.shape[1]), jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(v_KxD.shape, jnp.float32),
    )
    blocks = -(-number[0] // (each * twins))  # no device waits for another
    total, du_BxqxD, dt_Bxq, dv_KxD = jax.lax.fori_loop(0, blocks, block, start)
    du_PxD, dt_P = (
        join_positions(devices.together(x, TWIN_AXES, axis=1), u.shape[0]) for x in (du_BxqxD, dt_Bxq)
    )
    return devices.add(total, EVERYWHERE), du_PxD, dt_P, devices.add(dv_KxD, EVERYWHERE)


def _sampled_backward(rule: _Rule, saved: Any, g: Array) -> tuple[Array, Array, Array, None, None]:
    du_PxD, dt_P, dv_KxD, u, v, v_K = saved
    cast_u = u.astype(rule.dtype).astype(jnp.float32)
    dv_PxD = dt_P[:, None] * cast_u * rule.scale
    return (
        (g * du_PxD).astype(u.dtype),
        (g * dv_PxD).astype(v.dtype),
        (g * dv_KxD).astype(v_K.dtype),
        None,
        None,
    )


_sampled.defvjp(_sampled_forward, _sampled_backward)
