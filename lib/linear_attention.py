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

from typing import Protocol

import jax
import jax.numpy as jnp

from striate.lib.chunks import SUB, Chunked
from striate.lib.errors import UserError
from striate.lib.recurrence import HIGHEST, Inputs, Recurrence, State, divided
from striate.lib.scans import Scanned
from striate.lib.tokens import PADDING, Tokens
from striate.pallas_kernels.tpu.chips import target

RULES = ("sum", "delta")
IMPLEMENTATIONS = ("reference", "parallel", "scan", "xla", "pallas_tpu", "pallas_tpu_interpret")
CHUNK = {"plain": 128, "costly": 64}  # tokens; costly are decays by channel and the delta rule


class Parallel(Protocol):
    """How the recurrence crosses devices, on global arrays. Immutable, so that it can be static."""

    def recur(self, recurrence: Recurrence, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """(out (B, T, K, G, V), the state after the last token of the sequence)."""


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
    parallel: Parallel | None = None,
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
      chunk: tokens that are computed at a time by "xla" and "pallas_tpu"; None chooses.
      implementation: "xla"; "pallas_tpu", and "pallas_tpu_interpret" for its programs on any device, slowly;
        "reference" for the recurrence token by token; "parallel" for one chunk of all tokens, whose memory is
        quadratic; "scan" for the states of all tokens at once, for narrow heads; None is best for the device.
      parallel: how the sequence crosses devices (striate.parallel.StateScan, ValueColumns); None leaves it on each.

    Returns:
      out (batch, length, heads, value width) in the dtype of v, and with return_state also the State. States and sums
      are float32. A padding token gives 0.

    Raises:
      UserError: shapes or names that do not fit.
      NotImplementedError: an implementation asked for by name that cannot run here.
    """
    _check(q_BTHD, k_BTKD, v_BTKV, rule, log_decay, beta, normalise, tokens, chunk, implementation)
    tokens = Tokens.arange(*q_BTHD.shape[:2]) if tokens is None else tokens
    inputs = _inputs(q_BTHD, k_BTKD, v_BTKV, rule, log_decay, beta, tokens.document)
    state = State.empty(k_BTKD, v_BTKV) if initial_state is None else initial_state
    recurrence = _form(implementation, rule, normalise, chunk, inputs)
    out, state = parallel.recur(recurrence, inputs, state) if parallel else recurrence.run(inputs, state)
    out = out.reshape(*q_BTHD.shape[:3], -1).astype(v_BTKV.dtype)
    return (out, state) if return_state else out


def _form(implementation, rule: str, normalise: bool, chunk: int | None, inputs: Inputs) -> Recurrence:
    if implementation == "reference":
        return Reference(rule, normalise)
    if implementation == "scan":
        if rule != "sum":
            raise NotImplementedError(f"The form 'scan' is for the rule 'sum', and this is {rule!r}: use 'xla'.")
        return Scanned(rule, normalise)
    length = -(-inputs.k.shape[1] // SUB) * SUB
    if implementation == "parallel":
        return Chunked(rule, normalise, length)
    if implementation != "xla" and (kernel := _kernel(implementation, rule, normalise, chunk, inputs)):
        return kernel
    by_channel = inputs.log_decay is not None and inputs.log_decay.ndim == 4
    usual = CHUNK["costly" if by_channel or rule == "delta" else "plain"]
    return Chunked(rule, normalise, chunk or min(usual, length))


def _kernel(implementation, rule: str, normalise: bool, chunk: int | None, inputs: Inputs) -> Recurrence | None:
    """That of a TPU; None where nothing was asked for by name and another form is the better choice."""
    if implementation is None and target() is None:
        return None
    # Imported when asked for: Pallas takes a moment.
    from striate.pallas_kernels.tpu.linear import Interpreted, Kernel

    kind = Interpreted if implementation == "pallas_tpu_interpret" else Kernel
    reason = kind.suits(inputs, chunk)
    if kind is Kernel and target() is None:
        reason = "is for TPUs, and this program is not ('pallas_tpu_interpret' runs anywhere)"
    if implementation is None and (reason or inputs.k.shape[1] < kind.usual):  # few tokens would be padding mostly
        return None
    if reason is None:
        return kind(rule, normalise, chunk or kind.usual)
    raise NotImplementedError(f"{implementation!r} {reason}: use implementation=None or 'xla'.")


def _inputs(q, k, v, rule, log_decay, beta, document) -> Inputs:
    batch, length, heads, _ = k.shape
    real, wide = document != PADDING, jnp.promote_types(q.dtype, jnp.float32)

    def masked(x, dtype=None):
        return jnp.where(real.reshape(batch, length, *(1,) * (x.ndim - 2)), x, 0).astype(dtype or x.dtype)

    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
    if rule == "delta" and beta is None:
        beta = jnp.ones((batch, length, heads), wide)
    q = q.reshape(batch, length, heads, -1, q.shape[3])
    of_rule = (None if x is None else masked(x, wide) for x in (log_decay, beta))
    return Inputs(masked(q), masked(k), masked(v), *of_rule, document)


class Reference(Recurrence):
    """The recurrence token by token."""

    def run(self, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        state, out = jax.lax.scan(self._step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), inputs.wide))
        return out.swapaxes(0, 1), state

    def _step(self, state: State, x: Inputs):
        real = x.document != PADDING
        goes_on = (x.document == state.document) | ~real
        memory = jnp.where(goes_on[:, None, None, None], state.memory, 0.0)
        total = jnp.where(goes_on[:, None, None], state.total, 0.0)
        if x.log_decay is not None:
            decay = jnp.exp(x.log_decay.reshape(*x.log_decay.shape[:2], -1))
            memory, total = memory * decay[..., None], total * decay
        v = x.v
        if self.rule == "delta":
            v = x.beta[..., None] * (v - jnp.einsum("bkdv,bkd->bkv", memory, x.k, precision=HIGHEST))
        memory = memory + x.k[..., None] * v[:, :, None]
        out = jnp.einsum("bkgd,bkdv->bkgv", x.q, memory, precision=HIGHEST)
        if self.normalise:
            total = total + x.k
            out = divided(out, jnp.einsum("bkgd,bkd->bkg", x.q, total, precision=HIGHEST))
        return State(memory, total, jnp.where(real, x.document, state.document)), out


def check_arrays(q, k, v, tokens: Tokens | None) -> None:
    """Raises UserError for shapes that do not fit, whatever the recurrence."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        raise UserError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit: linear attention needs (batch, length, heads, width), "
            "batch and length common to all three, heads to k and v."
        )
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise UserError(
            f"q {q.shape} and k {k.shape} do not fit: they need one head_dim, and heads a multiple of k's heads."
        )
    if tokens is not None and tokens.shape != q.shape[:2]:
        raise UserError(f"tokens have shape {tokens.shape}; the arrays need (batch, length) = {q.shape[:2]}.")


def _check(q, k, v, rule, log_decay, beta, normalise, tokens, chunk, implementation) -> None:
    check_arrays(q, k, v, tokens)
    if rule not in RULES:
        raise UserError(f"rule {rule!r} is not known; there are {', '.join(map(repr, RULES))}.")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UserError(
            f"implementation {implementation!r} is not known; there are {', '.join(map(repr, IMPLEMENTATIONS))}."
        )
    batch, length, heads, width = k.shape
    wanted = ((heads,), (batch, length, heads), (batch, length, heads, width))
    if log_decay is not None and log_decay.shape not in wanted:
        raise UserError(f"log_decay has shape {log_decay.shape}; it needs one of {', '.join(map(str, wanted))}.")
    if beta is not None and (beta.shape != wanted[1] or rule != "delta"):
        raise UserError(f"beta has shape {beta.shape} under the rule {rule!r}; the delta rule takes {wanted[1]}.")
    if normalise and rule != "sum":
        raise UserError(f"normalise is for the rule 'sum', and this is {rule!r}: the weights of that have any sign.")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk is {chunk}; it is a number of tokens, at least 1.")
