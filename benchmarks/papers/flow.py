"""Flow-Attention: sources that compete. Entropy of the weights of trained layers, with conservation and without.

striate bench papers/flow

Both layers have the same features (sigmoid) and a short convolution, and learn recall. The weights are those of the
scored slots over the tokens so far: what comes out for values that are the rows of an identity, made to sum to 1.
"""

import functools

import jax
import jax.numpy as jnp
from _common import report, small, trained
from flax import linen as nn

from striate import Tokens, linear_attention
from striate.lib import linear_variants as variants
from striate.lib.training.data.tasks import Recall
from striate.models.decoder import Block, Decoder, Layer
from striate.models.mixers import MIXERS, TAPS, Kind
from striate.models.recurrent import Flow


class Probe(Flow):
    """Either layer; it also notes the entropy (B, T, H) of its weights."""

    conserved: bool = True

    def attend(self, q, k, v, **how):
        if self.conserved:
            return variants.flow(q, k, v, **how)
        return linear_attention(nn.sigmoid(q), nn.sigmoid(k), v, normalise=True, **how)

    def mix(self, x_BTE, q, k, v, **how):
        batch, length, heads, _ = k.shape
        eye = jnp.broadcast_to(jnp.eye(length)[None, :, None], (batch, length, heads, length))
        weights = self.attend(q, k, eye, tokens=how["tokens"])
        weights /= weights.sum(-1, keepdims=True)
        self.sow("intermediates", "entropy", -jax.scipy.special.xlogy(weights, weights).sum(-1))
        return self.attend(q, k, v, **how)


def entropy(conserved: bool) -> float:
    name, task = f"probe {conserved}", Recall()
    MIXERS[name] = Kind(Probe, {**TAPS, "conserved": conserved})
    config = small(task, Layer(mixer=name))
    params = trained(config, task)
    rows = jax.vmap(task.sample)(jax.random.split(jax.random.key(1), 256))
    x, tokens = (
        Decoder(config).apply({"params": params}, rows.inputs, None, method="_embed"),
        Tokens.arange(*rows.inputs.shape),
    )
    layer = jax.tree.map(lambda x: x[0], params["layers"]["layer_0"])
    apply = functools.partial(Block(config, config.pattern[0]).apply, {"params": layer}, mutable="intermediates")
    _, noted = jax.jit(lambda x: apply(x, tokens, tokens, None))(x)
    (found,), weights = jax.tree.leaves(noted), rows.weights[:, :, None]
    return float((found * weights).sum() / weights.sum() / found.shape[-1])


def measure() -> dict[str, float]:
    return {"entropy of weights without conservation, less that with it, nats": entropy(False) - entropy(True)}


if __name__ == "__main__":
    report(__file__, measure)
