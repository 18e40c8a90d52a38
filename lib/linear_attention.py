"""Linear attention: one recurrence, its rules, and two forms of it.

For one head, with the state S (D, V), the log-decay g_t <= 0 and the write strength beta_t,

    S' = exp(g_t) S_{t-1}                       nothing | one number a head | one a token | one a token and channel
    sum:    S_t = S' + k_t v_t^T
    delta:  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    o_t = S_t^T q_t,  divided by q_t . z_t where it is normalised (z is S for v = 1)

`reference` is that, token by token. `xla` takes chunks of C tokens. With b the running sum of g in a chunk, and S the
state before it,

    A_ij = q_i . exp(b_i - b_j) k_j    (i >= j)          L_ij = beta_i k_i . exp(b_i - b_j) k_j    (i > j)
    sum:    U = V                                        delta:  U = (I + L)^-1 beta (V - (exp(b) K) S)
    O = A U + (exp(b) Q) S                               S = exp(b_C) S + (exp(b_C - b) K)^T U

Where the decay is one a channel, exp(b_i - b_j) does not come apart into factors that float32 can hold: rows are taken
in blocks of SUB, each against the sum where it begins, so that all exponents are at most 0.

A token of another document than the one before it finds the state empty; padding leaves the state as it is. A state
knows whose it is, so that this holds from one call to the next.

Source: Yang et al. 2024 (Gated Linear Attention), section 4; Yang et al. 2024 (DeltaNet over sequence length), section
3; Dao and Gu 2024 (State space duality), section 6.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from striate.lib.errors import UserError
from striate.lib.tokens import PADDING, Tokens

RULES = ("sum", "delta")
CHUNK = {"plain": 128, "costly": 64}  # tokens; costly are decays by channel and the delta rule
SUB = 16  # rows of a chunk that share a reference, where the decay is one a channel
HIGHEST = jax.lax.Precision.HIGHEST


class State(NamedTuple):
    """What the tokens so far have left behind. float32, or float64 where the inputs are."""

    memory: jax.Array  # (B, K, D, V) S
    total: jax.Array  # (B, K, D) z, the sum of the keys as `memory` has them
    document: jax.Array  # int32 (B,) of the last token that is not padding; PADDING where there was none


def linear_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    *,
    rule: str = "sum",
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    normalise: bool = False,
    tokens: Tokens | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    implementation: str | None = None,
):
    """The recurrence of this file, over a sequence in the order of its tokens; a token sees itself.

    Args:
      q_BTHD: queries, (batch, length, heads, head_dim), a floating dtype. They are not scaled.
      k_BTKD: keys, (batch, length, key/value heads, head_dim); each of those heads serves heads / (key/value heads)
        consecutive query heads. The delta rule needs keys of length 1, or it may grow without bound.
      v_BTKV: values, (batch, length, key/value heads, value width).
      rule: "sum" or "delta".
      log_decay: at most 0: None for none, (K,) for one a head, (B, T, K) for one a token, (B, T, K, D) for one a token
        and channel.
      beta: how much of a value the delta rule writes, (B, T, K), 0 to 1; None is 1.
      normalise: divide by the sum of the weights, which are to be positive; for the sum rule.
      tokens: whose documents keep apart; None is one document.
      initial_state: what came before.
      return_state: also return the State after the last token.
      chunk: tokens that are computed at a time by "xla"; None chooses.
      implementation: "xla", or "reference" for the recurrence token by token; None is "xla".

    Returns:
      out (batch, length, heads, value width) in the dtype of v, and with return_state also the State. States and sums
      are float32. A padding token gives 0.

    Raises:
      UserError: shapes or names that do not fit.
    """
    _check(q_BTHD, k_BTKD, v_BTKV, rule, log_decay, beta, normalise, tokens, chunk, implementation)
    tokens = Tokens.arange(*q_BTHD.shape[:2]) if tokens is None else tokens
    wide = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    inputs = _inputs(q_BTHD, k_BTKD, v_BTKV, rule, log_decay, beta, tokens.document, wide)
    state = empty_state(k_BTKD, v_BTKV) if initial_state is None else initial_state
    if implementation == "reference":
        out, state = _reference(rule, normalise, inputs, state)
    else:
        by_channel = inputs.log_decay is not None and inputs.log_decay.ndim == 4
        usual = CHUNK["costly" if by_channel or rule == "delta" else "plain"]
        out, state = _chunked(rule, normalise, inputs, state, chunk or min(usual, -(-q_BTHD.shape[1] // SUB) * SUB))
    out = out.reshape(*q_BTHD.shape[:3], -1).astype(v_BTKV.dtype)
    return (out, state) if return_state else out


def empty_state(k_BTKD: jax.Array, v_BTKV: jax.Array) -> State:
    """The State before any token."""
    (batch, _, heads, width), wide = k_BTKD.shape, jnp.promote_types(k_BTKD.dtype, jnp.float32)
    memory = jnp.zeros((batch, heads, width, v_BTKV.shape[3]), wide)
    return State(memory, memory[..., 0], jnp.full(batch, PADDING, jnp.int32))


class Inputs(NamedTuple):
    """Per token: in wide dtype, padding set to what leaves a state as it is."""

    q: jax.Array  # (B, T, K, G, D)
    k: jax.Array  # (B, T, K, D)
    v: jax.Array  # (B, T, K, V)
    log_decay: jax.Array | None  # (B, T, K) or (B, T, K, D)
    beta: jax.Array | None  # (B, T, K)
    document: jax.Array  # (B, T)


def _inputs(q, k, v, rule, log_decay, beta, document, wide) -> Inputs:
    batch, length, heads, _ = k.shape
    real = document != PADDING

    def masked(x):
        return None if x is None else jnp.where(real.reshape(batch, length, *(1,) * (x.ndim - 2)), x.astype(wide), 0.0)

    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
    if rule == "delta" and beta is None:
        beta = jnp.ones((batch, length, heads), wide)
    q = q.reshape(batch, length, heads, -1, q.shape[3])
    return Inputs(masked(q), masked(k), masked(v), masked(log_decay), masked(beta), document)


def _reference(rule: str, normalise: bool, inputs: Inputs, state: State):
    def step(state: State, x: Inputs):
        real = x.document != PADDING
        goes_on = (x.document == state.document) | ~real
        memory, total = (jnp.where(_like(goes_on, y), y, 0.0) for y in (state.memory, state.total))
        if x.log_decay is not None:
            decay = jnp.exp(x.log_decay.reshape(*x.log_decay.shape[:2], -1))
            memory, total = memory * decay[..., None], total * decay
        v = x.v
        if rule == "delta":
            v = x.beta[..., None] * (v - jnp.einsum("bkdv,bkd->bkv", memory, x.k, precision=HIGHEST))
        memory, total = memory + x.k[..., None] * v[:, :, None], total + x.k
        out = jnp.einsum("bkgd,bkdv->bkgv", x.q, memory, precision=HIGHEST)
        weights = jnp.einsum("bkgd,bkd->bkg", x.q, total, precision=HIGHEST)
        out = _divided(out, weights) if normalise else out
        return State(memory, total, jnp.where(real, x.document, state.document)), out

    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), inputs))
    return out.swapaxes(0, 1), state


def _chunked(rule: str, normalise: bool, inputs: Inputs, state: State, chunk: int):
    batch, length = inputs.document.shape
    missing = -length % chunk

    def chunks(x, fill=0):
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    document, segment = _segments(inputs.document, state.document)
    of_tokens = jax.tree.map(chunks, inputs._replace(document=None))
    # Padding at the end belongs to the last segment; no token of it is written.
    last = segment[:, -1:]
    segments = jnp.concatenate([segment, jnp.broadcast_to(last, (batch, missing))], axis=1)
    segments = segments.reshape(batch, -1, chunk).swapaxes(0, 1)

    # What a chunk computes is computed again in the backward pass: of each only the state before it is kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry, x):
        (memory, total, before), (tokens, segment) = carry, x
        out, memory, total = _one_chunk(rule, normalise, tokens, segment - before[:, None], memory, total)
        return (memory, total, segment[:, -1]), out

    carry = state.memory, state.total, jnp.zeros(batch, jnp.int32)
    (memory, total, _), out = jax.lax.scan(step, carry, (of_tokens, segments))
    out = out.swapaxes(0, 1).reshape(batch, length + missing, *out.shape[3:])[:, :length]
    return out, State(memory, total, document[:, -1])


def _segments(document, before):
    """(document of the last real token up to each (B, T), number of the segment (B, T): 0 goes on with the state)."""
    place = jnp.where(document == PADDING, -1, jnp.arange(document.shape[1])[None])
    last = jax.lax.cummax(place, axis=1)
    filled = jnp.take_along_axis(document, jnp.maximum(last, 0), axis=1)
    filled = jnp.where(last >= 0, filled, before[:, None])
    previous = jnp.concatenate([before[:, None], filled[:, :-1]], axis=1)
    return filled, jnp.cumsum(filled != previous, axis=1, dtype=jnp.int32)


def _one_chunk(rule: str, normalise: bool, x: Inputs, segment, memory, total):
    """(out (B, C, K, G, V), memory, total after it); segment (B, C) is 0 where tokens go on with the state."""
    size = segment.shape[1]
    q, k, v = jnp.moveaxis(x.q, 1, 3), x.k.swapaxes(1, 2), x.v.swapaxes(1, 2)  # (B, K, G, C, D), (B, K, C, D | V)
    b = jnp.zeros((*k.shape[:3], 1), k.dtype) if x.log_decay is None else _running_sum(x.log_decay, k, segment)
    together = (segment[:, :, None] == segment[:, None]) & jnp.tri(size, dtype=bool)[None]  # (B, C, C)
    goes_on, stays = (segment == 0)[:, None, :, None], (segment == segment[:, -1:])[:, None, :, None]
    entering, leaving = _exp(goes_on, b), _exp(stays, b[:, :, -1:] - b)  # (B, K, C, 1 | D)
    if rule == "delta":
        beta = x.beta.swapaxes(1, 2)[..., None]
        strictly = together & ~jnp.eye(size, dtype=bool)[None]
        lower = beta * _pairs(k[:, :, None], k, b, strictly)[:, :, 0]
        v = _solve(lower, beta * (v - _product("bkcd,bkdv->bkcv", entering * k, memory)))
    weights = _pairs(q, k, b, together)
    out = _product("bkgij,bkjv->bkgiv", weights, v) + _product("bkgid,bkdv->bkgiv", entering[:, :, None] * q, memory)
    if normalise:
        of_state = _product("bkgid,bkd->bkgi", entering[:, :, None] * q, total)
        out = _divided(out, weights.sum(-1) + of_state)
    kept, written = jnp.where(segment[:, -1] == 0, 1.0, 0.0)[:, None, None] * jnp.exp(b[:, :, -1]), leaving * k
    memory = kept[..., None] * memory + _product("bkcd,bkcv->bkdv", written, v)
    return jnp.moveaxis(out, 3, 1), memory, kept * total + written.sum(2)


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


def _solve(lower, x):
    """(I + L)^-1 x for strictly lower triangular L: (I - L)(I + L^2)(I + L^4)..., exact as L^C is 0."""
    x, power, reach = x - _product("bkij,bkjv->bkiv", lower, x), lower, 2
    while reach < lower.shape[-1]:
        power = _product("bkij,bkjl->bkil", power, power)
        x, reach = x + _product("bkij,bkjv->bkiv", power, x), 2 * reach
    return x


def _running_sum(log_decay, k, segment):
    """(B, K, C, 1 | D) of (B, C, K) or (B, C, K, D), from the beginning of the segment or of the chunk.

    No sum holds, not even as a rounding error, what another document brings.
    """
    begins = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    g = log_decay.reshape(*log_decay.shape[:3], -1).swapaxes(1, 2).astype(k.dtype)

    def add(earlier, later):
        (began, x), (begins, y) = earlier, later
        return began | begins, jnp.where(begins, y, x + y)

    begins = jnp.broadcast_to(begins[:, None, :, None], g.shape)
    return jax.lax.associative_scan(add, (begins, g), axis=2)[1]


def _exp(shown, x):
    """exp(x), 0 where not shown; never exp of what is not."""
    return jnp.exp(jnp.where(shown, x, -jnp.inf))


def _divided(out, weights):
    weights = weights[..., None]
    return jnp.where(weights == 0, 0.0, out / jnp.where(weights == 0, 1.0, weights))


def _product(subscripts: str, a, b):
    return jnp.einsum(subscripts, a, b, precision=HIGHEST)


def _like(x_B, y):
    return x_B.reshape(-1, *(1,) * (y.ndim - 1))


def _check(q, k, v, rule, log_decay, beta, normalise, tokens, chunk, implementation) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        raise UserError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit: linear attention needs (batch, length, heads, width), "
            "batch and length common to all three, heads to k and v."
        )
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise UserError(
            f"q {q.shape} and k {k.shape} do not fit: they need one head_dim, and heads a multiple of k's heads."
        )
    if rule not in RULES:
        raise UserError(f"rule {rule!r} is not known; there are {', '.join(map(repr, RULES))}.")
    if implementation not in (None, "xla", "reference"):
        raise UserError(f"implementation {implementation!r} is not known; there are 'xla' and 'reference'.")
    batch, length, heads, width = k.shape
    wanted = ((heads,), (batch, length, heads), (batch, length, heads, width))
    if log_decay is not None and log_decay.shape not in wanted:
        raise UserError(f"log_decay has shape {log_decay.shape}; it needs one of {', '.join(map(str, wanted))}.")
    if beta is not None and (beta.shape != wanted[1] or rule != "delta"):
        raise UserError(f"beta has shape {beta.shape} under the rule {rule!r}; the delta rule takes {wanted[1]}.")
    if normalise and rule != "sum":
        raise UserError(f"normalise is for the rule 'sum', and this is {rule!r}: the weights of that have any sign.")
    if tokens is not None and tokens.shape != (batch, length):
        raise UserError(f"tokens have shape {tokens.shape}; the arrays need (batch, length) = {(batch, length)}.")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk is {chunk}; it is a number of tokens, at least 1.")
