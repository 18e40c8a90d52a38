"""Memory as a gate: the layer is its definition, a converted decoder begins as the old one, adapters are trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from oracles import delta_product as oracle
from oracles.linear_variants import sigmoid
from striate.lib import masks, positions
from striate.lib.errors import UserError
from striate.lib.tokens import Tokens
from striate.models import lora
from striate.models.attentive import MemoryAsGate
from striate.models.conversion import convert, mag_at, with_mag
from striate.models.decoder import Decoder, DecoderConfig, Layer
from striate.models.layers import Attention
from suites.linear import documents

LENGTH, WIDTH = 24, 16
RNG = np.random.default_rng(0)
DOCUMENT = documents(RNG, 2, LENGTH)
TOKENS = Tokens(position=np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)), document=DOCUMENT)
X = RNG.normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 4, "score": "plain()", "out_deviation": 0.5, "dtype": "float32"}
SIZES |= {"mask": masks.parse("causal() & same('document')"), "position": positions.parse("Rope()")}
BASE, MIXED = Attention(**SIZES), MemoryAsGate(**SIZES)
PARAMS = nn.unbox(BASE.init(jax.random.key(0), X, TOKENS, TOKENS))["params"]
CONFIG = DecoderConfig(
    vocabulary=40, width=WIDTH, layers=4, heads=4, kv_heads=2, head_dim=4, hidden=24,
    pattern=(Layer(), Layer(mixer="lightning")),
)  # fmt: skip
IDS = jnp.asarray(RNG.integers(0, 40, (2, LENGTH)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params):
    return module.apply({"params": params}, X, TOKENS, TOKENS)[0]


def mixed(mag: float):
    return apply(MIXED, {**PARAMS, "mag": jnp.float32(mag)})


@functools.cache
def decoder():
    """Parameters of a decoder of CONFIG."""
    return nn.unbox(jax.jit(Decoder(CONFIG).init)(jax.random.key(0), IDS, TOKENS))["params"]


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params):
    return jnp.where(DOCUMENT[..., None] >= 0, Decoder(config).apply({"params": params}, IDS, TOKENS), 0)


class TestMemoryAsGate:
    def test_without_a_share_it_is_attention_bit_for_bit(self):
        np.testing.assert_array_equal(mixed(0.0), apply(BASE, PARAMS))

    def test_its_share_is_the_delta_product_of_the_same_projections(self):
        qkv = np.einsum("bte,ekgd->btkgd", np.float64(X), np.float64(PARAMS["qkv"]))
        q, k, v = qkv[:, :, :, :2].reshape(2, LENGTH, 4, 4), qkv[:, :, :, 2], qkv[:, :, :, 3]
        mean = oracle.mean_of_three(DOCUMENT, k.reshape(2, LENGTH, 8)).reshape(k.shape)
        keys = (x * sigmoid(x) / np.sqrt(((x * sigmoid(x)) ** 2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        beta = sigmoid(mean).mean(-1)
        out = oracle.delta_product(DOCUMENT, *keys, v / 2, beta, 0 * beta, 2, "derivative")
        out /= np.sqrt((out**2).mean((2, 3), keepdims=True) + 1e-6)
        want = np.einsum("bthd,hde->bte", out, np.float64(PARAMS["out"]))
        np.testing.assert_allclose(mixed(1.0), want, rtol=1e-5, atol=1e-4 * abs(want).max())

    def test_between_the_two_it_is_their_mean(self):
        mean = 0.75 * mixed(0.0) + 0.25 * mixed(1.0)
        np.testing.assert_allclose(mixed(0.25), mean, rtol=1e-5, atol=1e-6)

    def test_the_share_starts_as_it_is_set_and_is_not_learned(self):
        params = nn.unbox(MemoryAsGate(**SIZES, share=0.25).init(jax.random.key(0), X, TOKENS, TOKENS))["params"]
        assert params["mag"] == 0.25 and params.keys() == PARAMS.keys() | {"mag"}
        slopes = jax.jit(jax.grad(lambda params: (apply(MIXED, params) ** 2).sum()))(params)
        assert slopes.pop("mag") == 0
        assert all((x != 0).any() for x in jax.tree.leaves(slopes))


@pytest.mark.long
class TestConversion:
    def test_a_converted_decoder_begins_as_the_old_one_bit_for_bit(self):
        config, params = convert(CONFIG, decoder(), mag=0.0)
        assert [layer.mixer for layer in config.pattern] == ["tptt", "lightning"]
        fresh = jax.eval_shape(Decoder(config).init, jax.random.key(0), IDS, TOKENS)["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(fresh))
        np.testing.assert_array_equal(hidden(config, params), hidden(CONFIG, decoder()))
        assert abs(hidden(config, with_mag(params, 0.5)) - hidden(CONFIG, decoder())).max() > 0.1

    def test_adapters_change_nothing_until_they_are_trained_and_alone_are(self):
        adapters = lora.init(jax.random.key(1), decoder(), rank=2, names={"qkv": 1, "out": 2, "gate_up": 1})

        def loss(adapters):
            return (hidden(CONFIG, lora.merge(decoder(), adapters)) ** 3).sum()

        np.testing.assert_array_equal(hidden(CONFIG, lora.merge(decoder(), adapters)), hidden(CONFIG, decoder()))
        slopes = jax.jit(jax.grad(loss))(adapters)
        assert slopes.keys() == adapters.keys()
        for adapter in slopes.values():
            assert not (adapter.a != 0).any() and (adapter.b != 0).any((1, 2)).all()


def test_the_share_is_set_everywhere_and_rises():
    params = {"layers": {"tptt": {"mag": jnp.zeros(3), "out": jnp.ones((3, 2))}}}
    set_ = with_mag(params, jnp.float32(0.5))["layers"]["tptt"]
    np.testing.assert_array_equal(set_["mag"], [0.5] * 3)
    np.testing.assert_array_equal(set_["out"], 1)
    np.testing.assert_allclose([mag_at(step, 50, 1.0) for step in (0, 10, 50, 80)], [0, 0.2, 1, 1])


def test_an_update_is_a_product_of_two_matrices_in_every_layer():
    shapes = {"qkv": (3, 6, 2, 3, 4), "out": (3, 2, 5, 6), "gain": (3, 6)}
    params = {"layers": {"attention": {name: jnp.ones(shape) for name, shape in shapes.items()}}}
    adapters = lora.init(jax.random.key(0), params, rank=2)
    assert {path.split("/")[-1] for path in adapters} == {"qkv", "out"}
    adapters = {
        path: lora.Adapter(a, jax.random.normal(jax.random.key(1), b.shape)) for path, (a, b) in adapters.items()
    }
    found = lora.merge(params, adapters, alpha=3.0)["layers"]["attention"]
    a, b = (np.asarray(x) for x in adapters["layers/attention/qkv"])
    want = 1 + 1.5 * np.einsum("lir,lrkgd->likgd", a, b.reshape(3, 2, 2, 3, 4))
    np.testing.assert_allclose(found["qkv"], want, rtol=1e-5, atol=1e-5)
    a, b = (np.asarray(x) for x in adapters["layers/attention/out"])
    want = 1 + 1.5 * np.einsum("lhdr,lro->lhdo", a.reshape(3, 2, 5, 2), b)
    np.testing.assert_allclose(found["out"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["gain"], 1)
    with pytest.raises(UserError, match="No parameter is named 'weights'"):
        lora.init(jax.random.key(0), params, names={"weights": 1})
