"""Recurrences in every channel by itself: scans over the tokens of a sequence, which keep the states of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from striate.lib.recurrence import HIGHEST, Inputs, Recurrence, State, divided, first_document, like, segments
from striate.lib.tokens import PADDING


def scan(combine: Callable, x, segment_BT: jax.Array, before):
    """The tokens of its segment up to each, put together by an associative `combine(earlier, later)`.

    x is a pytree of (B, T, ...); segment 0 goes on from `before` (B, ...). Nothing of one segment is in another, not
    even as a rounding error. About sqrt(T) stretches go through their tokens side by side, then on from one another:
    2 sqrt(T) steps, and twice the work of one token after the other.

    Source: Blelloch 1990 (Prefix sums and their applications), section 1.2.
    """
    batch, length = segment_BT.shape
    size = max(1, math.isqrt(length))
    missing = -length % size

    def by_place(y, mode="constant"):
        """(place in the stretch, B, stretches, ...)"""
        y = jnp.pad(y, ((0, 0), (0, missing), *((0, 0),) * (y.ndim - 2)), mode=mode)
        return jnp.moveaxis(y.reshape(batch, -1, size, *y.shape[2:]), 2, 0)

    def join(earlier, later):
        (x, segment), (y, now) = earlier, later
        return jax.tree.map(lambda both, y: jnp.where(like(segment == now, y), both, y), combine(x, y), y), now

    def step(carry, now):
        joined = join(carry, now)
        return joined, joined[0]

    x, segment = jax.tree.map(by_place, x), by_place(segment_BT, "edge")
    first = jax.tree.map(lambda y: y[0], (x, segment))
    ends, rest = jax.lax.scan(step, first, jax.tree.map(lambda y: y[1:], (x, segment)))
    x = jax.tree.map(lambda y, z: jnp.concatenate([y[None], z]), first[0], rest)
    ends = jax.tree.map(lambda y: y.swapaxes(0, 1), ends)
    _, starts = jax.lax.scan(lambda carry, end: (join(carry, end), carry), (before, segment_BT[:, 0] * 0), ends)
    starts = jax.tree.map(lambda y: y.swapaxes(0, 1)[None], starts)
    x, _ = join(starts, (x, segment))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2).reshape(batch, -1, *y.shape[3:])[:, :length], x)


@dataclass(frozen=True)
class Scanned(Recurrence):
    """The recurrence of the sum rule with the states of all tokens in memory: for narrow heads."""

    def run(self, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        document, segment = segments(inputs.document, state.document)
        x, memory = inputs.wide, state.memory
        v = jnp.concatenate([x.v, jnp.ones_like(x.v[..., :1])], axis=-1) if self.normalise else x.v
        if self.normalise:
            memory = jnp.concatenate([memory, state.total[..., None]], axis=-1)
        written = x.k[..., None] * v[..., None, :]  # (B, T, K, D, V)
        g = jnp.zeros_like(x.k[..., 0]) if x.log_decay is None else x.log_decay
        decay = jnp.broadcast_to(jnp.exp(g).reshape(*g.shape[:3], -1, 1), written.shape)
        # In rows: axes of 1 at the end would each fill a tile of the device.
        decay, states = (y.reshape(*y.shape[:2], -1) for y in (decay, written))
        memory = memory.reshape(memory.shape[0], -1)
        states = scan(_then, (decay, states), segment, (jnp.ones_like(memory), memory))[1].reshape(written.shape)
        out = jnp.einsum("btkgd,btkdv->btkgv", x.q, states, precision=HIGHEST)
        memory, total = states[:, -1], state.total
        if self.normalise:
            out, memory, total = divided(out[..., :-1], out[..., -1]), memory[..., :-1], memory[..., -1]
        return out, State(memory, total, document[:, -1])


def _then(earlier, later):
    (a, x), (b, y) = earlier, later
    return a * b, b * x + y


@dataclass(frozen=True)
class LogSumExp(Recurrence):
    """The running log-sum-exp m + log(s) of the values in every column, kept apart, so that a million terms add up.

    m is the greatest so far and s >= 1 the sum of the exponentials less m; s is 0 where there was none but -inf. A
    state's `memory` (B, K, 2, V) holds both. `run` gives (B, T, K, 3, V): m, s, and by how much m rises, negative. m is
    for scale alone: nothing of it is differentiated.
    """

    def run(self, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        document, segment = segments(inputs.document, state.document)
        f = inputs.wide.v
        there = f > -jnp.inf
        m = jax.lax.stop_gradient(jnp.where(there, f, 0.0))
        before = state.memory[:, :, 0], state.memory[:, :, 1]
        m, s = scan(_added, (m, jnp.exp(jnp.where(there, f - m, -jnp.inf))), segment, before)
        earlier = (jnp.concatenate([a[:, None], b[:, :-1]], axis=1) for a, b in zip(before, (m, s), strict=True))
        m_before, s_before = earlier
        began = jnp.diff(segment, axis=1, prepend=0) != 0
        rise = jnp.where(like(began, f) | (s_before == 0), 0.0, jnp.minimum(m_before - m, 0.0))
        memory = jnp.stack([m[:, -1], s[:, -1]], axis=2)
        return jnp.stack([m, s, rise], axis=3), State(memory, state.total, document[:, -1])

    def summarise(self, inputs: Inputs) -> LogSumExpSummary:
        first = first_document(inputs.document)
        whole = segments(inputs.document, first)[1][:, -1] == 0
        memory = jnp.zeros((*inputs.k[:, 0].shape, inputs.v.shape[3]), inputs.wide.v.dtype)
        return LogSumExpSummary(self.leave(inputs, State(memory, memory[..., 0], first)), first, whole)


class LogSumExpSummary(NamedTuple):
    """What a run does to the state before it: as `striate.lib.recurrence.Summary`."""

    state: State  # what the run leaves where nothing was before
    first: jax.Array  # int32 (B,) document of its first token that is not padding; PADDING where there is none
    whole: jax.Array  # bool (B,): no document begins after the first token

    def after(self, before: State) -> State:
        goes_on = self.whole & ((before.document == self.first) | (self.first == PADDING))
        alone = self.state.memory
        both = jnp.stack(_added(*((x[:, :, 0], x[:, :, 1]) for x in (before.memory, alone))), axis=2)
        document = jnp.where(self.first == PADDING, before.document, self.state.document)
        return State(jnp.where(like(goes_on, alone), both, alone), self.state.total, document)

    def then(self, later: LogSumExpSummary) -> LogSumExpSummary:
        apart = (self.state.document != later.first) & (self.first != PADDING) & (later.first != PADDING)
        first = jnp.where(self.first == PADDING, later.first, self.first)
        return LogSumExpSummary(later.after(self.state), first, self.whole & later.whole & ~apart)


def _added(earlier, later):
    (m, s), (n, t) = earlier, later
    m, n = jax.lax.stop_gradient(m), jax.lax.stop_gradient(n)
    both = jnp.where(s == 0, n, jnp.where(t == 0, m, jnp.maximum(m, n)))
    return both, s * jnp.exp(jnp.minimum(m - both, 0.0)) + t * jnp.exp(jnp.minimum(n - both, 0.0))
