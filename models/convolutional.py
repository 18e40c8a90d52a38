"""Mixers that are convolutions and what reads them, as layers.

| mixer | layer of |
|---|---|
| chela | CHELA (Liu et al. 2024): MEGA's gates and a linear attention behind a short and a long convolution |
| gam | Gated Associative Memory (Acharya 2025): a convolution over 3 tokens and a bank of vectors, each with a gate |

Both keep documents apart, run over a sharded sequence by `parallel.recurrence`, and go on from tails and states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib.bank import read_bank
from striate.lib.convolution import long_convolution, multiscale_taps, short_convolution
from striate.lib.decoding.cache import Carried
from striate.lib.linear_attention import linear_attention
from striate.lib.parallel.state_scan import RecurrenceParallel
from striate.lib.tokens import Tokens
from striate.models.layers import Blend, RMSNorm, weight


class Convolutional(nn.Module):
    """What the layers share: the sizes that a decoder gives, and products."""

    heads: int
    kv_heads: int
    head_dim: int
    out_deviation: float
    dtype: str
    parallel: RecurrenceParallel | None = None

    def affine(self, name: str, x_BTE: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        """x W + b, (B, T, *shape)."""
        width = x_BTE.shape[2]
        kernel = weight(self, name, (width, *shape), ("embed", *axes), width**-0.5)
        return jnp.tensordot(x_BTE, kernel, 1) + weight(self, f"{name}_bias", shape, axes, 0.0)[None, None]


class Chela(Convolutional):
    """A step of the residual stream x towards y. With x' the normalised x and c = long(silu(short(x'))),

        u, z, r, h = sigmoid, silu, silu and nothing of c W + b
        q, k = z * (1 + gain) + bias, for each head            v = silu(x' W + b)
        o = the norm of each head of linear attention(q, k, v)
        y = silu(h + (o * r) W)                                out = x + u (y - x)

    Values and r are twice as wide as x; z, queries and keys have head_dim.

    Attributes:
      taps: of the short convolution; 1 for none.
      segment: parameters of the long one for each channel and scale, see `multiscale_taps`.
      scales: of those; it has segment x 2^(scales - 1) taps, and decoding keeps as many tokens.
    """

    taps: int = 4
    segment: int = 16
    scales: int = 5

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: Carried | None = None):
        """(Blend, what to go on from); arguments are those of `Recurrent` in models/recurrent.py."""
        past = Carried(None, (None, None)) if past is None else past
        width, value_width = x_BTE.shape[2], 2 * x_BTE.shape[2] // self.heads
        c_BTE, tails = self.convolved(x_BTE, tokens, past.tail)
        u_h = self.affine("update", c_BTE, (2, width), (None, "mlp"))
        z_BTD = nn.silu(self.affine("shared", c_BTE, (self.head_dim,), ("head_dim",)))
        r_BTHV = nn.silu(self.affine("reset", c_BTE, (self.heads, value_width), ("heads", None)))
        v_BTKV = nn.silu(self.affine("values", x_BTE, (self.kv_heads, value_width), ("kv_heads", None)))
        q_BTHD = self.per_head("q", z_BTD, self.heads, "heads")
        k_BTKD = self.per_head("k", z_BTD, self.kv_heads, "kv_heads")
        how = {"tokens": tokens, "initial_state": past.state, "return_state": True, "parallel": self.parallel}
        o_BTHV, state = linear_attention(q_BTHD, k_BTKD, v_BTKV, **how)
        out = weight(self, "out", (*r_BTHV.shape[2:], width), ("heads", None, "mlp"), (2 * width) ** -0.5)
        read_BTE = jnp.einsum("bthv,hve->bte", RMSNorm(name="out_norm")(o_BTHV) * r_BTHV, out)
        return Blend(nn.silu(u_h[:, :, 1] + read_BTE), nn.sigmoid(u_h[:, :, 0])), Carried(state, tails)

    def convolved(self, x_BTE, tokens, tails):
        """long(silu(short(x))), and the Tails of both."""
        width, how = x_BTE.shape[2], {"tokens": tokens, "return_tail": True, "parallel": self.parallel}
        taps = weight(self, "taps", (self.taps, width), (None, "embed"), self.taps**-0.5)
        y_BTE, short = short_convolution(x_BTE, taps, initial_tail=tails[0], **how)
        segments = weight(self, "segments", (self.scales, self.segment, width), (None, None, "embed"), 0.02)
        taps = multiscale_taps(segments).at[0].add(1.0)  # the token itself: among random taps it would be lost
        y_BTE, long = long_convolution(nn.silu(y_BTE), taps, initial_tail=tails[1], **how)
        return y_BTE, (short, long)

    def per_head(self, name: str, z_BTD, heads: int, axis: str):
        """z * (1 + gain) + bias, for each head."""
        gain, bias = (
            weight(self, f"{name}_{part}", (heads, self.head_dim), (axis, "head_dim"), deviation)
            for part, deviation in (("gain", 0.02), ("bias", 0.0))
        )
        return z_BTD[:, :, None] * (1 + gain)[None, None] + bias[None, None]


class GatedMemory(Convolutional):
    """sigmoid(a) (short convolution) + sigmoid(b) (what a bank gives), with a, b = x W + b.

    Only the convolution mixes tokens: a stack of n layers reads n (taps - 1) tokens back, and no farther.

    Attributes:
      taps: of the convolution.
      slots: vectors of the bank.
    """

    taps: int = 3
    slots: int = 512

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: Carried | None = None):
        """(output, what to go on from); arguments are those of `Recurrent` in models/recurrent.py."""
        width = x_BTE.shape[2]
        taps = weight(self, "taps", (self.taps, width), (None, "embed"), self.taps**-0.5)
        how = {"tokens": tokens, "initial_tail": past and past.tail, "return_tail": True, "parallel": self.parallel}
        local_BTE, tail = short_convolution(x_BTE, taps, **how)
        local_BTE += weight(self, "taps_bias", (width,), ("embed",), 0.0)[None, None]
        bank = weight(self, "bank", (self.slots, width), (None, "embed"), (2 / (self.slots + width)) ** 0.5)
        gates = nn.sigmoid(self.affine("gates", x_BTE, (2, width), (None, "mlp")))
        read_BTE = read_bank(x_BTE, bank, chunk=1024 * (self.parallel.shards if self.parallel else 1))
        return gates[:, :, 0] * local_BTE + gates[:, :, 1] * read_BTE, Carried(None, tail)
