"""Mixers that are linear recurrences, as layers: projections, the member of the family, a norm and a gate.

| mixer | layer of |
|---|---|
| lightning | TransNormer (Qin et al. 2024, Lightning Attention-2): features silu, a fixed decay for each head |
| gated_linear | Mamba-2's recurrence (Dao and Gu 2024) behind a short convolution: a decay for each token |
| gated_delta | Gated DeltaNet (Yang et al. 2025): the delta rule with a decay for each token |
| lightnet | LightNet (Qin et al. 2024): a running softmax in every channel of the keys |
| latte | Latte (Dolga et al. 2024), causal: the same, queries being a softmax over the latents of a head |
| second_order, asymmetric | HLA and AHLA (Zhang et al. 2025) |
| flow | Flowformer (Wu et al. 2022), causal |
| gated_lru | Griffin's recurrent block (De et al. 2024): one number a channel |

All keep documents apart, run over a sharded sequence by `parallel.recurrence`, and decode from states instead of keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib import linear_variants as variants
from striate.lib.convolution import short_convolution
from striate.lib.decoding.cache import Carried
from striate.lib.linear_attention import linear_attention
from striate.lib.parallel.state_scan import RecurrenceParallel
from striate.lib.tokens import Tokens
from striate.models.layers import RMSNorm, queries_keys_values, weight


class Recurrent(nn.Module):
    """What the layers share; a subclass mixes.

    Attributes:
      taps: of a short convolution over queries, keys and values; 0 for none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    out_deviation: float
    dtype: str
    implementation: str | None = None
    parallel: RecurrenceParallel | None = None
    taps: int = 0

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: Carried | None = None):
        """Goes on from `past`, when given.

        Args:
          x_BTE: activations (batch, length, width).
          tokens: Tokens of `x_BTE`, in the order that `parallel` is for; the order of the sequence without one.
          k_tokens: not read; attention does.

        Returns:
          (output (batch, length, width), what to go on from after `tokens`).
        """
        past = Carried(None, None) if past is None else past
        heads, tail = self.convolved(self.projected(x_BTE), tokens, past.tail)
        how = {"tokens": tokens, "initial_state": past.state, "return_state": True, "parallel": self.parallel}
        out_BTHD, state = self.mix(x_BTE, *heads, **how, implementation=self.implementation)
        out = weight(
            self, "out", (*out_BTHD.shape[2:], x_BTE.shape[2]), ("heads", "head_dim", "embed"), self.out_deviation
        )
        return jnp.einsum("bthd,hde->bte", self.gated(x_BTE, out_BTHD), out), Carried(state, tail)

    def mix(self, x_BTE, q_BTHD, k_BTKD, v_BTKD, **how) -> tuple[jax.Array, Any]:
        """(out (B, T, H, D), the state after)."""
        raise NotImplementedError

    def projected(self, x_BTE) -> tuple[jax.Array, ...]:
        """What is mixed, each of all heads or of the key/value heads."""
        return queries_keys_values(self, x_BTE)

    def convolved(self, heads, tokens, tail):
        """silu of a short convolution of what is mixed, where the layer has one, and its Tail."""
        if not self.taps:
            return heads, None
        x_BTKC = jnp.concatenate([x.reshape(*x.shape[:2], self.kv_heads, -1) for x in heads], axis=3)
        shape = self.taps, *x_BTKC.shape[2:]
        taps = weight(self, "taps", shape, (None, "kv_heads", None), self.taps**-0.5).reshape(self.taps, -1)
        y, tail = self.convolution(x_BTKC.reshape(*x_BTKC.shape[:2], -1), taps, tokens, tail)
        y = self.activated(y).reshape(x_BTKC.shape)
        widths = [x.shape[2] * x.shape[3] // self.kv_heads for x in heads]
        parts = jnp.split(y, list(itertools.accumulate(widths[:-1])), axis=3)
        return tuple(part.reshape(x.shape) for part, x in zip(parts, heads, strict=True)), tail

    def convolution(self, x_BTC, taps_WC, tokens, tail):
        how = {"tokens": tokens, "initial_tail": tail, "return_tail": True, "parallel": self.parallel}
        return short_convolution(x_BTC, taps_WC, **how)

    def activated(self, y):
        """What comes of the short convolution."""
        return nn.silu(y)

    def gated(self, x_BTE, out_BTHD):
        """The norm of each head, times a gate of low rank (Qin et al. 2024, TransNormerLLM, section 3.1.3)."""
        (width, rank), shape = (x_BTE.shape[2], self.head_dim), out_BTHD.shape[2:]
        down = weight(self, "gate_down", (width, rank), ("embed", None), width**-0.5)
        up = weight(self, "gate_up", (rank, *shape), (None, "heads", "head_dim"), rank**-0.5)
        gate_BTHD = jnp.einsum("btr,rhd->bthd", x_BTE @ down, up)
        return RMSNorm(name="out_norm")(out_BTHD) * nn.sigmoid(gate_BTHD)

    def per_head(self, x_BTE, name: str, axes=("embed", "kv_heads"), deviation: float | None = None):
        """A number for each token and key/value head, float32."""
        width = x_BTE.shape[2]
        kernel = weight(self, name, (width, self.kv_heads), axes, deviation or width**-0.5)
        return (x_BTE @ kernel).astype(jnp.float32)

    def log_decay(self, x_BTE):
        """-rate softplus(x W + b), of Mamba-2: rates 1 to 16, steps 1e-3 to 1e-1 at the start; and the steps."""

        def partitioned(draw):
            return nn.with_logical_partitioning(draw, ("kv_heads",))

        shape = (self.kv_heads,), jnp.float32
        log_rate = self.param("log_rate", partitioned(log_uniform(1.0, 16.0, jnp.log)), *shape)
        bias = self.param("step_bias", partitioned(step_bias), *shape)
        step_BTK = nn.softplus(self.per_head(x_BTE, "step") + bias[None, None])
        return -jnp.exp(log_rate)[None, None] * step_BTK, step_BTK


def log_uniform(low: float, high: float, invert: Callable) -> Callable:
    """Draws invert(u), the logarithm of u uniform."""

    def draw(key, shape, dtype):
        return invert(jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(low), jnp.log(high))))

    return draw


step_bias = log_uniform(1e-3, 1e-1, lambda step: jnp.log(jnp.expm1(step)))
"""Draws what softplus makes a step of Mamba-2 from."""


class Lightning(Recurrent):
    def mix(self, x_BTE, q, k, v, **how):
        log_decay = variants.lightning_log_decay(self.kv_heads)
        return linear_attention(nn.silu(q), nn.silu(k), nn.silu(v), log_decay=log_decay, **how)


class GatedLinear(Recurrent):
    def mix(self, x_BTE, q, k, v, **how):
        log_decay, step_BTK = self.log_decay(x_BTE)
        v = (step_BTK[..., None] * v).astype(v.dtype)
        return linear_attention(q, k, v, log_decay=log_decay, **how)


class GatedDelta(Recurrent):
    def mix(self, x_BTE, q, k, v, **how):
        q, k, beta = variants.unit(q), variants.unit(k), nn.sigmoid(self.per_head(x_BTE, "strength"))
        return linear_attention(q, k, v, rule="delta", log_decay=self.log_decay(x_BTE)[0], beta=beta, **how)


class LightNet(Recurrent):
    def mix(self, x_BTE, q, k, v, **how):
        return variants.running_softmax(nn.silu(q), k, v, **how)


class Latte(Recurrent):
    def mix(self, x_BTE, q, k, v, **how):
        return variants.running_softmax(nn.softmax(q.astype(jnp.float32)).astype(q.dtype), k, v, **how)


class HigherOrder(Recurrent):
    order: str = "second"

    def mix(self, x_BTE, q, k, v, **how):
        return variants.higher_order(variants.unit(q), variants.unit(k), v, order=self.order, **how)


class Flow(Recurrent):
    def activated(self, y):
        return y  # its own features, sigmoids, need both signs

    def mix(self, x_BTE, q, k, v, **how):
        return variants.flow(q, k, v, **how)


class GatedLRU(Recurrent):
    """The channels of all values are the units; queries and keys make their gates."""

    def mix(self, x_BTE, q, k, v, **how):
        (batch, length, heads, _), radius = q.shape, (0.9, 0.999)

        def draw(key, shape, dtype):
            # Uniform in the square of the radius a^(1/8) (De et al. 2024, appendix A); softplus(rate) is -log radius.
            square = jax.random.uniform(key, shape, dtype, radius[0] ** 2, radius[1] ** 2)
            return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))

        initialise = nn.with_logical_partitioning(draw, ("heads", "head_dim"))
        rate = 8 * nn.softplus(self.param("rate", initialise, (heads, self.head_dim), jnp.float32))
        u, gate = (jnp.repeat(x, heads // self.kv_heads, axis=2) for x in (v, k))
        flat = ((x.reshape(batch, length, -1)) for x in (u, nn.sigmoid(gate), nn.sigmoid(q)))
        how.pop("implementation")  # whose heads would be as many as there are channels: a scan serves better
        out, state = variants.gated_lru(*flat, rate.reshape(-1), **how)
        return out.reshape(q.shape), state
