"""Frames: softmax attention inside each, and a gated linear state from one to the next (ARFlow).

A document is a sequence of frames, such as images, of C tokens each. Token i of frame m, with log-gates g <= 0, reads

    o_i = softmax(q_i K_m^T) V_m + exp(g_1 + ... + g_i) S_m^T q_i
    S_{m+1} = a_m S_m + K_m^T V_m,     a_m = exp(mean of g over frame m),     S_0 = 0

The state is one linear attention over twice as many tokens: every frame first as C queries without keys, then as C keys
without queries, so that it reads all frames before it, and not itself. What frame m wrote reaches the frames after the
next one through a_{m+1}, ..., which stand at the first of the keys of their frames.

Source: Hui et al. 2025 (ARFlow), and the authors' code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from striate.lib.attention import Parallel, attention
from striate.lib.errors import UserError
from striate.lib.layouts import Contiguous
from striate.lib.linear_attention import check_arrays, linear_attention
from striate.lib.masks import same
from striate.lib.recurrence import State
from striate.lib.scores import Score
from striate.lib.tokens import PADDING, Tokens

OWN_FRAME = same("document") & same("chunk")


def frame_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    log_gate_BTK: jax.Array,
    *,
    frame: int,
    score: Score | None = None,
    tokens: Tokens | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    parallel: Parallel | None = None,
    recurrence=None,
):
    """The attention of this file, of whole frames: a sequence goes on from its state at the next frame.

    Args:
      q_BTHD, k_BTKD, v_BTKV: as in `linear_attention`; products of queries and keys are not scaled.
      log_gate_BTK: at most 0, (batch, length, key/value heads).
      frame: tokens of a frame. Documents and padding are of whole frames, each in one piece, and positions of a
        document count its tokens, from 0.
      score: what becomes of a logit in the frame.
      tokens: whose documents keep apart; None is one document.
      initial_state: what came before.
      return_state: also return the State after the last frame.
      implementation: of the softmax attention.
      parallel, recurrence: how softmax attention and how recurrences cross devices, for global arrays.

    Returns:
      out (batch, length, heads, value width) in the dtype of v, with return_state also the State.

    Raises:
      UserError: shapes that do not fit, or frames that the sequence or its devices would cut.
    """
    check_arrays(q_BTHD, k_BTKD, v_BTKV, tokens)
    _check(k_BTKD, log_gate_BTK, frame, recurrence)
    tokens = Tokens.arange(*q_BTHD.shape[:2]) if tokens is None else tokens
    in_frames = tokens.replace(chunk=tokens.position // frame)
    how = {"q_tokens": in_frames, "k_tokens": in_frames, "implementation": implementation, "parallel": parallel}
    own = attention(q_BTHD, k_BTKD, v_BTKV, mask=OWN_FRAME, score=score, scale=1.0, **how)
    how = {"initial_state": initial_state, "recurrence": recurrence}
    earlier, state = _earlier(q_BTHD, k_BTKD, v_BTKV, log_gate_BTK, frame, tokens, **how)
    return (own + earlier, state) if return_state else own + earlier


def _earlier(q, k, v, log_gate, frame: int, tokens: Tokens, initial_state, recurrence):
    """(what is read of the frames before, the State after the last)."""

    def twice(reads, writes):
        pair = (x.reshape(x.shape[0], -1, frame, *x.shape[2:]) for x in (reads, writes))
        return jnp.stack(list(pair), axis=2).reshape(reads.shape[0], -1, *reads.shape[2:])

    g = log_gate.astype(jnp.promote_types(log_gate.dtype, jnp.float32))
    g = jnp.where((tokens.document != PADDING)[..., None], g, 0.0)
    g_BMCK = g.reshape(g.shape[0], -1, frame, g.shape[2])
    reach_BTH = jnp.exp(g_BMCK.cumsum(2)).reshape(g.shape).repeat(q.shape[2] // k.shape[2], axis=2)
    first = jnp.arange(frame) == 0
    decay = jnp.where(first[None, None, :, None], g_BMCK.mean(2, keepdims=True), 0.0).reshape(g.shape)
    out, state = linear_attention(
        twice((reach_BTH[..., None] * q).astype(q.dtype), jnp.zeros_like(q)),
        twice(jnp.zeros_like(k), k),
        twice(jnp.zeros_like(v), v),
        log_decay=twice(jnp.zeros_like(decay), decay),
        tokens=tokens.map(lambda x: twice(x, x)),
        initial_state=initial_state,
        return_state=True,
        parallel=recurrence and recurrence.stretched(2),
    )
    return out.reshape(out.shape[0], -1, 2, frame, *out.shape[2:])[:, :, 0].reshape(*q.shape[:3], -1), state


def _check(k, log_gate, frame: int, recurrence) -> None:
    if log_gate.shape != k.shape[:3]:
        raise UserError(f"log_gate has shape {log_gate.shape}; it needs one number a key: {k.shape[:3]}.")
    layout = Contiguous(1) if recurrence is None else recurrence.layout or Contiguous(recurrence.shards)
    if frame < 1 or layout.places(k.shape[1], frame) is None:
        raise UserError(
            f"{k.shape[1]} tokens under {layout} are not of whole frames of {frame} tokens on every device: make the "
            "length, its share of a device, and a stripe multiples of the frame."
        )
