"""Positions that enter through queries and keys: read from Tokens, so that any token order gives the same result."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from striate.lib.errors import UserError


def rope(x_BTHD: jax.Array, position_BT: jax.Array, theta: float = 10_000.0) -> jax.Array:
    """Rotary position embedding, halves form: pair (x[d], x[d + D/2]) turns by position * theta^(-2d/D).

    Args:
      x_BTHD: queries or keys, (batch, length, heads, head_dim), head_dim even.
      position_BT: int32, (batch, length).
      theta: base of the frequencies.

    Returns:
      The rotated array, in the shape and dtype of `x_BTHD`; angles are float32.

    Raises:
      UserError: head_dim is odd.

    Source: Su et al. 2021 (RoFormer), section 3.2.
    """
    half, odd = divmod(x_BTHD.shape[-1], 2)
    if odd:
        raise UserError(f"rope turns pairs, so head_dim is even; got {x_BTHD.shape[-1]}: use one more or one less.")
    frequency_D = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1D = position_BT[:, :, None, None].astype(jnp.float32) * frequency_D[None, None, None]
    cos, sin = jnp.cos(angle_BT1D), jnp.sin(angle_BT1D)
    low, high = x_BTHD[..., :half].astype(jnp.float32), x_BTHD[..., half:].astype(jnp.float32)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BTHD.dtype)
