"""Attention inside blocks with a memory of what is before them, in float64: one document and head, token by token."""

import numpy as np

from oracles.linear_variants import softmax_over_time


def orthonormal(free):
    """Gram-Schmidt."""
    rows = []
    for row in np.float64(free):
        rest = row - sum(((row @ other) * other for other in rows), np.zeros_like(row))
        rows.append(rest / np.sqrt(rest @ rest))
    return np.stack(rows)


def orthogonal_memory(q, x, basis, window, frequency=None, normalise=False):
    out, frequency = [], np.zeros(len(basis)) if frequency is None else np.float64(frequency)
    for t in range(len(q)):
        begin = t // window * window
        seen = [x[s] for s in range(begin, t + 1)]
        if begin:
            h = sum(np.cos(frequency * (t - s)) * (basis @ x[s]) for s in range(begin)) / begin
            h = h * np.sqrt(len(q[t]) / (np.mean(h * h) + 1e-6)) if normalise else h
            seen += [h[row] * basis[row] for row in range(len(basis))]
        seen = np.stack(seen)
        out.append(softmax_over_time(seen @ q[t] * len(q[t]) ** -0.5) @ seen)
    return np.stack(out)


def frames(q, k, v, g, frame):
    out, state = [], np.zeros((k.shape[1], v.shape[1]))
    for start in range(0, len(q), frame):
        of = slice(start, start + frame)
        for i in range(start, start + frame):
            own = softmax_over_time(k[of] @ q[i]) @ v[of]
            out.append(own + np.exp(g[start : i + 1, 0].sum()) * (q[i] @ state))
        state = np.exp(g[of, 0].mean()) * state + k[of].T @ v[of]
    return np.stack(out)
