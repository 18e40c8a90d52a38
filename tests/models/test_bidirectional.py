"""Layers that see both sides: equal to their float64 truth, documents, several devices, and what they cannot do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from oracles import bidirectional as oracle
from striate import Tokens, UserError
from striate.lib.decoding.cache import Carried
from striate.lib.decoding.sample import generate
from striate.lib.layouts import ZigZag
from striate.lib.parallel import StateScan
from striate.models.bidirectional import VSSD, Efficient
from striate.models.decoder import DecoderConfig, Layer
from striate.models.mixers import MIXERS
from suites.attention import mesh
from suites.linear import documents

LENGTH, WIDTH = 32, 3
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 2, "out_deviation": 1.0, "dtype": "float32"}
LAYERS = {
    name: MIXERS[name].module(**SIZES, **MIXERS[name].options)
    for name in ("hydra", "vssd", "efficient", "lightnet_both", "flow_both")
}
LAYERS["vssd, divided"] = VSSD(**SIZES, taps=3, normalise=True)
TRUTHS = {name: getattr(oracle, name) for name in LAYERS if hasattr(oracle, name)}
TRUTHS["vssd, divided"] = functools.partial(oracle.vssd, normalise=True)
every_layer = pytest.mark.parametrize("name", LAYERS)


def given(seed=0):
    """(x, document, cotangent)."""
    rng = np.random.default_rng(seed)
    x, d_out = rng.normal(size=(2, 2, LENGTH, WIDTH)).astype(np.float32)
    return x, documents(np.random.default_rng(3), 2, LENGTH), d_out


@functools.cache
def parameters(layer, seed=0):
    """Random, so that each of them has an effect."""
    boxed = jax.eval_shape(layer.init, jax.random.key(0), *given()[:1], *[Tokens.arange(2, LENGTH)] * 2)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(0.1, 0.5, x.shape)), nn.unbox(boxed)["params"])


def apply(layer, params, x, document):
    tokens = Tokens(position=0 * document, document=document)
    return layer.apply({"params": params}, x, tokens, tokens)[0]


@functools.partial(jax.jit, static_argnums=0)
def results(layer, params, x, document, d_out):
    """(out, gradients of the parameters and of x), of real tokens."""
    real = (document >= 0)[..., None]
    out, pull = jax.vjp(lambda params, x: jnp.where(real, apply(layer, params, x, document), 0), params, x)
    return out, pull(d_out)


@every_layer
def test_outputs_and_gradients_are_those_of_the_truth(name):
    (x, document, d_out), params = given(), parameters(LAYERS[name])
    out, gradients = results(LAYERS[name], params, x, document, d_out)
    real = (document >= 0)[..., None]

    def true(params, x):
        return np.where(real, TRUTHS[name](params, x, document), 0)

    arrays = jax.tree.map(np.float64, (params, x))
    np.testing.assert_allclose(out, true(*arrays), rtol=1e-4, atol=1e-5 * abs(true(*arrays)).max())
    leaves, structure = jax.tree.flatten(arrays)
    for place, gradient in enumerate(jax.tree.leaves(gradients)):
        # Along one direction in each array: a truth of all numbers would take minutes.
        step = 1e-6 * np.random.default_rng(place).normal(size=gradient.shape)
        ends = [structure.unflatten([*leaves[:place], leaves[place] + s, *leaves[place + 1 :]]) for s in (step, -step)]
        want = (d_out * (true(*ends[0]) - true(*ends[1]))).sum() / 2e-6
        size = max(np.linalg.norm(gradient) * np.linalg.norm(step) / 1e-6, 0.1)  # what cancels is 0 but for rounding
        np.testing.assert_allclose((gradient * step).sum() / 1e-6, want, rtol=1e-4, atol=2e-5 * size)


@every_layer
def test_a_document_changes_no_bit_of_another_and_padding_none_at_all(name):
    (x, document, d_out), params = given(), parameters(LAYERS[name])
    before, (_, d_before) = results(LAYERS[name], params, x, document, d_out)
    for edited in (document == 2, document == -1):
        assert edited.any() and not edited.all()
        after, (_, d_after) = results(
            LAYERS[name], params, np.where(edited[..., None], given(1)[0], x), document, d_out
        )
        np.testing.assert_array_equal(np.asarray(before)[~edited], np.asarray(after)[~edited])
        np.testing.assert_array_equal(np.asarray(d_before)[~edited], np.asarray(d_after)[~edited])
    np.testing.assert_array_equal(np.asarray(d_before)[document == -1], 0)


def test_hydra_with_both_directions_alike_turns_with_its_input():
    (x, document, d_out), layer = given(), LAYERS["hydra"]
    params, heads, channels = jax.tree.map(np.array, parameters(layer)), 2, 4  # of a group; of a key beside its query
    params["in"][:, :, heads + 2 :] = params["in"][:, :, heads : heads + 2]
    params["step_back"] = params["step"]
    params["taps"] += params["taps"][::-1]
    for name in ("taps", "taps_bias"):
        taps = params[name].reshape(-1, 2, 12)
        taps[:, :, -channels:] = taps[:, :, -2 * channels : -channels]
    out, _ = results(layer, params, x, document, d_out)
    turned, _ = results(layer, params, x[:, ::-1], document[:, ::-1], d_out)
    np.testing.assert_allclose(turned[:, ::-1], out, rtol=1e-5, atol=1e-5)
    assert abs(turned - out).max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("name", ["hydra", "vssd"])
def test_over_a_sharded_sequence_in_its_order(name):
    (*arrays, d_out), layer = given(), LAYERS[name]
    there = layer.clone(parallel=StateScan(mesh(sequence=4)))
    want = results(layer, parameters(layer), *arrays, d_out)
    for x, y in zip(*map(jax.tree.leaves, (results(there, parameters(layer), *arrays, d_out), want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * abs(y).max())
    elsewhere = layer.clone(parallel=StateScan(mesh(sequence=4), layout=ZigZag(4)))
    with pytest.raises(UserError, match=r"under ZigZag\(.*restore the order"):
        apply(elsewhere, parameters(layer), *arrays)


@pytest.mark.parametrize("layer", [Efficient(**SIZES), VSSD(**SIZES)], ids=["efficient", "vssd, no convolution"])
def test_sums_take_tokens_in_any_order_over_any_devices(layer):
    (x, document, d_out), order = given(), np.random.default_rng(2).permutation(LENGTH)
    place = NamedSharding(mesh(sequence=8), P(None, "sequence"))
    arrays = [jax.device_put(array[:, order], place) for array in (x, document, d_out)]
    out, (_, d_x) = results(layer, parameters(layer), *arrays)
    want, (_, d_want) = results(layer, parameters(layer), x, document, d_out)
    np.testing.assert_allclose(out, want[:, order], rtol=1e-5, atol=1e-5 * abs(want).max())
    np.testing.assert_allclose(d_x, d_want[:, order], rtol=1e-5, atol=1e-5 * abs(d_want).max())


def test_a_model_of_the_next_token_refuses_them():
    config = DecoderConfig(pattern=(Layer(), Layer(mixer="hydra")))
    assert config.sees_later == ("hydra",) and DecoderConfig().sees_later == ()
    with pytest.raises(UserError, match="'hydra' sees later tokens, and the objective is the next token"):
        generate(config, {}, [65], 4)


def test_they_cannot_go_on_from_a_past():
    layer = LAYERS["efficient"]
    tokens = Tokens.arange(2, LENGTH)
    with pytest.raises(UserError, match="Efficient sees later tokens"):
        layer.apply({"params": parameters(layer)}, given()[0], tokens, tokens, Carried(None, None))
