"""Contextual position encoding in float64, dense: positions are sums of gates, the table is read with hat functions."""

import numpy as np


def attention(q, k, v, table, visible_BTS, gate_k=None, scale=None):
    """(B, T, H, V), for q (B, T, H, D), k and gate_k (B, S, K, D), v (B, S, K, V), table (P, D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gate_k = k if gate_k is None else gate_k
    k, gate_k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, gate_k, v))
    visible = np.asarray(visible_BTS)[:, None]
    gates = np.where(visible, 1 / (1 + np.exp(-scale * np.einsum("bthd,bshd->bhts", q, gate_k))), 0)
    later = np.triu(np.ones((k.shape[1], k.shape[1]))).T  # [l, j] is 1 where l >= j
    position = np.minimum(gates @ later, len(table) - 1)
    bias = 0
    for n, vector in enumerate(table):
        bias = bias + np.maximum(0, 1 - abs(position - n)) * np.moveaxis(q @ vector, 2, 1)[..., None]
    weights = np.where(visible, np.exp(scale * (np.einsum("bthd,bshd->bhts", q, k) + bias)), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), v)
