"""Linear attention in which every token sees all of its document, before and after it.

`global_attention` and what is made of it need no order of the tokens: a document is a number, wherever its tokens are,
and over a sharded sequence only sums cross devices. Its members:

| member | is |
|---|---|
| VSSD | `global_attention` of C, a B and x, plus D x |
| Efficient Attention; Latte, both ways | `global_softmax` of softmax(q) |
| LightNet, both ways | `global_softmax` of silu(q) |
| Flowformer | `global_flow` |

`quasiseparable` (Hydra) is a recurrence in each direction, and a diagonal: there the order of the tokens is everything,
as it is to `centred_convolution`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.convolution import short_convolution
from striate.lib.errors import UserError
from striate.lib.layouts import Contiguous
from striate.lib.linear_attention import check_arrays, linear_attention
from striate.lib.linear_variants import conserved
from striate.lib.recurrence import HIGHEST, like, segments
from striate.lib.scans import scan
from striate.lib.tokens import PADDING, Tokens


def global_attention(q_BTHD, k_BTKD, v_BTKV, *, tokens: Tokens | None = None) -> jax.Array:
    """o_i = sum of (q_i . k_j) v_j over all tokens j of the document of i: linear attention without an order.

    Takes two products a document of the fullest row; shapes are those of `linear_attention`. A padding token gives 0.

    Source: Shen et al. 2021 (Efficient Attention); Shi et al. 2024 (VSSD).
    """
    tokens = Tokens.arange(*q_BTHD.shape[:2]) if tokens is None else tokens
    check_arrays(q_BTHD, k_BTKD, v_BTKV, tokens)
    q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BTHD, k_BTKD, v_BTKV))
    out = _over_documents(q.reshape(*k.shape[:3], -1, q.shape[3]), k[..., None, :], v[..., None, :], tokens.document)
    return out.reshape(*q_BTHD.shape[:3], -1).astype(v_BTKV.dtype)


def global_softmax(q_BTHD, f_BTKD, v_BTKV, *, tokens: Tokens | None = None) -> jax.Array:
    """Every channel of the keys is a softmax over the tokens of its document, and queries weigh these channels.

    o_i = sum_d q_id sum_j exp(f_jd) v_j / sum_j exp(f_jd); arguments are those of `running_softmax`.

    Source: Shen et al. 2021 (Efficient Attention); Dolga et al. 2024 (Latte); Qin et al. 2024 (LightNet).
    """
    tokens = Tokens.arange(*q_BTHD.shape[:2]) if tokens is None else tokens
    check_arrays(q_BTHD, f_BTKD, v_BTKV, tokens)
    wide = f_BTKD.astype(jnp.promote_types(f_BTKD.dtype, jnp.float32))
    greatest = _greatest(jax.lax.stop_gradient(wide), tokens.document)
    k = jnp.exp(jnp.where(like(tokens.document != PADDING, wide), wide - greatest, -jnp.inf))
    one = jnp.ones_like(k[:, :, :, :1])
    total = global_attention(one, one, k, tokens=tokens)
    return global_attention(q_BTHD, k / jnp.where(total == 0, 1.0, total), v_BTKV, tokens=tokens)


def global_flow(q_BTHD, k_BTKD, v_BTKV, *, feature: Callable = jax.nn.sigmoid, tokens: Tokens | None = None):
    """Flow-Attention: `conserved` over all tokens of the document; `feature` makes queries and keys positive.

    Source: Wu et al. 2022 (Flowformer).
    """
    return conserved(q_BTHD, k_BTKD, v_BTKV, functools.partial(global_attention, tokens=tokens), feature)


@jax.custom_vjp
def _over_documents(q_BTKGD, k_BTKSD, v_BTKSV, document_BT):
    """(B, T, K, G, V), of S keys a token. Its derivatives are of its own kind, the roles of the arrays changed."""

    def visit(of_BT, out):
        k = jnp.where(like(of_BT, k_BTKSD), k_BTKSD, 0.0)
        memory = jnp.einsum("btksd,btksv->bkdv", k, v_BTKSV, precision=HIGHEST)
        return jnp.where(like(of_BT, out), jnp.einsum("btkgd,bkdv->btkgv", q_BTKGD, memory, precision=HIGHEST), out)

    out = jnp.zeros((*q_BTKGD.shape[:4], v_BTKSV.shape[4]), q_BTKGD.dtype)
    return _each_document(document_BT, visit, out)


def _forward(q, k, v, document):
    return _over_documents(q, k, v, document), (q, k, v, document)


def _backward(saved, d_out):
    q, k, v, document = saved
    d_q, d_k = _over_documents(d_out, v, k, document), _over_documents(v, d_out, q, document)
    return d_q, d_k, _over_documents(k, q, d_out, document), np.zeros(document.shape, jax.dtypes.float0)


_over_documents.defvjp(_forward, _backward)


def _greatest(f_BTKD, document_BT):
    """The maximum over the document of each token and channel; 0 where it is -inf, and at padding."""

    def visit(of_BT, out):
        greatest = jnp.where(like(of_BT, f_BTKD), f_BTKD, -jnp.inf).max(1, keepdims=True)
        return jnp.where(like(of_BT, out) & (greatest > -jnp.inf), greatest, out)

    return _each_document(document_BT, visit, jnp.zeros_like(f_BTKD))


def _each_document(document_BT, visit: Callable, out):
    """out = visit(of_BT, out) with the tokens of one document of every row, then of the next, while there are any."""
    end = jnp.iinfo(document_BT.dtype).max

    def following(number_B):
        later = (document_BT > number_B[:, None]) & (document_BT != PADDING)
        return jnp.where(later, document_BT, end).min(1)

    def step(carry):
        number_B, out = carry
        return following(number_B), visit(document_BT == number_B[:, None], out)

    first = following(jnp.full_like(document_BT[:, 0], jnp.iinfo(document_BT.dtype).min))
    return jax.lax.while_loop(lambda carry: (carry[0] < end).any(), step, (first, out))[1]


class Direction(NamedTuple):
    """What one recurrence of `quasiseparable` reads; shapes as in `linear_attention`."""

    q: jax.Array
    k: jax.Array
    log_decay: jax.Array | None = None


def quasiseparable(
    forward: Direction,
    backward: Direction,
    v_BTKV: jax.Array,
    diagonal_BTH: jax.Array,
    *,
    tokens: Tokens | None = None,
    **how,
) -> jax.Array:
    """A recurrence over what is before a token, another one over what is after it, and a diagonal: o = M v, with

        M_ij = q_{i-1} . exp(g_{j+1} + ... + g_{i-1}) k_j    j < i, of `forward`
        M_ii = diagonal_i
        M_ij = q_{i+1} . exp(g_{i+1} + ... + g_{j-1}) k_j    j > i, of `backward`

    over the tokens of a document: padding is none of them, wherever it is. Hydra has the step widths in its keys.

    Args:
      forward, backward: q (B, T, H, D), k (B, T, K, D), log_decay.
      v_BTKV: values.
      diagonal_BTH: (batch, length, heads).
      tokens: whose documents keep apart, in natural order.
      how: chunk, implementation and parallel of `linear_attention`, for global arrays in the order of the sequence.

    Raises:
      UserError: shapes that do not fit, or a `parallel` for tokens in another order.

    Source: Hwang et al. 2024 (Hydra).
    """
    tokens = Tokens.arange(*v_BTKV.shape[:2]) if tokens is None else tokens
    _check_order("quasiseparable", how.get("parallel"))
    before = _earlier(forward, v_BTKV, tokens, how)
    after = _earlier(Direction(*map(_reversed, backward)), _reversed(v_BTKV), tokens.map(_reversed), how)
    v = v_BTKV.repeat(diagonal_BTH.shape[2] // v_BTKV.shape[2], axis=2)
    own = jnp.where(like(tokens.document != PADDING, v), diagonal_BTH[..., None] * v, 0.0)
    return (own + before + _reversed(after)).astype(v_BTKV.dtype)


def _earlier(direction: Direction, v, tokens: Tokens, how: dict):
    """What the recurrence gave at the token before, of the same document."""
    out = linear_attention(direction.q, direction.k, v, log_decay=direction.log_decay, tokens=tokens, **how)
    real, segment = tokens.document != PADDING, segments(tokens.document, jnp.full(v.shape[0], PADDING))[1]

    def later(earlier, now):
        return earlier[0] | now[0], jnp.where(like(now[0], now[1]), now[1], earlier[1])

    nothing = real[:, 0] & False, jnp.zeros_like(out[:, 0])
    _, last = scan(later, (real, out), segment, nothing)
    last, of = (jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1) for x in (last, segment))
    return jnp.where(like(real & (of == segment), out), last, 0.0)


def centred_convolution(
    x_BTC: jax.Array, taps_WC: jax.Array, *, tokens: Tokens | None = None, parallel=None
) -> jax.Array:
    """A depthwise convolution to both sides: `short_convolution` of taps r, r + 1, ... and one of the others reversed.

        y_t = sum over w of taps_{r + w} x_{t - w},  w = -r ... r, over the tokens of the segment of t

    Args:
      x_BTC: (batch, length, channels), a floating dtype.
      taps_WC: (2 r + 1, channels): the one in the middle is that of the token itself, those after it of tokens before.
      tokens: whose documents keep apart, in natural order; None is one document.
      parallel: of `short_convolution`, for global arrays in the order of the sequence.

    Returns:
      y (batch, length, channels) in the dtype of x, sums in float32; 0 at padding.

    Raises:
      UserError: shapes that do not fit, an even number of taps, or a `parallel` for tokens in another order.
    """
    if taps_WC.shape[0] % 2 == 0:
        raise UserError(
            f"A centred convolution has as many taps before as after: use 1, 3, ... not {taps_WC.shape[0]}."
        )
    _check_order("centred_convolution", parallel)
    tokens = Tokens.arange(*x_BTC.shape[:2]) if tokens is None else tokens
    wide, reach = x_BTC.astype(jnp.promote_types(x_BTC.dtype, jnp.float32)), taps_WC.shape[0] // 2
    before = short_convolution(wide, taps_WC[reach:], tokens=tokens, parallel=parallel)
    ahead = jnp.concatenate([jnp.zeros_like(taps_WC[:1]), taps_WC[:reach][::-1]])  # its own tap counts once
    after = short_convolution(_reversed(wide), ahead, tokens=tokens.map(_reversed), parallel=parallel)
    return (before + _reversed(after)).astype(x_BTC.dtype)


def _check_order(what: str, parallel) -> None:
    layout = getattr(parallel, "layout", None)
    if not isinstance(layout, Contiguous | None):
        raise UserError(
            f"{what} reads what lies beside a token, and under {layout} that is a token of another place: restore the "
            "order of the sequence, and use StateScan(mesh)."
        )


def _reversed(x):
    return x if x is None or x.ndim == 1 else x[:, ::-1]
