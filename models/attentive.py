"""A mixer that is softmax attention with a recurrence beside it: "tptt" is TPTT (Furfaro 2025)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib.decoding.cache import Both, Carried
from striate.lib.delta_product import delta_product, mean_of_three
from striate.lib.linear_variants import unit
from striate.lib.parallel.state_scan import RecurrenceParallel
from striate.lib.tokens import Tokens
from striate.models.layers import Attention, rms_norm


class MemoryAsGate(Attention):
    """Softmax attention and a delta product of the same queries, keys and values, before one output projection.

        out = ((1 - mu) softmax attention + mu delta product) W

    Queries and keys of the product are silu of the projections, of length 1, without positions; strengths are read from
    the keys of three tokens; its output has a norm of 1 over all heads. Parameters are those of `Attention`, and "mag",
    which is mu: it is set, not learned (striate.models.conversion).

    Attributes:
      recurrence: how the recurrence crosses devices; `parallel` says so for attention.
      order, trick: of `delta_product`.
      share: mu at the start.
    """

    recurrence: RecurrenceParallel | None = None
    order: int = 2
    trick: str = "derivative"
    share: float = 0.5

    def mix(self, q_BTHD, k_BTKD, v_BTKD, tokens: Tokens, k_tokens: Tokens, past: Both | None):
        attended, carried = past or (None, Carried(None, None))
        out_BTHD, attended = super().mix(q_BTHD, k_BTKD, v_BTKD, tokens, k_tokens, attended)
        product_BTHD, carried = self.product(q_BTHD, k_BTKD, v_BTKD, tokens, carried)
        initialise = nn.with_logical_partitioning(nn.initializers.constant(self.share), ())
        mu = jax.lax.stop_gradient(self.param("mag", initialise, (), jnp.float32)).astype(out_BTHD.dtype)
        return (1 - mu) * out_BTHD + mu * product_BTHD, Both(attended, carried)

    def product(self, q_BTHD, k_BTKD, v_BTKD, tokens: Tokens, past: Carried):
        """(out (B, T, H, D), what to go on from)."""
        q, k = unit(nn.silu(q_BTHD)), unit(nn.silu(k_BTKD))
        beta, tail = self.strength(k_BTKD, tokens, past.tail)
        how = {"tokens": tokens, "initial_state": past.state, "return_state": True, "parallel": self.recurrence}
        how |= {"order": self.order, "trick": self.trick}
        out_BTHD, state = delta_product(q, k, v_BTKD * self.head_dim**-0.5, beta, **how)
        merged = rms_norm(out_BTHD.reshape(*out_BTHD.shape[:2], -1), 1.0)
        return merged.reshape(out_BTHD.shape), Carried(state, tail)

    def strength(self, k_BTKD, tokens: Tokens, tail):
        """(one number for each token and key/value head, the mean over its channels, float32; the Tail)."""
        flat = k_BTKD.reshape(*k_BTKD.shape[:2], -1)
        mean, tail = mean_of_three(flat, tokens=tokens, initial_tail=tail, parallel=self.recurrence)
        return nn.sigmoid(mean.astype(jnp.float32)).reshape(k_BTKD.shape).mean(-1), tail
