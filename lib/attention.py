"""Exact attention: one front door, the reference that is the truth, and the choice of the implementation."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from striate.lib import cudnn, masks, scores
from striate.lib.blockwise import Blockwise
from striate.lib.errors import UserError
from striate.lib.scores import Score
from striate.lib.tiles import LOWEST, Task, Tiled, natural, vary_alike
from striate.lib.tokens import Tokens
from striate.pallas_kernels.gpu.chips import capability
from striate.pallas_kernels.tpu.chips import target

EXPERIMENTAL = "STRIATE_EXPERIMENTAL"  # variable of the environment: implementations, with commas, that may run untried
IMPLEMENTATIONS = ("reference", "xla", "cudnn", "pallas_tpu", "pallas_tpu_fused", "pallas_gpu")
# The programs of the kernels, on any device.
IMPLEMENTATIONS += ("pallas_tpu_interpret", "pallas_tpu_fused_interpret", "pallas_gpu_interpret")


class Parallel(Protocol):
    """How attention crosses devices: the two passes on global arrays. Immutable, so that it can be static."""

    def for_tokens(self, mask, q_tokens, k_tokens):
        """What is to be used for these Tokens: itself, or what their values, where known, let it leave out."""

    def forward(self, task, score, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens):
        """(out (B, T, H, V) in the dtype of v, lse float32 (B, T, H))."""

    def backward(self, task, score, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens, d_out, lse, delta):
        """(d_score, dq, dk, dv); lse and delta (B, T, H) as the algebra of lib/blockwise.py has them."""


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKV: jax.Array,
    *,
    mask: masks.Mask | None = None,
    score: Score | None = None,
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
      mask: a formula (striate.masks); None shows every pair. Where it has a switch per head, heads of one formula are
        computed together, and each formula skips what it hides.
      score: what becomes of a logit (striate.scores); None is the plain softmax.
      q_tokens: Tokens of the queries, (batch, length); None is Tokens.arange, where length == key length.
      k_tokens: Tokens of the keys; None is q_tokens, where length == key length.
      scale: factor of the logits; None is head_dim ** -0.5.
      implementation: None (best for the device), "reference", "xla", "pallas_tpu", or several to try in turn.
        "pallas_tpu_fused", with parallel=Ring(...), goes around the ring in one kernel. "pallas_gpu", for H100 and
        H200, is refused unless the environment lets it try. With "_interpret" after it, any of these runs anywhere.
        "cudnn", for GPUs, has causal masks and windows back over 16-bit arrays, where no Tokens are passed.
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
    mask, score = masks.everything() if mask is None else mask, scores.plain() if score is None else score
    check_arrays(q_BTHD, k_BSKD, v_BSKV)
    in_order = q_tokens is None and k_tokens is None
    q_tokens, k_tokens = check_tokens(q_BTHD, k_BSKD, q_tokens, k_tokens)
    check_language(mask, score, q_BTHD.shape[2], q_tokens, k_tokens)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v, tile_score = score.prepare(q_BTHD, k_BSKD, v_BSKV, scale)
    against_cudnn = functools.partial(cudnn.reason_against, mask, score, q, k, v, in_order, return_lse)
    form = choose(implementation, parallel, q_BTHD.dtype, against_cudnn)
    if form == "cudnn":
        out, lse = cudnn.attend(mask, scale, q, k, v), None
    elif form == "reference":
        out, lse = reference(mask, scale, tile_score, q, k, v, q_tokens, k_tokens)
    else:
        out, lse = _in_tiles(form, parallel, mask, scale, tile_score, q, k, v, q_tokens, k_tokens, in_order)
    out, lse = score.finish(out, lse)
    return (out, lse) if return_lse else out


def merge(*partials: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each of them.

    Args:
      partials: (out, lse) as `attention(..., return_lse=True)` gives them for the same queries and scale: out
        (..., value width) of one dtype, lse float32 (...). One that saw nothing has lse -inf.

    Returns:
      (out, lse): lse = log sum exp(lse_i), out = sum exp(lse_i - lse) out_i, merged in float32. The order does not
      matter; differentiable.

    Raises:
      UserError: nothing to merge, or shapes that do not agree.
    """
    shapes = {(out.shape, lse.shape) for out, lse in partials}
    if len(shapes) != 1 or any(out.shape[:-1] != lse.shape for out, lse in partials):
        raise UserError(
            f"merge got (out, lse) of shapes {sorted(shapes)}; it needs at least one pair, and all of the same shape: "
            "(..., width) and (...)."
        )
    lses = jnp.stack([lse for _, lse in partials])
    top = jax.lax.stop_gradient(jnp.maximum(lses.max(0), LOWEST))
    weights = jnp.exp(lses - top[None])
    total = weights.sum(0)
    safe = jnp.where(total > 0, total, 1.0)
    out = sum(weight[..., None] * out.astype(jnp.float32) for weight, (out, _) in zip(weights, partials, strict=True))
    lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
    return (out / safe[..., None]).astype(partials[0][0].dtype), lse


def reference(mask, scale, score, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens):
    """The dense form: quadratic memory, one line an equation. In float32 at least; float64 stays float64."""
    wide = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    heads, group = q_BTHD.shape[2], q_BTHD.shape[2] // k_BSKD.shape[2]
    q, k, v = (x.astype(wide) for x in (q_BTHD, jnp.repeat(k_BSKD, group, 2), jnp.repeat(v_BSKV, group, 2)))
    formulas = mask.for_heads(heads if mask.heads else 1)
    visible_BHTS = jnp.stack([formula.dense(q_tokens, k_tokens) for formula in formulas], axis=1)
    score = jax.tree.map(lambda x: x.reshape(1, heads, 1, 1, *x.shape[1:]) if x.ndim else x, score)
    query = {name: x[:, None, :, None] for name, x in q_tokens.fields().items()}
    key = {name: x[:, None, None, :] for name, x in k_tokens.fields().items()}
    logits, factor = score.tile(scale * jnp.einsum("bthd,bshd->bhts", q, k), query, key)
    logits = jnp.where(visible_BHTS, logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True, initial=LOWEST))
    weights = jnp.where(visible_BHTS, jnp.exp(logits - top), 0.0)
    total = weights.sum(-1)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse_BHT = jnp.where(seen, jnp.log(safe) + top[..., 0], -jnp.inf)
    share = 1 / safe if score.normalised else jnp.exp(jnp.where(seen, top[..., 0], 0.0))
    weights = (weights if factor is None else factor * weights) * share[..., None]
    return jnp.einsum("bhts,bshv->bthv", weights, v).astype(v_BSKV.dtype), lse_BHT.swapaxes(1, 2)


def _in_tiles(form: str, parallel, mask, scale, score, q, k, v, q_tokens, k_tokens, in_order: bool):
    score = jax.tree.map(lambda x: x.astype(jnp.float32), score)
    arrays = vary_alike((score, q, k, v, q_tokens.as_queries(), k_tokens))
    # From Tokens that are known before the program runs, as the natural ones are, a strategy finds what to leave out.
    natural = Tokens(np.arange(q.shape[1], dtype=np.int32)[None])
    known = (natural, natural) if in_order else (q_tokens, k_tokens)
    return _by_formula(parallel or Local(), Task(mask, scale, _tiled(form)), *arrays, known)


def _by_formula(parallel, task, score, q, k, v, q_tokens, k_tokens, known):
    """Heads that have the same formula are attended together, so that each formula skips what it hides."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    classes = task.mask.by_formula(heads)
    parts = []
    for formula, members in classes.items():
        chosen, task = parallel.for_tokens(formula, *known), task._replace(mask=formula)
        if len(classes) == 1:
            return _attend(chosen, task, score, q, k, v, q_tokens, k_tokens)
        kv_members = [head // group for head in members]
        if kv_members == [head for head in kv_members[::group] for _ in range(group)]:
            kv_members = kv_members[::group]  # whole groups: their keys are still not repeated
        taken = _heads(q, members), _heads(k, kv_members), _heads(v, kv_members)
        own = jax.tree.map(lambda x, members=members: _heads(x, members, axis=0) if x.ndim else x, score)
        parts.append(_attend(chosen, task, own, *taken, q_tokens, k_tokens))
    back = np.argsort([*itertools.chain(*classes.values())]).tolist()
    return tuple(_heads(jnp.concatenate(x, axis=2), back) for x in zip(*parts, strict=True))


def _heads(x, members: list[int], axis: int = 2):
    """The heads named, by runs: a slice has a cheaper gradient than a gather."""
    cuts = [0, *(i for i in range(1, len(members)) if members[i] != members[i - 1] + 1), len(members)]
    runs = [(members[start], members[stop - 1] + 1) for start, stop in itertools.pairwise(cuts)]
    return jnp.concatenate([jax.lax.slice_in_dim(x, *run, axis=axis) for run in runs], axis=axis)


@dataclass(frozen=True)
class Local:
    """Each device attends to what it holds."""

    def for_tokens(self, mask, q_tokens, k_tokens):
        return self

    def forward(self, task, score, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens):
        kv_heads, length = k_BSKD.shape[2], q_BTHD.shape[1]
        problem = task.plan_attend(q_BTHD, k_BSKD)
        q = problem.queries(score, q_BTHD, kv_heads)
        k, v = (problem.keys_or_values(x) for x in (k_BSKD, v_BSKV))
        sides = problem.sides(score, q_tokens, k_tokens)
        out, lse = problem.attend(score, q, k, v, *sides)
        return natural(out, length).astype(v_BSKV.dtype), natural(lse, length)

    def backward(self, task, score, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens, d_out, lse, delta):
        kv_heads, (length, keys) = k_BSKD.shape[2], (q_BTHD.shape[1], k_BSKD.shape[1])
        problem = task.plan(q_BTHD, k_BSKD)
        q, (d_out, lse, delta) = (
            problem.queries(score, q_BTHD, kv_heads),
            (problem.rows(x, kv_heads) for x in (d_out, lse, delta)),
        )
        k, v = (problem.keys_or_values(x) for x in (k_BSKD, v_BSKV))
        sides = problem.sides(score, q_tokens, k_tokens)
        dtype = task.gradients or k.dtype
        d_score, dq, dk, dv = problem.gradients(score, q, k, v, d_out, lse, delta, *sides, dtype)
        return d_score, natural(dq, length), dk[:, :, :keys].swapaxes(1, 2), dv[:, :, :keys].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(parallel, task, score, q, k, v, q_tokens, k_tokens):
    return parallel.forward(task, score, q, k, v, q_tokens, k_tokens)


def _attend_forward(parallel, task, score, q, k, v, q_tokens, k_tokens):
    out, lse = parallel.forward(task, score, q, k, v, q_tokens, k_tokens)
    # A remat policy that saves these two names recomputes no attention.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (score, q, k, v, q_tokens, k_tokens, out, lse)


def _attend_backward(parallel, task, saved, cotangents):
    score, q, k, v, q_tokens, k_tokens, out, lse = saved
    d_out, d_lse = cotangents
    d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0.0)
    if score.normalised:
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    else:
        delta, lse = -d_lse * jnp.exp(-jnp.where(jnp.isfinite(lse), lse, 0.0)), jnp.zeros_like(lse)
    gradients = parallel.backward(task, score, q, k, v, q_tokens, k_tokens, d_out, lse, delta)
    return (*jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, (score, q, k, v)), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def check_arrays(q, k, v) -> None:
    """Raises UserError for shapes or dtypes that do not fit together."""
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


def check_tokens(q, k, q_tokens, k_tokens) -> tuple[Tokens, Tokens]:
    """The Tokens of queries and keys, natural ones where none are given. Raises UserError where they do not fit."""
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


def check_language(mask, score, heads: int, q_tokens: Tokens, k_tokens: Tokens) -> None:
    """Raises UserError for what is no mask or no score, or reads a field that the Tokens do not have."""
    if not isinstance(mask, masks.Mask):
        raise UserError(
            f"mask is a {type(mask).__name__}; attention needs a formula over Tokens, such as masks.causal() or "
            "masks.parse(text)."
        )
    if not isinstance(score, Score):
        raise UserError(f"score is a {type(score).__name__}; attention needs one such as scores.softcap(50.0).")
    for formula in mask.by_formula(heads):
        formula.check(q_tokens, k_tokens)
    for tokens in (q_tokens, k_tokens):
        scores.check(score, heads, tokens)


def choose(
    implementation, parallel, dtype, against_cudnn: Callable[[], str | None] = lambda: "is for striate.attention alone"
) -> str:
    """The name of the first implementation that can run here. Raises NotImplementedError where there is none.

    `against_cudnn` says why that cannot run, if it cannot: what it takes is a matter of mask, score and shapes.
    """
    chip = target()
    best = ("pallas_tpu", "xla") if chip else ("cudnn", "xla") if capability() else ("xla",)
    reasons = []
    for name in (implementation,) if isinstance(implementation, str) else tuple(implementation or best):
        reason = _reason_against(name, parallel, dtype, chip, against_cudnn)
        if reason is None:
            where = type(parallel).__name__ if parallel else "one device"
            _log_choice(name, where, chip or jax.default_backend(), tuple(reasons))
            return name
        reasons.append(f"{name!r} {reason}")
    raise NotImplementedError(f"{'; '.join(reasons)}: use implementation=None or 'xla'.")


def _reason_against(name: str, parallel, dtype, chip: str | None, against_cudnn) -> str | None:
    """Why an implementation cannot run here, if it cannot."""
    if name not in IMPLEMENTATIONS:
        raise UserError(f"implementation {name!r} is not known; there are {', '.join(map(repr, IMPLEMENTATIONS))}.")
    if name == "pallas_gpu":
        return _reason_against_gpu(dtype)
    if name == "pallas_gpu_interpret" and jax.version.__version_info__ < (0, 12):
        return f"needs the interpreter of jax 0.12, and this is {jax.__version__}"
    if "fused" in name and not getattr(parallel, "rings", False):
        return "is for parallel=Ring(...)"
    if name in ("reference", "cudnn") and parallel is not None:
        return f"is for one device and does not run under {type(parallel).__name__}"
    if name == "cudnn":
        return against_cudnn()
    if name in ("pallas_tpu", "pallas_tpu_fused"):
        if chip is None:
            return f"is for TPUs, and this program is not ('{name}_interpret' runs anywhere)"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"takes bfloat16 and float32, and not {dtype}"
    return None


def _reason_against_gpu(dtype) -> str | None:
    available = capability()
    if available is None:
        return "is for GPUs, and this program is not ('pallas_gpu_interpret' runs anywhere)"
    if available != "9.0":
        return f"is for GPUs of compute capability 9.0 (H100, H200), and this one has {available}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, and not {dtype}"
    if "pallas_gpu" not in os.environ.get(EXPERIMENTAL, "").split(","):
        return f"has run on no GPU yet, and asks to be trusted by {EXPERIMENTAL}=pallas_gpu in the environment"
    return None


def _tiled(name: str) -> type[Tiled]:
    if name == "xla":
        return Blockwise
    # Imported when asked for: Pallas takes a moment.
    if "fused" in name:
        from striate.pallas_kernels.tpu.ring import Fused, FusedInterpreted

        return FusedInterpreted if name.endswith("interpret") else Fused
    if "gpu" in name:
        from striate.pallas_kernels.gpu.attention import Interpreted, Kernel

        return Interpreted if name == "pallas_gpu_interpret" else Kernel
    from striate.pallas_kernels.tpu.attention import Interpreted, Kernel

    return Interpreted if name == "pallas_tpu_interpret" else Kernel


@functools.cache
def _log_choice(name: str, parallel: str, backend: str, refused: tuple[str, ...]) -> None:
    logging.getLogger(__name__).info("attention on %s: %s", backend, "; ".join([f"{name}, {parallel}", *refused]))
