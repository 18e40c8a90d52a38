"""Problems of the linear recurrence: every rule and decay, ragged documents with padding between."""

import jax
import numpy as np

from oracles.linear import Problem
from striate import Tokens
from striate.lib.linear_attention import linear_attention

DECAYS = ("none", "head", "token", "channel")
KINDS = [("sum", False, decay) for decay in DECAYS] + [("sum", True, "token"), ("sum", True, "channel")]
KINDS += [("delta", False, decay) for decay in DECAYS]


def documents(rng, batch: int, length: int) -> np.ndarray:
    """Ragged ones, with padding between and at the ends, and one whose number comes again."""
    document = np.stack([np.sort(rng.integers(0, 5, length)) for _ in range(batch)])
    document[document == 3] = 1
    document[rng.random((batch, length)) < 0.1] = -1
    return document.astype(np.int32)


def problem(
    rule, normalise, decay, seed=0, batch=2, length=75, heads=4, kv_heads=2, width=8, value_width=5, strength=1.0
):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, k = normal(batch, length, heads, width), normal(batch, length, kv_heads, width)
    if normalise:
        q, k = np.exp(q), np.exp(k)
    if rule == "delta":
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    shapes = {"head": (kv_heads,), "token": (batch, length, kv_heads), "channel": (batch, length, kv_heads, width)}
    g = None if decay == "none" else -strength * np.exp(normal(*shapes[decay]))
    beta = rng.random((batch, length, kv_heads)).astype(np.float32) if rule == "delta" else None
    v = normal(batch, length, kv_heads, value_width)
    return Problem(rule, normalise, q, k, v, g, beta, documents(rng, batch, length))


def attend(given: Problem, **how):
    tokens = Tokens(position=np.zeros_like(given.document), document=given.document)
    fixed = {"rule": given.rule, "normalise": given.normalise, "tokens": tokens, "return_state": True}
    return linear_attention(given.q, given.k, given.v, log_decay=given.log_decay, beta=given.beta, **fixed, **how)


def part(given: Problem, start: int, stop: int) -> Problem:
    def cut(x):
        return x if x is None or x.ndim < 2 else x[:, start:stop]

    return Problem(*given[:2], *map(cut, given[2:]))


def names(given: Problem) -> list[str]:
    """Of the arrays that have a gradient."""
    return [name for name in ("q", "k", "v", "log_decay", "beta") if getattr(given, name) is not None]


def gradients(given: Problem, dtype, run=attend, **how) -> dict[str, np.ndarray]:
    """Of sums of everything that `run` gives, with random weights: by the name of the array."""
    rng = np.random.default_rng(9)
    d_out = rng.normal(size=(*given.q.shape[:3], given.v.shape[3]))
    d_memory = rng.normal(size=(given.k.shape[0], *given.k.shape[2:], given.v.shape[3]))

    def loss(arrays):
        out, state = run(given._replace(**arrays), **how)
        return (out * d_out.astype(dtype)).sum() + (state.memory * d_memory.astype(dtype)).sum()

    arrays = {name: getattr(given, name).astype(dtype) for name in names(given)}
    return {name: np.asarray(x) for name, x in jax.jit(jax.grad(loss))(arrays).items()}


def check_gradients(given: Problem, run=attend, **how) -> None:
    """Those in float32 against those of the recurrence in float64."""
    with jax.enable_x64(True):
        true = gradients(given, np.float64, implementation="reference")
    for name, got in gradients(given, np.float32, run, **how).items():
        want = true[name]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * abs(want).max(), err_msg=name)
