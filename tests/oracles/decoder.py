"""The decoder in float64: every layer written out, every head alone."""

import numpy as np

from striate.lib.positions import NoPE, parse


def hidden_states(params, config, inputs, tokens, ngrams, visible) -> np.ndarray:
    """(T, width) for one row: `inputs` (T,), `tokens` of shape (1, T), `ngrams` (T, O), `visible` (T, S) per layer."""
    params = _float64(params)
    first, second = np.split(params["embedding"][inputs], 2, axis=1)
    x = np.concatenate([second, first], axis=1) * 2 * np.sqrt(config.width)
    if config.ngram_orders:
        table, projection = params["ngrams"]["table"], params["ngrams"]["projection"]
        found = [table[i * config.ngram_buckets + ngrams[:, i]] for i in range(len(config.ngram_orders))]
        x = (x + np.concatenate(found, axis=1) @ projection) / np.sqrt(2)
    position = np.asarray(tokens.position[0], np.float64)
    for number in range(config.layers):
        repeat, place = divmod(number, len(config.pattern))
        layer = _at(params["layers"][f"layer_{place}"], repeat)
        turn = _turn(parse(config.pattern[place].position), position)
        x = x + _attention(layer["attention"], config, norm(x, layer["mixer_norm"]), turn, visible[number])
        x = x + _feed_forward(layer["feed_forward"], norm(x, layer["feed_forward_norm"]))
    return norm(x, params["final_norm"])


def norm(x, parameters):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * parameters["gain"]


def rope(x, position, theta):
    """Pairs (x[d], x[d + D/2]) as complex numbers, turned."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * position[:, None] * theta ** (-np.arange(half) / half))
    turned = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _turn(kind, position):
    """What a layer with positions of this kind, Rope(theta) or NoPE(), does to its queries and keys."""
    return (lambda x: x) if kind == NoPE() else lambda x: rope(x, position, kind.theta)


def _attention(parameters, config, x, turn, visible):
    group, out = config.heads // config.kv_heads, 0
    for head in range(config.heads):
        of_group = parameters["qkv"][:, head // group]
        q, k, v = x @ of_group[:, head % group], x @ of_group[:, group], x @ of_group[:, group + 1]
        q, k = turn(norm(q, parameters["q_norm"])), turn(norm(k, parameters["k_norm"]))
        weights = np.where(visible, np.exp(q @ k.T / np.sqrt(config.head_dim)), 0.0)
        out = out + weights / weights.sum(-1, keepdims=True) @ v @ parameters["out"][head]
    return out


def _feed_forward(parameters, x):
    gate, up = x @ parameters["gate_up"][:, 0], x @ parameters["gate_up"][:, 1]
    return gate / (1 + np.exp(-gate)) * up @ parameters["down"]


def _float64(tree):
    return {k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def _at(tree, index):
    return {k: _at(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}
