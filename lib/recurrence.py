"""The language of linear recurrences: what is given for every token, the state, and how runs of tokens compose.

A run is an interval of a sequence. To the state S before it, it does S -> M S + S_run, with M = 0 where a document
begins in it or at it: its `Summary` holds M and S_run, and summaries of neighbours compose,

    (M2, S2) after (M1, S1) = (M2 M1, M2 S1 + S2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from striate.lib.tokens import PADDING

HIGHEST = jax.lax.Precision.HIGHEST


class Inputs(NamedTuple):
    """Per token; padding is set to what leaves a state as it is. Decays and strengths are wide, q, k and v as given."""

    q: jax.Array  # (B, T, K, G, D)
    k: jax.Array  # (B, T, K, D)
    v: jax.Array  # (B, T, K, V)
    log_decay: jax.Array | None  # (B, T, K) or (B, T, K, D)
    beta: jax.Array | None  # (B, T, K)
    document: jax.Array  # (B, T)

    @property
    def wide(self) -> Inputs:
        """q, k and v in float32 at least."""
        dtype = jnp.promote_types(self.q.dtype, jnp.float32)
        return self._replace(q=self.q.astype(dtype), k=self.k.astype(dtype), v=self.v.astype(dtype))


class State(NamedTuple):
    """What the tokens so far have left behind. float32, or float64 where the inputs are."""

    memory: jax.Array  # (B, K, D, V) S
    total: jax.Array  # (B, K, D) z, the sum of the keys as `memory` has them, where outputs are normalised; else 0
    document: jax.Array  # int32 (B,) of the last token that is not padding; PADDING where there was none

    @classmethod
    def empty(cls, k_BTKD: jax.Array, v_BTKV: jax.Array) -> State:
        (batch, _, heads, width), wide = k_BTKD.shape, jnp.promote_types(k_BTKD.dtype, jnp.float32)
        memory = jnp.zeros((batch, heads, width, v_BTKV.shape[3]), wide)
        return cls(memory, memory[..., 0], jnp.full(batch, PADDING, jnp.int32))


class Summary(NamedTuple):
    """What a run does to the state before it."""

    transition: jax.Array  # M: (B, K, D), the diagonal, or (B, K, D, D); 0 where a document begins in the run
    state: State  # what the run leaves where nothing was before
    first: jax.Array  # int32 (B,) document of its first token that is not padding; PADDING where there is none

    def after(self, before: State) -> State:
        """The state after this run."""
        goes_on = (before.document == self.first) | (self.first == PADDING)
        kept = jnp.where(like(goes_on, self.transition), self.transition, 0.0)
        memory = self.state.memory + _applied(kept, before.memory)
        diagonal = kept if kept.ndim == 3 else jnp.zeros_like(before.total)
        document = jnp.where(self.first == PADDING, before.document, self.state.document)
        return State(memory, self.state.total + diagonal * before.total, document)

    def then(self, later: Summary) -> Summary:
        """That of this run and the later one, which begins where this ends."""
        apart = (self.state.document != later.first) & (self.first != PADDING) & (later.first != PADDING)
        kept = jnp.where(like(apart, later.transition), 0.0, later.transition)
        transition = kept * self.transition if kept.ndim == 3 else _applied(kept, self.transition)
        first = jnp.where(self.first == PADDING, later.first, self.first)
        return Summary(transition, later.after(self.state), first)


@dataclass(frozen=True)
class Recurrence:
    """One form of the recurrence over a run of tokens in their order. Immutable, so that it can be static.

    Attributes:
      rule: "sum" or "delta".
      normalise: whether outputs are divided by the sum of their weights.
    """

    rule: str
    normalise: bool

    def run(self, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """(out (B, T, K, G, V), the state after the run)."""
        raise NotImplementedError

    def leave(self, inputs: Inputs, state: State) -> State:
        """The state after the run alone."""
        return self.run(inputs, state)[1]

    def summarise(self, inputs: Inputs) -> Summary:
        """That of the run. The columns of a state do not mix: what becomes of those of the identity is M."""
        k, v, first = inputs.k, inputs.v, first_document(inputs.document)
        empty, width = State.empty(k, v)._replace(document=first), v.shape[3]
        if self.rule == "delta":
            eye = jnp.broadcast_to(jnp.eye(k.shape[3], dtype=empty.memory.dtype), (*empty.memory.shape[:3], k.shape[3]))
            wider = inputs._replace(v=jnp.concatenate([v, jnp.zeros_like(k)], axis=3))
            state = self.leave(wider, empty._replace(memory=jnp.concatenate([empty.memory, eye], axis=3)))
            memory, transition = state.memory[..., :width], state.memory[..., width:]
            return Summary(transition, state._replace(memory=memory), first)
        whole = segments(inputs.document, first)[1][:, -1] == 0
        g = jnp.zeros_like(k[:, :1]) if inputs.log_decay is None else inputs.log_decay
        g = g.reshape(*g.shape[:3], -1).sum(1)
        transition = jnp.broadcast_to(jnp.exp(jnp.where(like(whole, g), g, -jnp.inf)), empty.total.shape)
        return Summary(transition, self.leave(inputs, empty), first)


def segments(document_BT: jax.Array, before_B: jax.Array):
    """(document of the last real token up to each (B, T), number of the segment (B, T): 0 goes on with the state)."""
    place = jnp.where(document_BT == PADDING, -1, jnp.arange(document_BT.shape[1])[None])
    last = jax.lax.cummax(place, axis=1)
    filled = jnp.take_along_axis(document_BT, jnp.maximum(last, 0), axis=1)
    filled = jnp.where(last >= 0, filled, before_B[:, None])
    previous = jnp.concatenate([before_B[:, None], filled[:, :-1]], axis=1)
    return filled, jnp.cumsum(filled != previous, axis=1, dtype=jnp.int32)


def running(combine: Callable, x, segment_BT: jax.Array):
    """The tokens of its segment up to each, put together by an associative `combine(earlier, later)`, in log T steps.

    x is a pytree of (B, T, ...), for a chunk; lib/scans.py has the same for a sequence. Nothing of one segment is in
    another, not even as a rounding error.
    """
    previous = jnp.concatenate([segment_BT[:, :1], segment_BT[:, :-1]], axis=1)

    def put(earlier, later):
        (began, x), (begins, y) = earlier, later
        both = jax.tree.map(lambda both, y: jnp.where(like(begins, y), y, both), combine(x, y), y)
        return began | begins, both

    return jax.lax.associative_scan(put, (segment_BT != previous, x), axis=1)[1]


def running_sum(log_decay, segment):
    """(B, K, C, 1 | D) of (B, C, K) or (B, C, K, D), from the beginning of the segment (B, C) or of the chunk."""
    g = log_decay.reshape(*log_decay.shape[:3], -1)
    return running(jnp.add, g, segment).swapaxes(1, 2)


def divided(out, weights):
    """out (..., V) by weights (...); 0 where these are 0."""
    weights = weights[..., None]
    return jnp.where(weights == 0, 0.0, out / jnp.where(weights == 0, 1.0, weights))


def first_document(document_BT: jax.Array) -> jax.Array:
    """int32 (B,) of the first token that is not padding; PADDING where there is none."""
    real = document_BT != PADDING
    first = jnp.take_along_axis(document_BT, real.argmax(1)[:, None], axis=1)[:, 0]
    return jnp.where(real.any(1), first, PADDING)


def _applied(transition, x_BKDN):
    if transition.ndim == 3:
        return transition[..., None] * x_BKDN
    return jnp.einsum("bkde,bken->bkdn", transition, x_BKDN, precision=HIGHEST)


def like(x, y):
    """x with further axes of 1, as many as y has."""
    return x.reshape(*x.shape, *(1,) * (y.ndim - x.ndim))
