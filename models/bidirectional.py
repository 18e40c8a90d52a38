"""Mixers that see both sides: a token reads all of its document, so that no model of the next token is made of them.

| mixer | layer of |
|---|---|
| hydra | Hydra (Hwang et al. 2024): a recurrence over what is before a token, one over what is after, a diagonal |
| vssd | VSSD (Shi et al. 2024), over a sequence: one state, which all tokens write and all read |
| efficient | Efficient Attention (Shen et al. 2021); Latte (Dolga et al. 2024) to both sides is the same function |
| lightnet_both, flow_both | LightNet (Qin et al. 2024) and Flowformer (Wu et al. 2022), to both sides |

All keep documents apart. Hydra and convolutions need the order of the sequence; the sums of the others need none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib import noncausal
from striate.lib.errors import UserError
from striate.lib.recurrence import divided
from striate.models.layers import RMSNorm, heads_and_groups, weight
from striate.models.recurrent import Recurrent, step_bias


class Bidirectional(Recurrent):
    """What the layers share; a subclass mixes.

    Attributes:
      taps: of a centred convolution over what is mixed, an odd number; 0 for none.
    """

    def __call__(self, x_BTE, tokens, k_tokens, past=None):
        """As Recurrent.

        Raises:
          UserError: a past.
        """
        if past is not None:
            raise UserError(
                f"{type(self).__name__} sees later tokens, so that every new one changes what it gave before: it "
                "cannot go on from a past. Give it whole documents, or take a causal mixer."
            )
        return super().__call__(x_BTE, tokens, k_tokens)

    def convolution(self, x_BTC, taps_WC, tokens, tail):
        initialise = nn.with_logical_partitioning(nn.initializers.zeros, ("kv_heads",))
        bias = self.param("taps_bias", initialise, x_BTC.shape[2:], jnp.float32).astype(x_BTC.dtype)
        y = noncausal.centred_convolution(x_BTC, taps_WC, tokens=tokens, parallel=self.parallel)
        return y + bias[None, None], None


class StateSpace(Bidirectional):
    """Values of all heads, keys and queries of the groups; steps of Mamba-2, and a gate of full rank."""

    def steps(self, x_BTE, *names: str):
        """softplus(x W + b), float32 (B, T, H), of each W named and one b."""
        shape, axes = (x_BTE.shape[2], self.heads), ("embed", "heads")
        bias = self.per_value_head("step_bias", step_bias)
        kernels = (weight(self, name, shape, axes, x_BTE.shape[2] ** -0.5) for name in names)
        return [nn.softplus((x_BTE @ kernel).astype(jnp.float32) + bias) for kernel in kernels]

    def per_value_head(self, name: str, initialise):
        """A parameter (1, 1, H)."""
        initialise = nn.with_logical_partitioning(initialise, ("heads",))
        return self.param(name, initialise, (self.heads,), jnp.float32)[None, None]

    def gate(self, x_BTE):
        return heads_and_groups(self, x_BTE, "gate", 0)[0]

    def normed(self, y_BTHD):
        """Over the channels of all heads."""
        return RMSNorm(name="out_norm")(y_BTHD.reshape(*y_BTHD.shape[:2], -1)).reshape(y_BTHD.shape)


class Hydra(StateSpace):
    def projected(self, x_BTE):
        return heads_and_groups(self, x_BTE, "in", 4)

    def mix(self, x_BTE, v_BTHD, *keys_queries, tokens, parallel, implementation, **_):
        k, q, k_back, q_back = (x.repeat(self.heads // self.kv_heads, axis=2) for x in keys_queries)
        rate = jnp.exp(self.per_value_head("log_rate", nn.initializers.zeros))
        step, step_back = self.steps(x_BTE, "step", "step_back")

        def direction(q, k, step):
            return noncausal.Direction(q, (step[..., None] * k).astype(k.dtype), -rate * step)

        shape = *v_BTHD.shape[2:], self.heads
        own = weight(self, "own", shape, ("heads", "head_dim", None), (shape[0] * shape[1]) ** -0.5)
        diagonal = jnp.einsum("bthd,hdg->btg", v_BTHD, own) + self.per_value_head("own_bias", nn.initializers.ones)
        how = {"tokens": tokens, "parallel": parallel, "implementation": implementation}
        both = direction(q, k, step), direction(q_back, k_back, step_back)
        return noncausal.quasiseparable(*both, v_BTHD, diagonal, **how), None

    def gated(self, x_BTE, y_BTHD):
        return self.normed(y_BTHD) * nn.silu(self.gate(x_BTE))


class VSSD(StateSpace):
    """Convolutions are those of a sequence, where the paper has an image.

    Attributes:
      normalise: whether the state is divided by the sum of the strengths with which it was written, which keeps it
        from growing with the length.
    """

    normalise: bool = False

    def projected(self, x_BTE):
        return heads_and_groups(self, x_BTE, "in", 2)

    def mix(self, x_BTE, v_BTHD, k_BTKD, q_BTKD, *, tokens, **_):
        (step,) = self.steps(x_BTE, "step")
        strength = step * jnp.exp(self.per_value_head("log_rate", _log_of_1_to_16))
        in_groups = *k_BTKD.shape[:3], -1
        written = (strength[..., None] * v_BTHD).reshape(in_groups)
        out = noncausal.global_attention(q_BTKD, k_BTKD, written, tokens=tokens).reshape(v_BTHD.shape)
        if self.normalise:
            one = jnp.ones_like(k_BTKD[..., :1])
            total = noncausal.global_attention(one, one, strength.reshape(in_groups), tokens=tokens)
            out = divided(out, total.reshape(strength.shape))
        return out + self.per_value_head("skip", nn.initializers.ones)[..., None] * v_BTHD, None

    def gated(self, x_BTE, y_BTHD):
        mean = y_BTHD.mean((2, 3), keepdims=True)  # what is left to RMSNorm is a norm of the deviation
        return self.normed(y_BTHD - mean).astype(x_BTE.dtype) * self.gate(x_BTE)


def _log_of_1_to_16(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


class Efficient(Bidirectional):
    def mix(self, x_BTE, q, k, v, *, tokens, **_):
        q = nn.softmax(q.astype(jnp.float32)).astype(q.dtype)
        return noncausal.global_softmax(q, k, v, tokens=tokens), None

    def gated(self, x_BTE, out_BTHD):
        return out_BTHD


class LightNetBoth(Bidirectional):
    def mix(self, x_BTE, q, k, v, *, tokens, **_):
        return noncausal.global_softmax(nn.silu(q), k, v, tokens=tokens), None


class FlowBoth(Bidirectional):
    def mix(self, x_BTE, q, k, v, *, tokens, **_):
        return noncausal.global_flow(q, k, v, tokens=tokens), None
