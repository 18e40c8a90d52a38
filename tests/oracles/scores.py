"""Scores, each beside its meaning in plain jax.numpy, and dense attention under them in float64 with its gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oracles.attention import Truth
from striate.lib import scores


class Case(NamedTuple):
    """A score with random parameters, and what it means."""

    name: str
    score: scores.Score
    parameters: tuple  # the leaves of the score
    tile: Callable  # (s (B, H, T, S), query fields (B, 1, T, 1), key fields (B, 1, 1, S), *parameters) -> (t, w)
    normalised: bool = True
    sink: int | None = None  # which of the parameters is the logit of a sink


def case(name, score, tile, **kind) -> Case:
    return Case(name, score, tuple(jax.tree.leaves(score)), tile, **kind)


def per_head(x):
    return x[None, :, None, None] if x.ndim else x


def distance(query, key, name="position"):
    return abs(query[name] - key[name])


def t5_bucket(back, buckets: int, farthest: int, bidirectional: bool):
    """As the paper's code has it, in float64."""
    half = buckets // 2 if bidirectional else buckets
    exact = half // 2
    away = abs(back) if bidirectional else np.maximum(back, 0)
    growth = np.log(np.maximum(away, 1) / exact) / np.log(farthest / exact) * (half - exact)
    bucket = np.where(away < exact, away, np.minimum(exact + np.floor(growth + 1e-9), half - 1)).astype(int)
    return bucket + half * (back < 0) if bidirectional else bucket


def all_cases(rng: np.random.Generator, heads: int) -> list[Case]:
    """One case of every kind, with random parameters."""

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def positive(*shape):
        return np.exp(0.5 * normal(*shape))

    return [
        case("plain", scores.plain(), lambda s, q, k: (s, 1)),
        case("softcap", scores.softcap(positive() + 1), lambda s, q, k, c: (c * jnp.tanh(s / c), 1)),
        case("temperature", scores.temperature(positive(heads)), lambda s, q, k, x: (per_head(x) * s, 1)),
        case("alibi", scores.alibi(0.1 * positive(heads)), lambda s, q, k, m: (s - per_head(m) * distance(q, k), 1)),
        case(
            "alibi over frames",
            scores.alibi(0.1 * positive(), "frame"),
            lambda s, q, k, m: (s - m * distance(q, k, "frame"), 1),
        ),
        case(
            "power",
            scores.power(positive(heads), 0.1 * positive()),
            lambda s, q, k, p, m: (s - per_head(p) * jnp.log(1.0 + distance(q, k)) - m * distance(q, k), 1),
        ),
        *(_t5(normal(heads, buckets), farthest, both) for buckets, farthest, both in ((6, 20, False), (8, 24, True))),
        case("signed", scores.signed(), lambda s, q, k: (abs(s), jnp.sign(s))),
        case(
            "sigmoid",
            scores.sigmoid(normal(heads) - 2),
            lambda s, q, k, b: (-jnp.log(1 + jnp.exp(-s - per_head(b))), 1),
            normalised=False,
        ),
        case("sink", scores.sink_logit(normal(heads)), lambda s, q, k, b: (s, 1), sink=0),
        case("off by one", scores.off_by_one(), lambda s, q, k, b: (s, 1), sink=0),
        case(
            "custom",
            scores.custom(_wave, normal(heads), positive(), fields=("position", "frame")),
            lambda s, q, k, a, b: _wave(s, q, k, per_head(a), b),
        ),
        case(
            "composed",
            scores.compose(
                scores.temperature(positive(heads)),
                scores.softcap(positive() + 1),
                scores.signed(),
                scores.alibi(0.1 * positive(heads)),
                scores.sink_logit(normal(heads)),
            ),
            _composed,
            sink=3,
        ),
    ]


def _wave(s, query, key, amplitude, rate):
    t = s + amplitude * jnp.cos(rate * (query["position"] - key["frame"]))
    return t, 1 / (1 + rate * abs(t))


def _composed(s, query, key, factor, cap, slope, sink):
    capped = cap * jnp.tanh(per_head(factor) * s / cap)
    return abs(capped) - per_head(slope) * distance(query, key), jnp.sign(capped)


def _t5(table, farthest: int, bidirectional: bool) -> Case:
    def tile(s, query, key, table):
        bucket = t5_bucket(np.asarray(query["position"] - key["position"]), table.shape[1], farthest, bidirectional)
        return s + jnp.moveaxis(table[:, bucket[:, 0]], 0, 1), 1

    return case(f"t5 {bidirectional=}", scores.t5_bias(table, bidirectional, farthest), tile)


def attention(case: Case, problem, visible_BHTS, scale: float) -> Truth:
    """The float64 truth, gradients by automatic differentiation of the dense form."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.float64(x)) for x in (problem.q, problem.k, problem.v, *case.parameters)]
        results, pull = jax.vjp(lambda *x: _dense(case, problem, visible_BHTS, scale, *x), *arrays)
        blind = np.isneginf(results[1])
        cotangents = np.float64(problem.d_out), np.where(blind, 0.0, np.float64(problem.d_lse))
        dq, dk, dv, *d_score = pull(tuple(jnp.asarray(x) for x in cotangents))
        return jax.tree.map(np.asarray, Truth(*results, dq, dk, dv, tuple(d_score)))


def magnitudes(case: Case, problem, visible_BHTS, scale: float) -> Truth:
    """What rounding errors are in proportion to: every sum of `attention` with its terms taken without their signs."""
    with jax.enable_x64(True):
        q, k, v, d_out = (abs(np.float64(x)) for x in (problem.q, problem.k, problem.v, problem.d_out))
        group = q.shape[2] // k.shape[2]
        k_all, v_all = np.repeat(k, group, 2), np.repeat(v, group, 2)
        parameters = [jnp.asarray(np.float64(x)) for x in case.parameters]
        signed_k = np.repeat(np.float64(problem.k), group, 2)
        s = jnp.asarray(scale * np.einsum("bthd,bshd->bhts", np.float64(problem.q), signed_k))
        query, key = _fields(problem)
        results, d_t_s = jax.jvp(lambda s: _pair(case.tile(s, query, key, *parameters), s), (s,), (jnp.ones_like(s),))
        (t, w), (d_t, d_w) = jax.tree.map(np.asarray, (results, d_t_s))
        p = np.asarray(_weights(case, t, visible_BHTS, parameters)[0])
        out = np.einsum("bhts,bshv->bthv", p * abs(w), v_all)
        lse = np.where(visible_BHTS, np.maximum(abs(t), scale * np.einsum("bthd,bshd->bhts", q, k_all)), 0).max(-1)
        d_p = np.einsum("bthv,bshv->bhts", d_out, v_all)
        d_lse = abs(np.float64(problem.d_lse)).swapaxes(1, 2)[..., None]
        d_row = (p * abs(w) * d_p).sum(-1, keepdims=True) + d_lse
        d_logits = p * (abs(w) * d_p + d_row)
        d_sink = ((1 - p.sum(-1, keepdims=True)) * d_row).sum()  # the rest of a row is the share of its sink
        d_s = d_logits * abs(d_t) + p * d_p * abs(d_w)

        def of_parameter(number: int) -> float:
            ones = [jnp.ones_like(x) if i == number else jnp.zeros_like(x) for i, x in enumerate(parameters)]
            _, (d_t, d_w) = jax.jvp(lambda *x: _pair(case.tile(s, query, key, *x), s), tuple(parameters), tuple(ones))
            total = (d_logits * abs(d_t) + p * d_p * abs(d_w)).sum()
            return np.asarray(d_sink if number == case.sink else total)

        def sum_groups(x):
            return x.reshape(*k.shape[:3], group, -1).sum(3)

        return Truth(
            out,
            lse.swapaxes(1, 2),
            scale * np.einsum("bhts,bshd->bthd", d_s, k_all),
            sum_groups(scale * np.einsum("bhts,bthd->bshd", d_s, q)),
            sum_groups(np.einsum("bhts,bthv->bshv", p * abs(w), d_out)),
            tuple(of_parameter(number) for number in range(len(parameters))),
        )


def _dense(case, problem, visible, scale, q, k, v, *parameters):
    group = q.shape[2] // k.shape[2]
    s = scale * jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, group, 2))
    t, w = _pair(case.tile(s, *_fields(problem), *parameters), s)
    p, lse = _weights(case, t, visible, parameters)
    return jnp.einsum("bhts,bshv->bthv", p * w, jnp.repeat(v, group, 2)), lse.swapaxes(1, 2)


def _weights(case, t, visible, parameters):
    """(p (B, H, T, S), lse (B, H, T)). Logits of tests are small enough for float64 to need no maximum."""
    weights = jnp.where(visible, jnp.exp(t), 0.0)
    total = weights.sum(-1, keepdims=True)
    if case.sink is not None:  # one more key, of value 0, that every row sees
        total += jnp.exp(per_head(parameters[case.sink]))
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, jnp.log(safe), -jnp.inf)[..., 0]
    return (weights / safe if case.normalised else weights), lse


def _fields(problem):
    query = {name: np.asarray(x)[:, None, :, None] for name, x in problem.q_tokens.fields().items()}
    return query, {name: np.asarray(x)[:, None, None, :] for name, x in problem.k_tokens.fields().items()}


def _pair(result, s):
    t, w = result
    return jnp.broadcast_to(t, s.shape), jnp.broadcast_to(jnp.asarray(w, s.dtype), s.shape)
