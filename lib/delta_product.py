"""The delta product: several steps of the delta rule for every token, on virtual tokens that are made of it.

For the virtual tokens j = 1, ..., n of token t, with m = n - j,

    H <- H + beta_t k_tj (v_tj - H^T k_tj)^T, one after the other;        o_t = H^T q_tn

    derivative:  x_tj = w_m x_{t-m},    w_m = (-1)^m binomial(n - 1, m) / 2^(n-1)
    rotary:      x_tj = x_t, its pairs turned by 2 pi (j - 1) / n
    both:        the mean of these

for x any of q, k and v. It is `linear_attention` by the delta rule over n times as many tokens, so that it keeps
documents apart, passes padding over, goes on from its states and runs over a sharded sequence as that does. Strengths
are those of the token itself: with a sign, as differences of strengths would have, a step would undo another.

Source: Furfaro 2025 (TPTT); Siems et al. 2025 (DeltaProduct), whose virtual tokens have projections of their own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from striate.lib.convolution import Tail, short_convolution
from striate.lib.errors import UserError
from striate.lib.linear_attention import check_arrays, linear_attention
from striate.lib.positions import rope
from striate.lib.recurrence import State
from striate.lib.tokens import Tokens

TRICKS = ("derivative", "rotary", "both")


def delta_product(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    beta: jax.Array,
    *,
    order: int = 2,
    trick: str = "derivative",
    log_decay: jax.Array | None = None,
    tokens: Tokens | None = None,
    initial_state: tuple[State, Tail | None] | None = None,
    return_state: bool = False,
    parallel=None,
    **how,
):
    """The recurrence of this file, over a sequence in the order of its tokens; order 1 is DeltaNet.

    Args:
      q_BTHD, k_BTKD, v_BTKV: as in `linear_attention`; keys have length 1 at most.
      beta: how much of a value is written, 0 to 1. A gate for each channel is to be averaged: one number a token is
        what keeps a step the identity plus a matrix of rank one.
      order: n, virtual tokens of a token.
      trick: how they are made, "derivative", "rotary" or "both". Of other documents and of padding, x is 0.
      log_decay: as in `linear_attention`, once a token, before its first step.
      parallel: how the sequence of the tokens themselves crosses devices.

    Returns:
      out as `linear_attention`, with return_state also (the State, the Tail of keys and values or None).

    Raises:
      UserError: an order below 1, a trick that is not known, or shapes that do not fit.
    """
    if order < 1 or trick not in TRICKS:
        raise UserError(
            f"order {order} and trick {trick!r} cannot be: the order is at least 1, and tricks are "
            f"{', '.join(map(repr, TRICKS))}."
        )
    check_arrays(q_BTHD, k_BTKD, v_BTKV, tokens)
    tokens = Tokens.arange(*q_BTHD.shape[:2]) if tokens is None else tokens
    state, tail = initial_state or (None, None)
    virtual = []
    if trick != "rotary":
        made, tail = _derivative(q_BTHD, k_BTKD, v_BTKV, order, tokens, tail, parallel)
        virtual.append(made)
    if trick != "derivative":
        virtual.append([_turned(x, order) for x in (q_BTHD, k_BTKD, v_BTKV)])
    q, k, v = (sum(x) / len(virtual) for x in zip(*virtual, strict=True))
    more = {"parallel": parallel and parallel.stretched(order), "log_decay": _once(log_decay, k_BTKD, order)}
    more |= {"tokens": tokens.map(lambda x: _repeated(x, order)), "initial_state": state, "return_state": True}
    out, state = linear_attention(q, k, v, rule="delta", beta=_repeated(beta, order), **how, **more)
    out = out.reshape(*q_BTHD.shape[:2], order, *out.shape[2:])[:, :, -1]
    return (out, (state, tail)) if return_state else out


def mean_of_three(
    x_BTC: jax.Array,
    *,
    tokens: Tokens,
    initial_tail: Tail | None = None,
    parallel=None,
) -> tuple[jax.Array, Tail]:
    """(the mean of the last three tokens (batch, length, channels), the Tail).

    What is before the first token of a document counts as that. Arguments are those of `short_convolution`.
    """
    with_one = jnp.stack([x_BTC, jnp.ones_like(x_BTC)], axis=3).reshape(*x_BTC.shape[:2], -1)
    how = {"tokens": tokens, "initial_tail": initial_tail, "return_tail": True, "parallel": parallel}
    sums, tail = short_convolution(with_one, jnp.ones((3, with_one.shape[2])), **how)
    total, count = jnp.moveaxis(sums.reshape(*x_BTC.shape, 2), 3, 0)
    missing = jnp.where(count == 1, 2 * x_BTC, jnp.where(count == 2, total - x_BTC, 0))
    return (total + missing) / 3, tail


def _repeated(x, order: int):
    return jnp.repeat(x, order, axis=1)


def _derivative(q_BTHD, k_BTKD, v_BTKV, order: int, tokens, tail, parallel):
    """Virtual tokens of the three, and the Tail. Of the queries only those that are read are what they are to be."""
    weights = [(-1) ** m * math.comb(order - 1, m) / 2 ** (order - 1) for m in range(order)]
    x_BTC = jnp.concatenate([k_BTKD, v_BTKV], axis=3).reshape(*k_BTKD.shape[:2], -1)
    how = {"tokens": tokens, "initial_tail": tail, "return_tail": True, "parallel": parallel}
    earlier = []
    for m in range(order - 1, 0, -1):
        taps = jnp.zeros((order, x_BTC.shape[2])).at[m].set(weights[m])
        shifted, tail = short_convolution(x_BTC, taps, **how)
        earlier.append(shifted)
    x_BTNC = jnp.stack([*earlier, weights[0] * x_BTC], axis=2)
    batch, length, heads, width = k_BTKD.shape
    x = x_BTNC.reshape(batch, length * order, heads, -1)
    return [_repeated(weights[0] * q_BTHD, order), *jnp.split(x, [width], axis=3)], tail


def _turned(x_BTHD, order: int):
    """Pairs are those of `rope`."""
    batch, length, _, width = x_BTHD.shape
    turns = jnp.broadcast_to(jnp.tile(jnp.arange(order), length)[None], (batch, length * order))
    return rope(_repeated(x_BTHD, order), turns, jnp.full(width // 2, 2 * math.pi / order))


def _once(log_decay, k_BTKD, order: int):
    """For the first virtual token of each token."""
    if log_decay is None:
        return None
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, k_BTKD.shape[:3])
    first = jnp.arange(order * k_BTKD.shape[1]) % order == 0
    return jnp.where(first.reshape(1, -1, *(1,) * (log_decay.ndim - 2)), _repeated(log_decay, order), 0)
