"""A bank of vectors that is the same for all tokens: every token reads it by itself, and none sees another."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def read_bank(x_BTE: jax.Array, bank_SE: jax.Array, *, chunk: int = 1024) -> jax.Array:
    """softmax(x M^T / sqrt(E)) M: softmax attention whose keys and values are the bank M.

    Weights exist for `chunk` tokens of every row at a time, and are computed again in the backward pass.

    Args:
      x_BTE: (batch, length, width), a floating dtype.
      bank_SE: (slots, width).

    Returns:
      (batch, length, width) in the dtype of x; the softmax is float32.

    Source: Acharya 2025 (Gated Associative Memory), whose scores are not scaled: they saturate as the bank grows.
    """
    (batch, length, width), wide = x_BTE.shape, jnp.promote_types(x_BTE.dtype, jnp.float32)

    @jax.checkpoint
    def read(x_BCE):
        scores_BCS = jnp.einsum("bce,se->bcs", x_BCE, bank_SE, preferred_element_type=wide) * width**-0.5
        return jnp.einsum("bcs,se->bce", jax.nn.softmax(scores_BCS).astype(x_BCE.dtype), bank_SE)

    # Tokens so many apart are read together: devices that hold intervals of the sequence have a share of each time.
    times = max(-(-length // chunk), 1)
    whole = length - length % times
    parts = x_BTE[:, :whole].reshape(batch, -1, times, width)
    out = jax.lax.map(read, parts.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3).reshape(batch, whole, width)
    return out if whole == length else jnp.concatenate([out, read(x_BTE[:, whole:])], axis=1)
