"""Exact attention by cuDNN, through jax.nn: what a GPU without a kernel of ours runs where the mask allows it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from striate.lib import masks, scores
from striate.lib.scores import Score
from striate.lib.tiles import vary_alike
from striate.pallas_kernels.gpu.chips import capability


def attend(mask: masks.Mask, scale: float, q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKV: jax.Array) -> jax.Array:
    """(B, T, H, V) in the dtype of v, both passes by cuDNN, where `reason_against` finds none."""
    # Else the gradients of what does not vary over a mesh axis would not be summed over it.
    q, k, v = vary_alike((q_BTHD, k_BSKD, v_BSKV))
    how = expressed(mask, q_BTHD.shape[1])
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **how)


def expressed(mask: masks.Mask, length: int) -> dict | None:
    """The mask over natural tokens as keyword arguments of jax.nn.dot_product_attention; None if cuDNN has no such.

    A window is also said to be causal: to cuDNN its left end alone is no bound on the right (jax pull request 39576).
    """
    match mask:
        case masks.Constant(True):
            return {}
        case masks.Difference("position", "position", 0, None):
            return {"is_causal": True}
        case masks.Difference("position", "position", 0, int(left)):
            return {"is_causal": True, "local_window_size": (left, 0)} if left < length - 1 else {"is_causal": True}
    return None


def reason_against(mask, score: Score, q_BTHD, k_BSKD, v_BSKV, natural: bool, lse: bool) -> str | None:
    """Why cuDNN cannot attend here, if it cannot.

    Args:
      natural: whether the tokens are known to be those of Tokens.arange.
      lse: whether the log-sum-exp is asked for.
    """
    chip, (_, length, _, width) = capability(), q_BTHD.shape
    if chip is None:
        return "is for GPUs, and this program is not"
    if not _since_ampere(chip):
        return f"is for GPUs of compute capability 8.0 or more, and this one has {chip}"
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, and not {q_BTHD.dtype}"
    if lse:
        return "gives no log-sum-exp: that of jax has 16 bits and no gradient"
    if type(score) is not scores.Plain:
        return f"has the plain softmax, and not {type(score).__name__}"
    if not natural:
        return "takes tokens in natural order, and those that are given may have any"
    if expressed(mask, length) is None:
        return f"has causal() and windows back, and not {mask}"
    if width % 8 or (width > 128 and (width, chip) != (256, "9.0")):
        return f"takes a head_dim that 8 divides, up to 128, on H100 and H200 also 256, and not {width}"
    if v_BSKV.shape[3] != k_BSKD.shape[3]:
        return f"takes values as wide as keys, and not {v_BSKV.shape[3]} for {k_BSKD.shape[3]}"
    if length == 1:
        return "takes two tokens or more, and not one"
    return _refusal(width, q_BTHD.dtype)


def _since_ampere(chip: str) -> bool:
    major = chip.partition(".")[0]
    return major.isdecimal() and int(major) >= 8  # those of AMD have names


@functools.cache
def _refusal(width: int, dtype) -> str | None:
    """What jax says against cuDNN on this machine: that there is none, or that it is too old."""
    x = jax.ShapeDtypeStruct((1, 8, 1, width), dtype)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except (RuntimeError, ValueError) as error:
        return f"is refused by jax ({str(error).rstrip('.')})"
    return None
