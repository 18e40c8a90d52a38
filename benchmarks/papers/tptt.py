"""TPTT: values that are overwritten, by the delta rule and by a sum; a small softmax model of text, converted.

striate bench papers/tptt

The text is that of Python's standard library. A converted model is trained by adapters alone while the share of its
delta product rises to 1. It is printed too what the adapters reach where that share stays 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import accuracy, fit, report, small
from flax import linen as nn

from striate import Tokens, linear_attention
from striate.lib.training.data.corpus import standard_library
from striate.lib.training.data.tasks import Overwrite
from striate.models import lora
from striate.models.conversion import convert, mag_at, with_mag
from striate.models.decoder import Decoder, DecoderConfig, Layer
from striate.models.mixers import MIXERS, TAPS, Kind
from striate.models.recurrent import Recurrent

LENGTH, BATCH, STEPS, ADAPTED, RISE = 128, 16, 1000, 600, 100


class Ungated(Recurrent):
    """Behind the same short convolution a sum that nothing ever leaves."""

    def mix(self, x_BTE, q, k, v, **how):
        return linear_attention(q, k, v, **how)


MIXERS["ungated"] = Kind(Ungated, TAPS)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """(bytes to train on, 8 million at most; bytes that are held out)."""
    corpus = standard_library(held_out=0.02)
    parts = (b"".join(document.read() for document in documents) for documents in (corpus.train, corpus.held_out))
    return tuple(np.frombuffer(part[:8_000_000], np.uint8) for part in parts)


def rows(text, starts):
    """int32 (rows, LENGTH + 1)."""
    return jnp.asarray(text)[starts[:, None] + jnp.arange(LENGTH + 1)[None]].astype(jnp.int32)


def loss(config: DecoderConfig, params, ids):
    """Nats a byte."""
    model, inputs = Decoder(config), ids[:, :-1]
    hidden = model.apply({"params": params}, inputs, Tokens.arange(*inputs.shape))
    logits = model.apply({"params": params}, hidden, method="logits")
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def drawn(config: DecoderConfig, text, params, key):
    """The loss of a batch."""
    return loss(config, params, rows(text, jax.random.randint(key, (BATCH,), 0, len(text) - LENGTH)))


def adapted(config: DecoderConfig, text, params, mag: float):
    """The parameters, of which adapters alone were trained while mu rose to `mag`."""

    def at(state):
        return with_mag(lora.merge(params, state["adapters"]), mag_at(state["step"], RISE, mag))

    # Of rank 8 each for queries, keys and values, which one product makes, and for the output.
    adapters = lora.init(jax.random.key(2), params, 24, {"qkv": 1}) | lora.init(
        jax.random.key(3), params, 8, {"out": 2}
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.03, ADAPTED // 20, ADAPTED, 6e-4)
    learn = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    count = optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates))
    update = optax.partition({"learn": learn, "count": count}, {"adapters": "learn", "step": "count"})
    start, key = {"adapters": adapters, "step": jnp.zeros(())}, jax.random.key(4)
    return at(fit(lambda state, key: drawn(config, text, at(state), key), start, ADAPTED, 0.0, key, update))


def conversion() -> dict[str, float]:
    """Held-out losses: of a softmax model, of its adapters alone, and converted to the delta product alone."""
    text, held_out = texts()
    softmax = DecoderConfig(vocabulary=256, width=96, layers=2, heads=4, kv_heads=2, head_dim=24, hidden=256)
    first = jnp.zeros((1, LENGTH), jnp.int32), Tokens.arange(1, LENGTH)
    params = nn.unbox(jax.jit(Decoder(softmax).init)(jax.random.key(0), *first))["params"]
    params = fit(lambda params, key: drawn(softmax, text, params, key), params, STEPS, 3e-3, jax.random.key(1))
    config, begun = convert(softmax, params)
    models = {"softmax": (softmax, params)}
    models["adapters alone"] = config, adapted(config, text, begun, 0.0)
    models["converted"] = config, adapted(config, text, begun, 1.0)
    # The first 512 are those by which rates, ranks and numbers of steps were chosen.
    fresh = rows(held_out, jnp.arange(0, len(held_out) - LENGTH, LENGTH)[512:1536])
    return {name: float(jax.jit(loss, static_argnums=0)(*model, fresh)) for name, model in models.items()}


def measure() -> dict[str, float]:
    task, losses = Overwrite(), conversion()
    print("nats a byte:", ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
    return {
        "overwritten values that the delta rule gets right": accuracy(small(task, Layer(mixer="gated_delta")), task),
        "the same of a sum without decay": accuracy(small(task, Layer(mixer="ungated")), task),
        "loss after conversion, over that of softmax": losses["converted"] / losses["softmax"],
    }


if __name__ == "__main__":
    report(__file__, measure)
