"""Dense attention and its gradients in float64."""

from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    out: np.ndarray  # (B, T, H, V)
    lse: np.ndarray  # (B, T, H)
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def attention(q, k, v, visible_BTS, scale, d_out, d_lse=None) -> Truth:
    """softmax attention over the visible pairs, and the gradients of sum(out * d_out) + sum(lse * d_lse)."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    group = q.shape[2] // k.shape[2]
    k_rep, v_rep = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    visible = np.asarray(visible_BTS)[:, None]
    logits = np.where(visible, scale * np.einsum("bthd,bshd->bhts", q, k_rep), -np.inf)
    top = np.max(logits, axis=-1, keepdims=True, initial=-1e300)
    weights = np.where(visible, np.exp(logits - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    probabilities = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + top, -np.inf)[..., 0].swapaxes(1, 2)
    out = np.einsum("bhts,bshv->bthv", probabilities, v_rep)

    d_probabilities = np.einsum("bthv,bshv->bhts", d_out, v_rep)
    d_logits = probabilities * (d_probabilities - (probabilities * d_probabilities).sum(-1, keepdims=True))
    if d_lse is not None:
        d_logits += probabilities * np.asarray(d_lse, np.float64).swapaxes(1, 2)[..., None]
    dq = scale * np.einsum("bhts,bshd->bthd", d_logits, k_rep)
    dk = scale * np.einsum("bhts,bthd->bshd", d_logits, q)
    dv = np.einsum("bhts,bthv->bshv", probabilities, d_out)
    groups = (*k.shape[:3], group)
    return Truth(out, lse, dq, _sum_groups(dk, groups), _sum_groups(dv, groups))


def _sum_groups(x, groups):
    return x.reshape(*groups, x.shape[-1]).sum(axis=3)
