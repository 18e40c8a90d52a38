"""Orthogonal memory: the tokens of a window, and the mean of all before it along r orthonormal directions (LAVO).

A document is cut into windows of w tokens. With B (r, D) of orthonormal rows b_l, and x the keys, which are the values
too, a query reads in one softmax the tokens of its window up to itself and r rows for all windows before it:

    h = mean of B x_s over the tokens s of the windows before        M = diag(h) B, of rows h_l b_l
    o_t = softmax(q_t [x of the window; M]^T / sqrt(D)) [x of the window; M]

The rows stay orthogonal, so that nothing is kept twice, and q M^T = h * (B q): M is never made. Where positions are
embedded, the means are those of (B x_s)_l turned by the angle theta_l s, and a query turns them back by theta_l t: what
s has added then has the factor cos(theta_l (t - s)).

Two passes of linear attention make h. The first has at every token the mean over its document so far. In the second
the last token of a window puts that into one of two rows, windows in turn, and the tokens of the next one read there.

Source: Zhang et al. 2023 (Linear Attention via Orthogonal Memory), by its outline; the equations are in its style.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from striate.lib.attention import Parallel as AttentionParallel
from striate.lib.attention import attention, check_tokens, merge
from striate.lib.errors import UserError
from striate.lib.linear_attention import Parallel as RecurrenceParallel
from striate.lib.linear_attention import linear_attention
from striate.lib.masks import Mask, causal, same
from striate.lib.positions import NoPE, Position, lrpe
from striate.lib.recurrence import HIGHEST, State
from striate.lib.scores import Score
from striate.lib.tokens import Tokens

VISIBLE, UNTOLD = causal() & same("document"), NoPE()
FORGET = -128.0  # a log-decay after which float32 has nothing left
EPSILON = 1e-6


def orthonormal(free_RD: jax.Array) -> jax.Array:
    """Orthonormal rows (..., r, D), float32, from any that are independent, r <= D: by QR, its signs such that rows
    which are orthonormal stay what they are."""
    q_DR, r_RR = jnp.linalg.qr(free_RD.astype(jnp.float32).swapaxes(-1, -2))
    turned = jnp.diagonal(r_RR, axis1=-2, axis2=-1)[..., None] < 0
    rows_RD = q_DR.swapaxes(-1, -2)
    return jnp.where(turned, -rows_RD, rows_RD)


def orthogonal_memory(
    q_BTHD: jax.Array,
    x_BSKD: jax.Array,
    basis_KRD: jax.Array,
    *,
    window: int,
    frequency: jax.Array | None = None,
    normalise: bool = False,
    position: Position = UNTOLD,
    mask: Mask = VISIBLE,
    score: Score | None = None,
    tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    initial_state: tuple[State, State] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    parallel: AttentionParallel | None = None,
    recurrence: RecurrenceParallel | None = None,
):
    """The attention of this file. Positions of a document count its tokens, from 0.

    Args:
      q_BTHD: queries, (batch, length, heads, head_dim), a floating dtype.
      x_BSKD: keys and values in one, (batch, key length, key/value heads, head_dim): those of `tokens` come last.
      basis_KRD: orthonormal rows for each key/value head, at most head_dim, as `orthonormal` makes them.
      window: tokens of a window.
      frequency: radians a token, float32 (r,), of positions embedded in the memory, such as `frequencies(2 r)`.
      normalise: scale h to a root mean square of sqrt(head_dim), so that rows are as long as tokens whose channels are
        of size 1, and do not fade as means do.
      position: of queries and keys in the window.
      mask: what a token sees of its window.
      score: what becomes of a logit in the window.
      tokens: of the queries; None is one document.
      k_tokens: of the keys: where a sequence goes on, those that are kept of earlier tokens, then `tokens`.
      initial_state: what came before.
      return_state: also return the State of the running mean and that of the mean of the windows before.
      implementation: of the softmax attention.
      parallel, recurrence: how softmax attention and how recurrences cross devices.

    Returns:
      out (batch, length, heads, head_dim) in the dtype of x, with return_state also the States. Means are float32.

    Raises:
      UserError: shapes that do not fit.
    """
    _check(q_BTHD, x_BSKD, basis_KRD, window)
    tokens, k_tokens = check_tokens(q_BTHD, x_BSKD, tokens, k_tokens)
    q_tokens, k_tokens = (x.replace(chunk=x.position // window) for x in (tokens, k_tokens))
    how = {"q_tokens": q_tokens, "k_tokens": k_tokens, "implementation": implementation, "parallel": parallel}
    turned = position.queries(q_BTHD, tokens), position.keys(x_BSKD, k_tokens)
    near = attention(*turned, x_BSKD, mask=mask & same("chunk"), score=score, return_lse=True, **how)
    own_BTKD = x_BSKD[:, x_BSKD.shape[1] - q_BTHD.shape[1] :]
    h_BTKR, state = _means(own_BTKD, basis_KRD, window, frequency, tokens, initial_state, recurrence)
    if normalise:
        h_BTKR *= jnp.sqrt(q_BTHD.shape[3] / ((h_BTKR * h_BTKR).mean(-1, keepdims=True) + EPSILON))
    out, _ = merge(near, _read(q_BTHD, h_BTKR, basis_KRD, tokens.position >= window))
    return (out, state) if return_state else out


def _means(x_BTKD, basis_KRD, window: int, frequency, tokens: Tokens, before, parallel):
    """(h (B, T, K, r): 0 in the first window, the States after)."""
    h = jnp.einsum("btkd,krd->btkr", x_BTKD, basis_KRD, precision=HIGHEST)
    if frequency is not None:
        h = lrpe(h, tokens.position, frequency)
    running, held = before or (None, None)
    how = {"tokens": tokens, "return_state": True, "parallel": parallel}
    one = jnp.ones_like(h[..., :1])
    h, running = linear_attention(one, one, h, normalise=True, initial_state=running, **how)
    place_BT, last_BT = tokens.position // window % 2, tokens.position % window == window - 1
    row = jnp.broadcast_to(jax.nn.one_hot(place_BT, 2)[:, :, None], (*one.shape[:3], 2))
    writes = row * last_BT[:, :, None, None]
    h, held = linear_attention(1 - row, writes, h, log_decay=FORGET * writes, initial_state=held, **how)
    if frequency is not None:
        turns = lrpe(jnp.ones_like(h[..., : frequency.shape[0]]), tokens.position, frequency)
        h = sum(jnp.split(h * turns, 2, axis=3))
    return h, (running, held)


def _read(q_BTHD, h_BTKR, basis_KRD, there_BT):
    """(out (B, T, H, D), lse (B, T, H)) of attention to the rows of the memory, where there is one."""
    q_BTKGD = q_BTHD.reshape(*h_BTKR.shape[:3], -1, q_BTHD.shape[3])
    along_BTKGR = jnp.einsum("btkgd,krd->btkgr", q_BTKGD, basis_KRD)
    logits = h_BTKR[:, :, :, None] * along_BTKGR * q_BTHD.shape[3] ** -0.5
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weighted = jnp.exp(logits - lse) * h_BTKR[:, :, :, None]
    out = jnp.einsum("btkgr,krd->btkgd", weighted, basis_KRD)
    return out.reshape(q_BTHD.shape), jnp.where(there_BT[..., None], lse.reshape(q_BTHD.shape[:3]), -jnp.inf)


def _check(q, x, basis, window: int) -> None:
    if q.ndim != 4 or x.ndim != 4 or q.shape[::3] != x.shape[::3] or q.shape[1] > x.shape[1] or q.shape[2] % x.shape[2]:
        raise UserError(
            f"q {q.shape} and x {x.shape} do not fit: they need the form (batch, length, heads, head_dim), one "
            "batch and head_dim, at least as many keys as queries, and a multiple of the heads of x."
        )
    if basis.ndim != 3 or basis.shape[::2] != x.shape[2:] or basis.shape[1] > x.shape[3]:
        raise UserError(
            f"The basis has shape {basis.shape}; it needs ({x.shape[2]}, r, {x.shape[3]}), with r at most {x.shape[3]}."
        )
    if window < 1:
        raise UserError(f"window is {window}; it is a number of tokens, at least 1.")
