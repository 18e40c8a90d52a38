"""Members of the family of linear attention in float64, as matrices or loops over one document and one head."""

import numpy as np


def by_run(document):
    """Places of each document of a row: tokens that nothing but padding parts."""
    runs, now = [], None
    for place, number in enumerate(document):
        if number == -1:
            continue
        if number != now:
            runs.append([])
        runs[-1].append(place)
        now = number
    return runs


def by_number(document):
    """Places of each document of a row, wherever they are."""
    return [np.flatnonzero(document == number) for number in np.unique(document[document != -1])]


def over_documents(function, document, *arrays, places=by_run):
    """float64 (B, T, H, V) of function(*arrays of one document and head); heads that are fewer serve groups."""
    arrays = [np.float64(x) for x in arrays]
    heads, out = max(x.shape[2] for x in arrays), None
    for b, row in enumerate(document):
        for place in places(row):
            for head in range(heads):
                found = function(*(x[b, place, head * x.shape[2] // heads] for x in arrays))
                out = np.zeros((*document.shape, heads, found.shape[1])) if out is None else out
                out[b, place, head] = found
    return out


def softmax_over_time(f):
    e = np.exp(f - np.where(np.isneginf(f.max(0)), 0, f.max(0)))
    return e / np.where(e.sum(0) == 0, 1, e.sum(0))


def running_softmax(q, f, v):
    return np.stack([q[t] @ softmax_over_time(f[: t + 1]).T @ v[: t + 1] for t in range(len(q))])


def global_softmax(q, f, v):
    return q @ softmax_over_time(f).T @ v


def global_attention(q, k, v):
    return (q @ k.T) @ v


def higher_order(q, k, v, order, decay=1.0):
    """From their definitions as sums over paths: every step from a token to an earlier one decays by the distance."""
    n = len(q)
    w = np.array([[decay ** (t - j) * (q[t] @ k[j]) if j <= t else 0.0 for j in range(n)] for t in range(n)])
    lower = np.zeros((n, n))
    for t in range(n):
        for j in range(t + 1):
            lower[t, j] = decay ** (t - j) * sum(w[j, i] * (q[t] @ k[i]) for i in range(j + 1))
    return {"second": lower, "asymmetric": w @ w, "third": lower @ w}[order] @ v


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def causal_flow(q, k, v, e=1e-6):
    """Token by token, everything but the last sum as it was when its own token came."""
    length = len(q)
    q, k, n = sigmoid(q), sigmoid(k), np.arange(1, length + 1)
    incoming = [n[t] / ((q[t] + e) @ (k[: t + 1].sum(0) + e)) for t in range(length)]
    outgoing = [n[t] / ((k[t] + e) @ (q[: t + 1].sum(0) + e)) for t in range(length)]
    weighted_k, weighted_q = k * np.array(outgoing)[:, None], q * np.array(incoming)[:, None]
    out, strengths, shares = [], [], []
    for t in range(length):
        sink = (q[t] + e) @ (weighted_k[: t + 1].sum(0) + e) / n[t]
        source = (k[t] + e) @ (weighted_q[: t + 1].sum(0) + e) / n[t]
        strengths.append(np.exp(np.clip(source, -1, 1)))
        shares.append(n[t] * strengths[-1] / sum(strengths))
        memory = sum(np.outer(k[j], shares[j] * v[j]) for j in range(t + 1))
        out.append(sigmoid(sink) * (q[t] * incoming[t] / n[t]) @ memory)
    return np.stack(out)


def global_flow(q, k, v, e=1e-6):
    q, k = sigmoid(q), sigmoid(k)
    incoming, outgoing = 1 / ((q + e) @ (k.sum(0) + e)), 1 / ((k + e) @ (q.sum(0) + e))
    sink = (q + e) @ ((k * outgoing[:, None]).sum(0) + e)
    source = np.clip((k + e) @ ((q * incoming[:, None]).sum(0) + e), -1, 1)
    share = np.exp(source) / np.exp(source).sum() * len(k)
    return sigmoid(sink)[:, None] * ((q * incoming[:, None]) @ k.T @ (v * share[:, None]))


def quasiseparable(q, k, g, q_back, k_back, g_back, v, diagonal):
    """The matrix entry by entry; g (n, 1) and diagonal (n, 1)."""
    matrix = np.diag(diagonal[:, 0])
    for i in range(len(q)):
        for j in range(i):
            matrix[i, j] = q[i - 1] @ k[j] * np.exp(g[j + 1 : i].sum())
        for j in range(i + 1, len(q)):
            matrix[i, j] = q_back[i + 1] @ k_back[j] * np.exp(g_back[i + 1 : j].sum())
    return matrix @ v


def gated_lru(u, i, r, rate):
    """u, i and r (n, W), rate (n, W), the same in every row."""
    h, out = 0.0, []
    for t in range(len(u)):
        a = np.exp(-rate[t] * r[t])
        h = i[t] * u[t] if t == 0 else a * h + np.sqrt(1 - a**2) * i[t] * u[t]
        out.append(h)
    return np.stack(out)
