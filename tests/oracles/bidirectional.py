"""Layers that see both sides, in float64, from the parameters of the layer."""

import numpy as np

from oracles import linear_variants as variants


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def centred_convolution(x, taps, document):
    """x (B, T, C); what lies between two tokens is of their document, or padding."""
    x, taps, y, reach = np.float64(x), np.float64(taps), np.zeros(x.shape), len(taps) // 2
    for b, t in np.ndindex(document.shape):
        for s in range(max(t - reach, 0), min(t + reach + 1, document.shape[1])):
            between = document[b, min(s, t) : max(s, t) + 1]
            if -1 not in (document[b, t], document[b, s]) and np.isin(between, (document[b, t], -1)).all():
                y[b, t] += taps[reach + t - s] * x[b, s]
    return y


def projected(x, kernel, others):
    """(B, T, H, D), and `others` of (B, T, K, D)."""
    y = np.einsum("bte,ekgd->btkgd", x, kernel)
    heads = y[:, :, :, : y.shape[3] - others]
    return [
        heads.reshape(*x.shape[:2], -1, y.shape[4]),
        *(y[:, :, :, i] for i in range(y.shape[3] - others, y.shape[3])),
    ]


def convolved(parts, p, document):
    """silu of the convolution; the channels of the taps are those of all parts of a key/value head, side by side."""
    groups, start, out = p["taps"].shape[1], 0, []
    bias = p["taps_bias"].reshape(groups, -1)
    for x in parts:
        channels = slice(start, start + x.shape[2] * x.shape[3] // groups)
        taps = p["taps"][:, :, channels].reshape(len(p["taps"]), -1)
        flat = centred_convolution(x.reshape(*x.shape[:2], -1), taps, document) + bias[:, channels].reshape(-1)
        out.append(silu(flat).reshape(x.shape))
        start = channels.stop
    return out


def hydra(p, x, document):
    v, *of_groups = convolved(projected(x, p["in"], 4), p, document)
    k, q, k_back, q_back = (part.repeat(v.shape[2] // part.shape[2], axis=2) for part in of_groups)
    step, step_back = (softplus(x @ p[name] + p["step_bias"])[..., None] for name in ("step", "step_back"))
    rate = np.exp(p["log_rate"])[:, None]
    diagonal = np.einsum("bthd,hdg->btg", v, p["own"]) + p["own_bias"]
    before, after = (q, step * k, -rate * step), (q_back, step_back * k_back, -rate * step_back)
    y = variants.over_documents(variants.quasiseparable, document, *before, *after, v, diagonal[..., None])
    y = rms_norm(y.reshape(*x.shape[:2], -1), p["out_norm"]["gain"]).reshape(v.shape)
    return np.einsum("bthd,hde->bte", y * silu(projected(x, p["gate"], 0)[0]), p["out"])


def vssd(p, x, document, normalise=False):
    parts = projected(x, p["in"], 2)
    v, k, q = convolved(parts, p, document) if "taps" in p else parts
    strength = (np.exp(p["log_rate"]) * softplus(x @ p["step"] + p["step_bias"]))[..., None]

    def mixed(q, k, strength, v):
        y = (q @ k.T) @ (strength * v)
        return y / strength.sum() if normalise else y

    y = variants.over_documents(mixed, document, q, k, strength, v, places=variants.by_number)
    y = (y + p["skip"][:, None] * v).reshape(*x.shape[:2], -1)
    y = rms_norm(y - y.mean(-1, keepdims=True), p["out_norm"]["gain"]).reshape(v.shape)
    return np.einsum("bthd,hde->bte", y * projected(x, p["gate"], 0)[0], p["out"])


def efficient(p, x, document):
    q, k, v = projected(x, p["qkv"], 2)
    y = variants.over_documents(variants.global_softmax, document, softmax(q), k, v, places=variants.by_number)
    return np.einsum("bthd,hde->bte", y, p["out"])


def lightnet_both(p, x, document):
    q, k, v = projected(x, p["qkv"], 2)
    return _gated(
        p, x, variants.over_documents(variants.global_softmax, document, silu(q), k, v, places=variants.by_number)
    )


def flow_both(p, x, document):
    q, k, v = projected(x, p["qkv"], 2)
    return _gated(p, x, variants.over_documents(variants.global_flow, document, q, k, v, places=variants.by_number))


def _gated(p, x, y):
    gate = np.einsum("btr,rhd->bthd", x @ p["gate_down"], p["gate_up"])
    return np.einsum("bthd,hde->bte", rms_norm(y, p["out_norm"]["gain"]) * variants.sigmoid(gate), p["out"])
