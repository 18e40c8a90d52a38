"""Layers: thin Linen shells that own the parameters; what they compute are the pure functions of the library.

Parameters are float32 masters with logical axis names; `dtype` is the dtype of the products. Norms are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib import masks
from striate.lib.attention import Parallel, attention
from striate.lib.decoding.cache import KeyValues
from striate.lib.errors import UserError
from striate.lib.masks import Mask
from striate.lib.positions import Position
from striate.lib.tokens import Tokens
from striate.models.scores import parse as parse_score


class Blend(NamedTuple):
    """What a mixer returns to move the residual stream towards a value, where others return what is added to it."""

    value: jax.Array
    gate: jax.Array  # 0, where nothing changes, to 1

    def onto(self, x: jax.Array) -> jax.Array:
        return x + self.gate * (self.value - x)


def rms_norm(x: jax.Array, gain: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / rms(x) * gain over the last axis, computed in float32, in the dtype of `x` (Zhang and Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale * jnp.broadcast_to(gain, x.shape)).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020)."""
    return nn.silu(gate) * up


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], deviation: float):
    """A float32 parameter, drawn normal, in the dtype of the module and ready to be used.

    The axis "embed" cuts a parameter at rest only: it is gathered here, so that activations need not move.
    """
    initialise = nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)
    value = module.param(name, initialise, shape, jnp.float32).astype(module.dtype)
    return nn.with_logical_constraint(value, tuple(None if axis == "embed" else axis for axis in axes))


def queries_keys_values(module: nn.Module, x_BTE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, T, H, D), (B, T, K, D), (B, T, K, D) for a module that has heads, kv_heads and head_dim."""
    return heads_and_groups(module, x_BTE, "qkv", 2)


def heads_and_groups(module: nn.Module, x_BTE: jax.Array, name: str, groups: int) -> tuple[jax.Array, ...]:
    """(B, T, H, D), and (B, T, K, D) so many times, for a module that has heads, kv_heads and head_dim.

    One product makes them all: its output axis is (kv_heads, group + groups), the `group` heads of a key/value head
    beside what there is one of, so that it is cut over key/value heads as a whole.
    """
    (batch, length, width), group = x_BTE.shape, module.heads // module.kv_heads
    shape = (width, module.kv_heads, group + groups, module.head_dim)
    kernel = weight(module, name, shape, ("embed", "kv_heads", None, "head_dim"), width**-0.5)
    out_BTKGD = jnp.einsum("bte,ekgd->btkgd", x_BTE, kernel)
    heads_BTHD = out_BTKGD[:, :, :, :group].reshape(batch, length, module.heads, module.head_dim)
    return heads_BTHD, *(out_BTKGD[:, :, :, group + place] for place in range(groups))


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain, which is whole on every device."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initialise = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        return rms_norm(x, self.param("gain", initialise, (x.shape[-1],), jnp.float32))


class Attention(nn.Module):
    """Softmax attention with grouped queries, and queries and keys that are normalised and told their positions."""

    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask
    position: Position
    score: str
    out_deviation: float
    dtype: str
    implementation: str | None = None
    parallel: Parallel | None = None

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: KeyValues | None = None):
        """Attends to `past` (B, S, K, D), when given, and to the tokens themselves.

        Args:
          x_BTE: activations (batch, length, width).
          tokens: Tokens of `x_BTE`, in any order.
          k_tokens: Tokens of the keys: of the past followed by `tokens`.
          past: keys and values of earlier tokens; padding among them is hidden whatever the mask.

        Returns:
          (output (batch, length, width), the keys and values of `tokens`).
        """
        out_BTHD, new = self.mix(*queries_keys_values(self, x_BTE), tokens, k_tokens, past)
        return self.output(out_BTHD, x_BTE.shape[2]), new

    def output(self, out_BTHD, width: int):
        """The projection back, (B, T, width)."""
        out = weight(
            self, "out", (self.heads, self.head_dim, width), ("heads", "head_dim", "embed"), self.out_deviation
        )
        return jnp.einsum("bthd,hde->bte", out_BTHD, out)

    def mix(self, q_BTHD, k_BTKD, v_BTKD, tokens: Tokens, k_tokens: Tokens, past):
        """(out (B, T, H, D), what to cache)."""
        q_BTHD = self.position.queries(RMSNorm(name="q_norm")(q_BTHD), tokens)
        k_BTKD = self.position.keys(RMSNorm(name="k_norm")(k_BTKD), tokens)
        new, mask = KeyValues(k_BTKD, v_BTKD), self.mask
        if past is not None:
            k_BTKD, v_BTKD = (jnp.concatenate([old, x], axis=1) for old, x in zip(past, new, strict=True))
            mask = mask & masks.key("document", low=0)
        how = {"score": parse_score(self.score)(self), "implementation": self.implementation, "parallel": self.parallel}
        return attention(q_BTHD, k_BTKD, v_BTKD, mask=mask, q_tokens=tokens, k_tokens=k_tokens, **how), new


class SwiGLU(nn.Module):
    """The gated feed-forward network, gate and up projections in one product."""

    hidden: int
    out_deviation: float
    dtype: str

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        width = x_BTE.shape[-1]
        gate_up = weight(self, "gate_up", (width, 2, self.hidden), ("embed", None, "mlp"), width**-0.5)
        gate_up_BT2F = jnp.einsum("bte,enf->btnf", x_BTE, gate_up)
        hidden_BTF = swiglu(gate_up_BT2F[:, :, 0], gate_up_BT2F[:, :, 1])
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "mlp"))
        down = weight(self, "down", (self.hidden, width), ("mlp", "embed"), self.out_deviation)
        return jnp.einsum("btf,fe->bte", hidden_BTF, down)


class PositionEmbedding(nn.Module):
    """Learned absolute positions (Devlin et al. 2019, section 3): adds the row of a table that the position names.

    Raises:
      UserError: positions that the table lacks, where they are known. In a compiled function, where they are not, such
        a position makes its token NaN, so that the first loss tells.
    """

    slots: int
    dtype: str
    deviation: float = 0.02

    @nn.compact
    def __call__(self, x_BTE: jax.Array, position_BT: jax.Array) -> jax.Array:
        if not isinstance(position_BT, jax.core.Tracer):
            least, greatest = position_BT.min(), position_BT.max()
            if least < 0 or greatest >= self.slots:
                raise UserError(
                    f"The table has rows for the positions 0 to {self.slots - 1} and got {least} to {greatest}: "
                    f"give it {max(greatest + 1, self.slots)} slots, and positions from 0 on."
                )
        table = weight(self, "table", (self.slots, x_BTE.shape[-1]), (None, "embed"), self.deviation)
        return x_BTE + table.at[position_BT].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class NgramEmbedding(nn.Module):
    """Hashed n-gram embeddings (Pagnoni et al. 2024, section 3.2.1): a table per order, side by side, projected."""

    buckets: int
    table_width: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, ids_BTO: jax.Array) -> jax.Array:
        orders = ids_BTO.shape[-1]
        initialise = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("ngram", "embed"))
        table = self.param("table", initialise, (orders * self.buckets, self.table_width), jnp.float32)
        # The ids go to where the columns of the table lie, and only what they name comes back: the table, and what is
        # larger, its gradient, is never whole on a device.
        ids_BTO = nn.with_logical_constraint(ids_BTO, ("copies", None, None))
        rows_BTO = ids_BTO + self.buckets * jnp.arange(orders, dtype=ids_BTO.dtype)[None, None]
        found_BTOF = nn.with_logical_constraint(table[rows_BTO], ("copies", None, None, "embed")).astype(self.dtype)
        found_BTOF = nn.with_logical_constraint(found_BTOF, ("batch", "length", None, None))
        shape = (orders * self.table_width, self.width)
        projection = weight(self, "projection", shape, (None, "embed"), shape[0] ** -0.5)
        return found_BTOF.reshape(*ids_BTO.shape[:2], shape[0]) @ projection
