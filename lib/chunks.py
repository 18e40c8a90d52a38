"""Linear attention in chunks, by plain XLA: the algebra of lib/linear_attention.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from striate.lib.recurrence import HIGHEST, Inputs, Recurrence, State, divided, running_sum, segments

SUB = 16  # rows of a chunk that share a reference, where the decay is one a channel


@dataclass(frozen=True)
class Chunked(Recurrence):
    """The recurrence in chunks of so many tokens, one after the other."""

    chunk: int

    def run(self, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        return self._over_chunks(inputs, state, read=True)

    def leave(self, inputs: Inputs, state: State) -> State:
        return self._over_chunks(inputs, state, read=False)[1]

    def _over_chunks(self, inputs: Inputs, state: State, read: bool):
        batch, length = inputs.document.shape
        missing = -length % self.chunk

        def chunks(x, mode="constant"):
            x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), mode=mode)
            return x.reshape(batch, -1, self.chunk, *x.shape[2:]).swapaxes(0, 1)

        document, segment = segments(inputs.document, state.document)
        # Padding at the end belongs to the last segment; no token of it is written.
        xs = jax.tree.map(chunks, inputs.wide._replace(document=None)), chunks(segment, "edge")

        # What a chunk computes is computed again in the backward pass: of each only the state before it is kept.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(carry, x):
            (memory, total, before), (tokens, segment) = carry, x
            segment, last = segment - before[:, None], segment[:, -1]
            out, memory, total = _one_chunk(self.rule, self.normalise, read, tokens, segment, memory, total)
            return (memory, total, last), out

        (memory, total, _), out = jax.lax.scan(step, (state.memory, state.total, jnp.zeros(batch, jnp.int32)), xs)
        if read:
            out = out.swapaxes(0, 1).reshape(batch, length + missing, *out.shape[3:])[:, :length]
        return out, State(memory, total, document[:, -1])


def _one_chunk(rule: str, normalise: bool, read: bool, x: Inputs, segment, memory, total):
    """(out (B, C, K, G, V), or None where it is not read, memory, total after it).

    segment (B, C) is 0 where tokens go on with the state.
    """
    size, out = segment.shape[1], None
    q, k, v = jnp.moveaxis(x.q, 1, 3), x.k.swapaxes(1, 2), x.v.swapaxes(1, 2)  # (B, K, G, C, D), (B, K, C, D | V)
    b = jnp.zeros((*k.shape[:3], 1), k.dtype) if x.log_decay is None else running_sum(x.log_decay, segment)
    together = (segment[:, :, None] == segment[:, None]) & jnp.tri(size, dtype=bool)[None]  # (B, C, C)
    goes_on, stays = (segment == 0)[:, None, :, None], (segment == segment[:, -1:])[:, None, :, None]
    entering, leaving = _exp(goes_on, b), _exp(stays, b[:, :, -1:] - b)  # (B, K, C, 1 | D)
    if rule == "delta":
        beta = x.beta.swapaxes(1, 2)[..., None]
        strictly = together & ~jnp.eye(size, dtype=bool)[None]
        lower = beta * _pairs(k[:, :, None], k, b, strictly)[:, :, 0]
        v = _solve(lower, beta * (v - _product("bkcd,bkdv->bkcv", entering * k, memory)))
    if read:
        weights, row = _pairs(q, k, b, together), entering[:, :, None] * q
        out = _product("bkgij,bkjv->bkgiv", weights, v) + _product("bkgid,bkdv->bkgiv", row, memory)
        if normalise:
            out = divided(out, weights.sum(-1) + _product("bkgid,bkd->bkgi", row, total))
        out = jnp.moveaxis(out, 3, 1)
    kept, written = jnp.where(segment[:, -1] == 0, 1.0, 0.0)[:, None, None] * jnp.exp(b[:, :, -1]), leaving * k
    memory = kept[..., None] * memory + _product("bkcd,bkcv->bkdv", written, v)
    return out, memory, kept * total + written.sum(2) if normalise else total


def _pairs(q, k, b, shown):
    """q_i . exp(b_i - b_j) k_j where shown (B, C, C), else 0: (B, K, G, C, C). b is (B, K, C, 1 | D)."""
    if b.shape[3] == 1:
        decay = _exp(shown[:, None], b - b.swapaxes(2, 3))
        return decay[:, :, None] * _product("bkgid,bkjd->bkgij", q, k)
    size, sub = b.shape[2], min(SUB, b.shape[2])
    reached = shown | jnp.eye(size, dtype=bool)[None]

    def rows(start):
        stop, before = min(start + sub, size), max(start - 1, 0)
        here, reference = slice(start, stop), b[:, :, before, None]
        # Rows of a later segment than the reference see none of the earlier keys, and these may not be of its segment.
        row = q[..., here, :] * _exp(shown[:, None, here, before, None], b[:, :, here] - reference)[:, :, None]
        key = k[:, :, :start] * _exp(reached[:, None, before, :start, None], reference - b[:, :, :start])
        near = _exp(shown[:, None, here, here, None], b[:, :, here, None] - b[:, :, None, here])
        near = _product("bkgid,bkijd->bkgij", q[..., here, :], near * k[:, :, None, here])
        later = jnp.zeros((*q.shape[:3], stop - start, size - stop), q.dtype)
        return jnp.concatenate([_product("bkgid,bkjd->bkgij", row, key), near, later], axis=-1)

    return jnp.concatenate([rows(start) for start in range(0, size, sub)], axis=-2)


@jax.custom_jvp
def _solve(lower, x):
    """(I + L)^-1 x for strictly lower triangular L."""
    return _product("bkij,bkjv->bkiv", _inverse(lower), x)


@_solve.defjvp
def _(primals, tangents):
    (lower, x), (d_lower, d_x) = primals, tangents
    inverse = _inverse(lower)
    solved = _product("bkij,bkjv->bkiv", inverse, x)
    return solved, _product("bkij,bkjv->bkiv", inverse, d_x - _product("bkij,bkjv->bkiv", d_lower, solved))


def _inverse(lower):
    """(I + L)^-1 from those of the blocks on its diagonal, twice as large each time:

        [I + L_1   0      ]^-1    [ A       0 ]
        [  B     I + L_2  ]     = [ -D B A  D ]        A = (I + L_1)^-1, D = (I + L_2)^-1

    Where keys resemble each other the powers of L are 1e20, and what a series of them leaves is no digit of the
    inverse, whose own entries stay small.
    """
    size = lower.shape[-1]
    missing = 2 ** (size - 1).bit_length() - size
    lower = jnp.pad(lower, ((0, 0), (0, 0), (0, missing), (0, missing)))
    inverse = jnp.ones((*lower.shape[:3], 1, 1), lower.dtype)  # (B, K, blocks, span, span)
    while inverse.shape[2] > 1:
        a, d, span = inverse[:, :, ::2], inverse[:, :, 1::2], inverse.shape[3]
        pairs = lower.reshape(*a.shape[:3], 2 * span, a.shape[2], 2 * span)
        between = jnp.moveaxis(jnp.diagonal(pairs[:, :, :, span:, :, :span], axis1=2, axis2=4), -1, 2)
        corner = -_product("bknij,bknjl->bknil", _product("bknij,bknjl->bknil", d, between), a)
        above = jnp.concatenate([a, jnp.zeros_like(a)], axis=4)
        inverse = jnp.concatenate([above, jnp.concatenate([corner, d], axis=4)], axis=3)
    return inverse[:, :, 0, :size, :size]


def _exp(shown, x):
    """exp(x), 0 where not shown; never exp of what is not."""
    return jnp.exp(jnp.where(shown, x, -jnp.inf))


def _product(subscripts: str, a, b):
    return jnp.einsum(subscripts, a, b, precision=HIGHEST)
