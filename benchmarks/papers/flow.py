"""Flow-Attention: sources that compete. Entropy of the weights of a query over the keys, in nats.

striate bench papers/flow

By construction, to both sides: 64 queries that all match one key strongly and 63 weakly. And of trained layers: both
have the same features (sigmoid) and a short convolution, and learn recall; the weights are those of the scored slots
over the tokens so far. Weights are what comes out for values that are the rows of an identity, made to sum to 1.

What competition gives a key is the same for all queries. Where keys are asked for as often as each other, as in recall,
it sharpens nothing, and its exponent is clipped at 1, which is its mean.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from _common import report, small, trained
from flax import linen as nn

from striate import Tokens, linear_attention
from striate.lib import linear_variants as variants
from striate.lib.noncausal import global_attention, global_flow
from striate.lib.training.data.tasks import Recall
from striate.models.decoder import Block, Decoder, Layer
from striate.models.mixers import MIXERS, TAPS, Kind
from striate.models.recurrent import Flow

STEPS = 1500  # both answer more than 0.999 of the slots then


class Probe(Flow):
    """Either layer; it also notes the entropy (B, T, H) of its weights."""

    attend: Callable = variants.flow

    def mix(self, x_BTE, q, k, v, **how):
        self.sow("intermediates", "entropy", entropy(functools.partial(self.attend, tokens=how["tokens"]), q, k))
        return self.attend(q, k, v, **how)


def plain(q, k, v, **how):
    return linear_attention(nn.sigmoid(q), nn.sigmoid(k), v, normalise=True, **how)


def entropy(attend, q, k):
    batch, length, heads, _ = k.shape
    weights = attend(q, k, jnp.broadcast_to(jnp.eye(length)[None, :, None], (batch, length, heads, length)))
    weights /= weights.sum(-1, keepdims=True)
    return -jax.scipy.special.xlogy(weights, weights).sum(-1)


def constructed(attend) -> float:
    """Of 64 alike queries; key 0 has their features, the others have other ones."""
    q = jnp.where(jnp.arange(32) < 4, 6.0, -6.0)
    k = jnp.broadcast_to(-q[None], (64, 32)).at[0].set(q)
    return float(entropy(attend, jnp.broadcast_to(q[None, None, None], (1, 64, 1, 32)), k[None, :, None]).mean())


def both_sides(q, k, v):
    q, k = nn.sigmoid(q), nn.sigmoid(k)
    return global_attention(q, k, v) / global_attention(q, k, jnp.ones_like(v[..., :1]))


def learned(attend) -> float:
    MIXERS["probe"], task = Kind(Probe, {**TAPS, "attend": attend}), Recall()
    config = small(task, Layer(mixer="probe"))
    params = trained(config, task, steps=STEPS)
    rows = jax.vmap(task.sample)(jax.random.split(jax.random.key(1), 256))
    x = Decoder(config).apply({"params": params}, rows.inputs, None, method="_embed")
    tokens, layer = Tokens.arange(*rows.inputs.shape), jax.tree.map(lambda x: x[0], params["layers"]["layer_0"])
    apply = functools.partial(Block(config, config.pattern[0]).apply, {"params": layer}, mutable="intermediates")
    _, noted = jax.jit(lambda x: apply(x, tokens, tokens, None))(x)
    (found,), weights = jax.tree.leaves(noted), rows.weights[:, :, None]
    return float((found * weights).sum() / weights.sum() / found.shape[-1])


def measure() -> dict[str, float]:
    return {
        "entropy without competition less with it, constructed": constructed(both_sides) - constructed(global_flow),
        "the same of trained layers": learned(plain) - learned(variants.flow),
    }


if __name__ == "__main__":
    report(__file__, measure)
