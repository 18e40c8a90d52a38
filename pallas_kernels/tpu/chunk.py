"""One chunk of the linear recurrence, for one key/value head, in the memory of a TPU core.

The algebra is that of lib/linear_attention.py, with the two products that make an output in one,

    O = [A  exp(b) Q] [U; S]                            S = exp(b_C) S + (exp(b_C - b) K)^T U

All arrays are float32; where q, k and v are bfloat16, the factors of a product are rounded to that, its sums are not.
`within` and `across` are functions that jax.vjp differentiates inside a kernel: that is the backward pass.

Decays of channels. A_ij = sum_d q_id k_jd exp(b_id - b_jd) has no factors that float32 can hold. Cut the chunk into
blocks of s tokens, and let r be the sum where a block ends: for i in the block after that of j,

    A_ij = (q_i exp(b_i - r)) . (k_j exp(r - b_j))       both exponents at most 0

and every i > j lie in such blocks for the one s = 1, 2, 4, ... that is the highest bit of i xor j: one product each.

The inverse of I + L, for the delta rule, is made of those of its blocks: where T inverts the diagonal blocks of s
tokens, T - T L' T inverts those of 2 s, L' being what of L is in these and not in those. No power of L is formed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from striate.pallas_kernels.tpu import parts
from striate.pallas_kernels.tpu.chips import LANES
from striate.pallas_kernels.tpu.parts import NN, NT, TN, column, spread


class Rule(NamedTuple):
    """What is static."""

    name: str  # "sum" or "delta"
    normalise: bool
    by_channel: bool  # whether the decays are
    dtype: jnp.dtype  # of the factors of products


class Chunk(NamedTuple):
    """float32, of C tokens of one key/value head and its G query heads."""

    q: jax.Array | None  # (G, C, D); None where nothing is read
    k: jax.Array  # (C, D)
    v: jax.Array  # (C, V)
    sums: jax.Array | None  # b: (1, C), or (C, D)
    beta: jax.Array | None  # (1, C)


class Within(NamedTuple):
    """What a chunk is without the state before it."""

    weights: jax.Array | None  # A: (G, C, C)
    row: jax.Array | None  # exp(b) Q: (G, C, D)
    written: jax.Array  # exp(b_C - b) K: (C, D)
    values: jax.Array  # (C, V): U where the state is empty
    erased: jax.Array | None  # (C, D): U = values - erased S
    kept: jax.Array  # exp(b_C), (1, D) where the decays are of channels, else (1, 128), all alike


def within(rule: Rule, segment, x: Chunk) -> Within:
    """segment int32 (1, C) is 0 where tokens go on with the state, and does not decrease."""
    (size, width), (weights, row, erased) = x.k.shape, (None,) * 3
    mine = column(segment, min(LANES, size))
    b = x.sums if x.sums is None or rule.by_channel else column(x.sums, mine.shape[1])
    end, values = None if b is None else _last(b), x.v
    entering = _factor(spread(mine, width) == 0, _spread(b, width))
    leaving = _factor(spread(mine, width) == spread(mine[-1:], width), _spread(None if b is None else end - b, width))
    lanes = width if rule.by_channel else LANES
    kept = _factor(spread(mine[-1:], lanes) == 0, _spread(end, lanes))
    if x.q is not None:
        weights, row = _pairs(rule, segment, mine, x.q, x.k, x.sums), entering[None] * x.q
    if rule.name == "delta":
        beta = column(x.beta, mine.shape[1])
        lower = spread(beta, size) * _pairs(rule, segment, mine, x.k[None], x.k, x.sums, strictly=True)[0]
        both = jnp.concatenate([spread(beta, values.shape[1]) * values, spread(beta, width) * entering * x.k], axis=1)
        both = _solve(rule, lower, both)
        values, erased = both[:, : values.shape[1]], both[:, values.shape[1] :]
    return Within(weights, row, leaving * x.k, values, erased, kept)


def across(rule: Rule, x: Within, memory, total):
    """(out (G, C, V), or None, memory (D, V), total (1, D) after the chunk)."""
    (size, width), out, values = x.written.shape, None, x.values
    if x.erased is not None:
        values = values - _product(rule, x.erased, memory, NN)
    if x.weights is not None:
        both = jnp.concatenate([x.weights.reshape(-1, size), x.row.reshape(-1, width)], axis=1)
        out = _product(rule, both, jnp.concatenate([values, memory], axis=0), NN)
        out = out.reshape(*x.weights.shape[:2], -1)
        if rule.normalise:
            weight = x.weights.sum(2, keepdims=True) + (x.row * total[None]).sum(2, keepdims=True)
            out = jnp.where(weight == 0, 0.0, out / jnp.where(weight == 0, 1.0, weight))
    kept = column(x.kept, memory.shape[1]) if rule.by_channel else spread(x.kept, memory.shape[1])
    memory = kept * memory + _product(rule, x.written, values, TN)
    if rule.normalise:
        total = spread(x.kept, width) * total + x.written.sum(0, keepdims=True)
    return out, memory, total


def _pairs(rule: Rule, segment, mine, q, k, sums, strictly: bool = False):
    """q_i . exp(b_i - b_j) k_j, where i >= j, or i > j, and both are of one segment; else 0: (G, C, C)."""
    if rule.by_channel:
        return _pairs_by_channel(rule, mine, q, k, sums, strictly)
    group, size, width = q.shape
    row, key = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    together = (spread(mine, size) == segment) & (row > key if strictly else row >= key)
    factor = _factor(together, None if sums is None else spread(column(sums, mine.shape[1]), size) - sums)
    return _product(rule, q.reshape(-1, width), k, NT).reshape(group, size, size) * factor[None]


def _pairs_by_channel(rule: Rule, mine, q, k, b, strictly: bool):
    group, size, width = q.shape
    place, key = (jax.lax.broadcasted_iota(jnp.int32, (group, size, size), axis) for axis in (1, 2))
    apart, row = place ^ key, jax.lax.broadcasted_iota(jnp.int32, (size, width), 0)
    own = spread(mine, width)
    same = 0.0 if strictly else (q * k[None]).sum(2, keepdims=True)
    weights = jnp.where(apart == 0, same, 0.0)
    ends, whose, span = b, own, 1  # the sum, and the segment, where the block of `span` tokens ends
    while span < size:
        before, of_before = _roll(ends, span), pltpu.roll(whose, span, 0)
        later = row & span != 0
        queries = q * _factor(later & (own == of_before), b - before)[None]
        keys = k * _factor(~later & (own == whose), ends - b)
        product = _product(rule, queries.reshape(-1, width), keys, NT).reshape(weights.shape)
        weights = jnp.where(apart >= span, product, weights)
        ends = jnp.where(later, ends, _roll(ends, size - span))
        whose = jnp.where(later, whose, pltpu.roll(whose, size - span, 0))
        span *= 2
    return weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(rule: Rule, lower, x):
    """(I + L)^-1 x for strictly lower triangular L."""
    return _solve_forward(rule, lower, x)[0]


def _solve_forward(rule, lower, x):
    inverse = _inverse(rule, lower)
    solved = _finely(rule, inverse, x, NN)
    return solved, (inverse, solved)


def _solve_backward(rule, saved, d_solved):
    inverse, solved = saved
    dx = _finely(rule, inverse, d_solved, TN)
    return -_finely(rule, dx, solved, NT), dx


_solve.defvjp(_solve_forward, _solve_backward)


def _inverse(rule: Rule, lower):
    row, key = (jax.lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in (0, 1))
    apart, span = row ^ key, 2
    inverse = jnp.where(apart == 0, 1.0, 0.0) - jnp.where(apart == 1, lower, 0.0)
    while span < lower.shape[0]:
        between = jnp.where((apart >= span) & (apart < 2 * span), lower, 0.0)
        inverse = inverse - _finely(rule, _finely(rule, inverse, between, NN), inverse, NN)
        span *= 2
    return inverse


def _finely(rule: Rule, a, b, dimensions):
    """A product of float32: to its last bits, or, where q, k and v are bfloat16, to 16 of them."""
    if rule.dtype == jnp.float32:
        return parts.product(a, b, dimensions)
    (a, of_a), (b, of_b) = _halves(a), _halves(b)
    return parts.product(a, b, dimensions) + (parts.product(a, of_b, dimensions) + parts.product(of_a, b, dimensions))


def _halves(x):
    """float32 as the sum of two bfloat16."""
    # By its bits: a compiler may take a conversion to bfloat16 and back for nothing.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = jax.lax.bitcast_convert_type(bits & -(2**16), jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _product(rule: Rule, a, b, dimensions):
    """float32 of float32, whose factors are rounded to the dtype of the rule; so are those of its derivatives."""
    return parts.product(a.astype(rule.dtype), b.astype(rule.dtype), dimensions)


def _product_forward(rule, a, b, dimensions):
    return _product(rule, a, b, dimensions), (a, b)


def _product_backward(rule, dimensions, saved, d_out):
    a, b = saved
    if dimensions == NN:
        return _product(rule, d_out, b, NT), _product(rule, a, d_out, TN)
    if dimensions == NT:
        return _product(rule, d_out, b, NN), _product(rule, d_out, a, TN)
    return _product(rule, b, d_out, NT), _product(rule, a, d_out, NN)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _roll(x, by: int):
    """Rows moved down, around the end."""
    return pltpu.roll(x, by, 0)


_roll.defvjp(
    lambda x, by: (_roll(x, by), None),
    lambda by, _, d_out: (_roll(d_out, d_out.shape[0] - by),),
)


def _factor(shown, exponent):
    """exp(exponent), 0 where not shown; never exp of what is not. No exponent is 0."""
    if exponent is None:
        return jnp.where(shown, 1.0, 0.0)
    return jnp.exp(jnp.where(shown, exponent, -jnp.inf))


def _last(x):
    """The last row of (C, n), as (1, n)."""
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row == x.shape[0] - 1, x, 0.0).sum(0, keepdims=True)


def _spread(x, width: int):
    return None if x is None else spread(x, width)
