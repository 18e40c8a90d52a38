"""Exact attention: one front door, the reference that is the truth, and the choice of the implementation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from striate.lib import blockwise, masks
from striate.lib.errors import UserError
from striate.lib.tokens import Tokens

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


class Parallel(Protocol):
    """How attention crosses devices: the two passes on global arrays. Immutable, so that it can be static."""

    def forward(self, mask, scale, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens):
        """(out (B, T, H, V) in the dtype of v, lse float32 (B, T, H))."""

    def backward(self, mask, scale, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens, d_out, lse, delta):
        """(dq, dk, dv) float32; delta = rowsum(d_out * out) - d_lse, (B, T, H)."""


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKV: jax.Array,
    *,
    mask: masks.Mask | None = None,
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    parallel: Parallel | None = None,
    return_lse: bool = False,
):
    """softmax(scale q k^T over the pairs that the mask shows) v.

    Args:
      q_BTHD: queries, (batch, length, heads, head_dim), a floating dtype.
      k_BSKD: keys, (batch, key length, key/value heads, head_dim); heads is a multiple of key/value heads, and each
        of them serves heads / (key/value heads) consecutive query heads.
      v_BSKV: values, (batch, key length, key/value heads, value width).
      mask: a formula (striate.masks); None shows every pair.
      q_tokens: Tokens of the queries, (batch, length); None is Tokens.arange, where length == key length.
      k_tokens: Tokens of the keys; None is q_tokens, where length == key length.
      scale: factor of the logits; None is head_dim ** -0.5.
      implementation: None (best for the device), "reference", "xla", or several to try in turn.
      parallel: how the sequence crosses devices (striate.parallel); None leaves it on each device.
      return_lse: also return the log-sum-exp of the visible logits.

    Returns:
      out (batch, length, heads, value width) in the dtype of v, and with return_lse also lse, float32
      (batch, length, heads). Logits and accumulators are float32. A row that sees nothing gives 0, lse -inf and zero
      gradient.

    Raises:
      UserError: shapes, dtypes or Tokens that do not fit together, or a mask that reads a field that is not there.
      NotImplementedError: an implementation asked for by name that cannot run here.
    """
    mask = masks.everything() if mask is None else mask
    if not isinstance(mask, masks.Mask):
        raise UserError(
            f"mask is a {type(mask).__name__}; attention needs a formula over Tokens, such as masks.causal() or "
            "masks.parse(text)."
        )
    _check_arrays(q_BTHD, k_BSKD, v_BSKV)
    q_tokens, k_tokens = _check_tokens(q_BTHD, k_BSKD, q_tokens, k_tokens)
    mask.check(q_tokens, k_tokens)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = _choose(implementation, parallel)
    if chosen == "reference":
        out, lse = reference(q_BTHD, k_BSKD, v_BSKV, mask, scale, q_tokens, k_tokens)
    else:
        q_tokens = q_tokens.as_queries()
        out, lse = _attend(parallel or Local(), mask, scale, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens)
    return (out, lse) if return_lse else out


def reference(q_BTHD, k_BSKD, v_BSKV, mask, scale, q_tokens, k_tokens):
    """The dense form: quadratic memory, one line an equation. In float32 at least; float64 stays float64."""
    wide = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    group = q_BTHD.shape[2] // k_BSKD.shape[2]
    q, k, v = (x.astype(wide) for x in (q_BTHD, jnp.repeat(k_BSKD, group, 2), jnp.repeat(v_BSKV, group, 2)))
    visible_BHTS = mask.dense(q_tokens, k_tokens)[:, None]
    logits = jnp.where(visible_BHTS, scale * jnp.einsum("bthd,bshd->bhts", q, k), -jnp.inf)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True, initial=blockwise.LOWEST))
    weights = jnp.where(visible_BHTS, jnp.exp(logits - top), 0.0)
    total = weights.sum(-1)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("bhts,bshv->bthv", weights / safe[..., None], v).astype(v_BSKV.dtype)
    lse_BHT = jnp.where(seen, jnp.log(safe) + top[..., 0], -jnp.inf)
    return out, lse_BHT.swapaxes(1, 2)


@dataclass(frozen=True)
class Local:
    """Each device attends to what it holds: the blockwise form as it is."""

    def forward(self, mask, scale, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens):
        kv_heads, length = k_BSKD.shape[2], q_BTHD.shape[1]
        problem = blockwise.plan(mask, scale, length, k_BSKD.shape[1])
        q = blockwise.queries(problem, q_BTHD, kv_heads)
        k, v = (blockwise.keys_or_values(problem, x) for x in (k_BSKD, v_BSKV))
        sides = blockwise.fields(problem, q_tokens, 0), blockwise.fields(problem, k_tokens, 1)
        partial = blockwise.Partial.empty(q.shape[:-1], v.shape[-1])
        out, lse = blockwise.forward(problem, q, k, v, *sides, partial).finish()
        return blockwise.natural(out, length).astype(v_BSKV.dtype), blockwise.natural(lse, length)

    def backward(self, mask, scale, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens, d_out, lse, delta):
        kv_heads, (length, keys) = k_BSKD.shape[2], (q_BTHD.shape[1], k_BSKD.shape[1])
        problem = blockwise.plan(mask, scale, length, keys)
        q, d_out, lse, delta = (blockwise.queries(problem, x, kv_heads) for x in (q_BTHD, d_out, lse, delta))
        k, v = (blockwise.keys_or_values(problem, x) for x in (k_BSKD, v_BSKV))
        sides = blockwise.fields(problem, q_tokens, 0), blockwise.fields(problem, k_tokens, 1)
        empty = blockwise.empty_dq(problem, q)
        dq_T, dk, dv = blockwise.backward(problem, q, k, v, d_out, lse, delta, *sides, empty)
        dq = blockwise.natural(blockwise.finish_dq(problem, dq_T, q), length)
        return dq, dk[:, :, :keys].swapaxes(1, 2), dv[:, :, :keys].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(parallel, mask, scale, q, k, v, q_tokens, k_tokens):
    return parallel.forward(mask, scale, q, k, v, q_tokens, k_tokens)


def _attend_forward(parallel, mask, scale, q, k, v, q_tokens, k_tokens):
    out, lse = parallel.forward(mask, scale, q, k, v, q_tokens, k_tokens)
    # A remat policy that saves these two names recomputes no attention.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, q_tokens, k_tokens, out, lse)


def _attend_backward(parallel, mask, scale, saved, cotangents):
    q, k, v, q_tokens, k_tokens, out, lse = saved
    d_out, d_lse = cotangents
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta -= jnp.where(jnp.isfinite(lse), d_lse, 0.0)
    gradients = parallel.backward(mask, scale, q, k, v, q_tokens, k_tokens, d_out, lse, delta)
    return (*(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _check_arrays(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise UserError(f"{name} has shape {x.shape}; attention needs (batch, length, heads, width): 4 axes.")
        if 0 in x.shape:
            raise UserError(f"{name} has shape {x.shape}; attention needs at least one entry on every axis.")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise UserError(
                f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; attention needs one floating dtype: cast them."
            )
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]):
        raise UserError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit: the batch is common to all three, length and heads "
            "to k and v."
        )
    if q.shape[3] != k.shape[3]:
        raise UserError(f"q has head_dim {q.shape[3]} and k {k.shape[3]}; they need the same.")
    if q.shape[2] % k.shape[2]:
        raise UserError(
            f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads: change one of them."
        )


def _check_tokens(q, k, q_tokens, k_tokens) -> tuple[Tokens, Tokens]:
    if q.shape[1] != k.shape[1] and (q_tokens is None or k_tokens is None):
        raise UserError(
            f"{q.shape[1]} queries and {k.shape[1]} keys: with different lengths pass both q_tokens and k_tokens."
        )
    q_tokens = Tokens.arange(*q.shape[:2]) if q_tokens is None else q_tokens
    k_tokens = q_tokens if k_tokens is None else k_tokens
    for name, tokens, x in (("q_tokens", q_tokens, q), ("k_tokens", k_tokens, k)):
        if tokens.shape != x.shape[:2]:
            raise UserError(f"{name} have shape {tokens.shape}; the arrays need (batch, length) = {x.shape[:2]}.")
    return q_tokens, k_tokens


def _choose(implementation, parallel) -> str:
    candidates = (implementation,) if isinstance(implementation, str) else tuple(implementation or ("xla",))
    reasons = []
    for name in candidates:
        if name not in IMPLEMENTATIONS:
            raise UserError(f"implementation {name!r} is not known; there are {', '.join(map(repr, IMPLEMENTATIONS))}.")
        if name.startswith("pallas"):
            reasons.append(f"{name!r} has no kernel yet")
        elif name == "reference" and parallel is not None:
            reasons.append(f"'reference' is for one device and does not run under {type(parallel).__name__}")
        else:
            _log_choice(name, type(parallel).__name__ if parallel else "one device", jax.default_backend())
            return name
    raise NotImplementedError(f"{'; '.join(reasons)}: use implementation=None or 'xla'.")


@functools.cache
def _log_choice(name: str, parallel: str, backend: str) -> None:
    logging.getLogger(__name__).info("attention on %s: %s, %s", backend, name, parallel)
