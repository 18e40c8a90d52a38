"""Scores of layers: named by text, learned where they are, the same in any token order and while decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from striate.lib.errors import UserError
from striate.lib.layouts import Striped
from striate.lib.tokens import Tokens
from striate.models.decoder import Decoder, DecoderConfig, Layer, empty_cache
from striate.models.scores import parse

TEXTS = {
    "softcap(20.0)": (),
    "alibi()": (),
    "alibi(learned=True)": ("alibi_slopes",),
    "compose(softcap(20.0), t5_bias(8, max_distance=20), sink_logit())": ("t5_bias", "sink_logit"),
    "compose(temperature(1.5), signed(), power(0.5, 0.1))": ("temperature", "power", "power_slope"),
    "sigmoid(-2.0)": ("sigmoid_bias",),
}
INPUTS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 24)), jnp.int32)
TOKENS, NGRAMS = Tokens.arange(2, 24), jnp.zeros((2, 24, 0), jnp.int32)


def decoder(text: str):
    """(the model, random parameters: what is learned starts where it has no effect)."""
    layers = Layer(position="NoPE()", score=text), Layer()
    model = Decoder(DecoderConfig(40, 16, 2, heads=4, kv_heads=2, head_dim=4, hidden=24, pattern=layers))
    params = nn.unbox(model.init(jax.random.key(0), INPUTS, TOKENS, NGRAMS))["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: x + jnp.float32(rng.normal(0, 0.1, x.shape)), params)


@pytest.mark.parametrize("text", TEXTS)
def test_it_is_learned_and_is_the_same_in_any_order(text):
    model, params = decoder(text)

    def hidden(params, inputs, tokens):
        return model.apply({"params": params}, inputs, tokens, NGRAMS)

    gradient = jax.grad(lambda x: (hidden(x, INPUTS, TOKENS) ** 3).sum())(params)["layers"]["layer_0"]["attention"]
    assert set(gradient) == {"qkv", "out", "q_norm", "k_norm", *TEXTS[text]}
    assert all((np.abs(gradient[name]).max(axis=0) > 0).all(axis=-1).all() for name in TEXTS[text])
    layout = Striped(4, 2)
    permuted = layout.restore(hidden(params, *layout.permute((INPUTS, TOKENS))))
    np.testing.assert_allclose(permuted, hidden(params, INPUTS, TOKENS), atol=1e-5)


@pytest.mark.parametrize("text", ["compose(softcap(20.0), alibi(), sink_logit())"])
def test_decoding_in_chunks_is_the_whole_pass(text):
    model, params = decoder(text)
    whole = model.apply({"params": params}, INPUTS, TOKENS, NGRAMS)
    cache, parts = empty_cache(model.config, 2, 24), []
    for start, stop in ((0, 10), (10, 11), (11, 24)):
        now = jax.tree.map(lambda x: x[:, start:stop], (INPUTS, TOKENS, NGRAMS))  # noqa: B023
        part, cache = model.apply({"params": params}, *now, cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("softcp(3.0)", r"no softcp \(did you mean softcap\?\), there are plain, softcap"),
        ("softcap()", "missing a required argument: 'cap'"),
        ("softcap", "softcap is no call"),
        ("softcap(", "cannot be read"),
    ],
)
def test_text_that_is_no_score_is_answered(text, answer):
    with pytest.raises(UserError, match=answer):
        parse(text)
