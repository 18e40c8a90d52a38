"""Dense attention and its gradients in float64."""

from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    out: np.ndarray  # (B, T, H, V)
    lse: np.ndarray  # (B, T, H)
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    d_score: tuple[np.ndarray, ...] = ()  # one for each parameter of the score


def attention(q, k, v, visible_BTS, scale, d_out, d_lse=None) -> Truth:
    """softmax attention over the visible pairs, and the gradients of sum(out * d_out) + sum(lse * d_lse)."""
    q, k, v, d_out, d_lse = _wide(q, k, v, d_out, d_lse)
    probabilities, lse = _softmax(q, k, visible_BTS, scale)
    out = np.einsum("bhts,bshv->bthv", probabilities, _repeat(v, q))
    return Truth(out, lse, *_gradients(probabilities, q, k, v, scale, d_out, d_lse, sign=-1))


def magnitudes(q, k, v, visible_BTS, scale, d_out, d_lse=None) -> Truth:
    """The sums of `attention` with every term taken without its sign: what their rounding errors are in proportion to.

    A gradient of attention is a difference that may cancel to nothing, as in a row that sees one key; the rounding of
    what was subtracted stays.
    """
    q, k, v, d_out, d_lse = _wide(q, k, v, d_out, d_lse)
    probabilities, _ = _softmax(q, k, visible_BTS, scale)
    q, k, v, d_out, d_lse = (np.abs(x) for x in (q, k, v, d_out, d_lse))
    logits = scale * np.einsum("bthd,bshd->bhts", q, _repeat(k, q))
    lse = np.where(by_head(visible_BTS), logits, 0).max(-1).swapaxes(1, 2)
    out = np.einsum("bhts,bshv->bthv", probabilities, _repeat(v, q))
    return Truth(out, lse, *_gradients(probabilities, q, k, v, scale, d_out, d_lse, sign=1))


def by_head(visible):
    """(B, 1 or H, T, S) of what heads share, (B, T, S), or what they do not, (B, H, T, S)."""
    visible = np.asarray(visible)
    return visible[:, None] if visible.ndim == 3 else visible


def _wide(q, k, v, d_out, d_lse):
    d_lse = np.zeros(q.shape[:3]) if d_lse is None else d_lse
    return (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))


def _softmax(q, k, visible_BTS, scale):
    """(probabilities (B, H, T, S), lse (B, T, H)); a row that sees nothing has 0 and -inf."""
    visible = by_head(visible_BTS)
    logits = np.where(visible, scale * np.einsum("bthd,bshd->bhts", q, _repeat(k, q)), -np.inf)
    top = np.max(logits, axis=-1, keepdims=True, initial=-1e300)
    weights = np.where(visible, np.exp(logits - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + top, -np.inf)[..., 0].swapaxes(1, 2)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), lse


def _gradients(probabilities, q, k, v, scale, d_out, d_lse, sign):
    """(dq, dk, dv); `sign` is that of the term which the normalisation of the softmax subtracts."""
    d_probabilities = np.einsum("bthv,bshv->bhts", d_out, _repeat(v, q))
    normalisation = (probabilities * d_probabilities).sum(-1, keepdims=True)
    d_logits = probabilities * (d_probabilities + sign * normalisation + d_lse.swapaxes(1, 2)[..., None])
    dq = scale * np.einsum("bhts,bshd->bthd", d_logits, _repeat(k, q))
    dk = scale * np.einsum("bhts,bthd->bshd", d_logits, q)
    dv = np.einsum("bhts,bthv->bshv", probabilities, d_out)
    return dq, _sum_groups(dk, k), _sum_groups(dv, k)


def _repeat(x, q):
    """Keys or values for every query head."""
    return np.repeat(x, q.shape[2] // x.shape[2], axis=2)


def _sum_groups(x, k):
    """The gradient of a key/value head: the sum over the query heads that it serves."""
    return x.reshape(*k.shape[:3], -1, x.shape[-1]).sum(axis=3)
