"""The linear recurrence in float64, token by token, one head of one row at a time."""

from typing import NamedTuple

import numpy as np


class Problem(NamedTuple):
    """Shapes as in striate.linear_attention; what the rule does not have is None."""

    rule: str
    normalise: bool
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    log_decay: np.ndarray | None
    beta: np.ndarray | None
    document: np.ndarray  # (B, T); -1 is padding


def recurrence(problem: Problem, memory=None, of=None):
    """(out (B, T, H, V), states (B, K, D, V)) from the states given, which are those of the documents `of` (B,)."""
    q, k, v = (np.float64(x) for x in (problem.q, problem.k, problem.v))
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    out, states = np.zeros((batch, length, heads, v.shape[3])), np.zeros((batch, kv_heads, width, v.shape[3]))
    for b in range(batch):
        for head in range(kv_heads):
            state = np.zeros(states.shape[2:]) if memory is None else np.float64(memory[b, head])
            total, document = np.zeros(width), None if of is None else of[b]
            for t in range(length):
                now = problem.document[b, t]
                if now == -1:
                    continue
                if document is not None and now != document:
                    state, total = 0 * state, 0 * total
                document, decay = now, np.exp(np.float64(_decay(problem, b, t, head)))
                state, total = state * np.reshape(decay, (-1, 1)), total * decay
                key, value = k[b, t, head], v[b, t, head]
                if problem.rule == "delta":
                    value = float(1 if problem.beta is None else problem.beta[b, t, head]) * (value - key @ state)
                state, total = state + np.outer(key, value), total + key
                for query in range(head * heads // kv_heads, (head + 1) * heads // kv_heads):
                    divisor = q[b, t, query] @ total if problem.normalise else 1.0
                    out[b, t, query] = q[b, t, query] @ state / divisor
            states[b, head] = state
    return out, states


def _decay(problem: Problem, b: int, t: int, head: int):
    g = problem.log_decay
    return 0.0 if g is None else g[head] if g.ndim == 1 else g[b, t, head]
