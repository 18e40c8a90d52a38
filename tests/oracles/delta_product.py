"""The delta product in float64, step by step, and the mean of three tokens."""

import math

import numpy as np

from oracles.linear_variants import by_run


def virtual(x, of, t, order, trick):
    """The virtual tokens of x[t], x (T, D); tokens that are not `of` the same document are 0."""
    derivative, rotary, pairs = [], [], x.shape[1] // 2
    for j in range(order):
        m = order - 1 - j
        weight = (-1) ** m * math.comb(order - 1, m) / sum(math.comb(order - 1, i) for i in range(order))
        derivative.append(weight * x[t - m] if t - m in of else 0 * x[t])
        turned = (x[t, :pairs] + 1j * x[t, pairs : 2 * pairs]) * np.exp(2j * np.pi * j / order)
        rotary.append(np.concatenate([turned.real, turned.imag, x[t, 2 * pairs :]]))
    both = [(a + b) / 2 for a, b in zip(derivative, rotary, strict=True)]
    return {"derivative": derivative, "rotary": rotary, "both": both}[trick]


def delta_product(document, q, k, v, beta, log_decay, order, trick):
    """(B, T, H, V); beta and log_decay (B, T, K)."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    out, group = np.zeros((*q.shape[:3], v.shape[3])), q.shape[2] // k.shape[2]
    for b, head in np.ndindex(out.shape[0], out.shape[2]):
        own = head // group
        for of in by_run(document[b]):
            memory = np.zeros((k.shape[3], v.shape[3]))
            for t in of:
                memory *= np.exp(log_decay[b, t, own])
                rows = q[b, :, head], k[b, :, own], v[b, :, own]
                queries, keys, values = (virtual(x, of, t, order, trick) for x in rows)
                for key, value in zip(keys, values, strict=True):
                    memory += beta[b, t, own] * np.outer(key, value - key @ memory)
                out[b, t, head] = queries[-1] @ memory
    return out


def mean_of_three(document, x):
    """(B, T, C): for what is missing of the three, the oldest that there is."""
    x, out = np.float64(x), np.zeros(x.shape)
    for b, row in enumerate(document):
        for of in by_run(row):
            for t in of:
                there = [x[b, s] for s in (t - 2, t - 1, t) if s in of]
                out[b, t] = np.mean([there[0]] * (3 - len(there)) + there, axis=0)
    return out
