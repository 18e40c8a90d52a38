"""CHELA and Gated Associative Memory: their equations in float64, how far they see, and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import striate
from oracles import derivatives
from striate import Tokens, masks
from striate.lib.bank import read_bank
from striate.lib.convolution import multiscale_taps
from striate.models.convolutional import Chela, GatedMemory
from striate.models.decoder import Block, DecoderConfig, Layer

SIZES = {"heads": 2, "kv_heads": 1, "head_dim": 3, "out_deviation": 0.1, "dtype": "float32"}
NO_CONVOLUTION = {"taps": 1, "segment": 1, "scales": 1}
CONVOLUTIONS = {"taps": 3, "segment": 2, "scales": 3}
WIDTH = 4


def drawn(module, length: int, batch: int = 1):
    """(parameters, all of them random; normalised activations)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, length, WIDTH)).astype(np.float32)
    tokens = Tokens.arange(batch, length)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, tokens, tokens))["params"]
    return jax.tree.map(lambda x: 0.7 * rng.normal(size=x.shape).astype(np.float32), shapes), x


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, past=None):
    tokens = Tokens.arange(*x.shape[:2])
    return module.apply({"params": params}, x, tokens, tokens, past)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def convolved(x_BTE, taps_WE):
    y = np.zeros_like(x_BTE)
    for t in range(x_BTE.shape[1]):
        for distance in range(min(len(taps_WE), t + 1)):
            y[:, t] += taps_WE[distance] * x_BTE[:, t - distance]
    return y


def mega(p, c, x, stream):
    """MEGA's gates around a linear attention of queries and keys from c, values from x; onto the stream, in float64."""
    (u, h), z = np.moveaxis(np.einsum("bte,enf->btnf", c, p["update"]) + p["update_bias"], 2, 0), c @ p["shared"]
    z = silu(z + p["shared_bias"])
    r = silu(np.einsum("bte,ehv->bthv", c, p["reset"]) + p["reset_bias"])
    v = silu(np.einsum("bte,ekv->btkv", x, p["values"]) + p["values_bias"])
    q, k = (z[:, :, None] * (1 + p[f"{name}_gain"]) + p[f"{name}_bias"] for name in "qk")
    o = np.zeros_like(r)
    for b, t, head in np.ndindex(o.shape[:3]):
        key_head = head * k.shape[2] // q.shape[2]
        for s in range(t + 1):
            o[b, t, head] += (q[b, t, head] @ k[b, s, key_head]) * v[b, s, key_head]
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * p["out_norm"]["gain"]
    y = silu(h + np.einsum("bthv,hve->bte", o * r, p["out"]))
    return stream + sigmoid(u) * (y - stream)


@pytest.mark.parametrize("options", [NO_CONVOLUTION, CONVOLUTIONS], ids=["identity", "convolutions"])
def test_chela_is_megas_gate_around_linear_attention(options):
    module = Chela(**SIZES, **options)
    params, x = drawn(module, 12)
    if options is NO_CONVOLUTION:
        params |= {"taps": np.ones_like(params["taps"]), "segments": 0 * params["segments"]}
    stream, d_out = np.random.default_rng(1).normal(size=(2, *x.shape)).astype(np.float32)
    leaves, structure = jax.tree.flatten(params)

    def oracle(x, stream, *leaves):
        p = jax.tree.unflatten(structure, leaves)
        if options is NO_CONVOLUTION:
            return mega(p, silu(x), x, stream)
        with jax.enable_x64(True):
            taps = np.array(multiscale_taps(jnp.asarray(p["segments"])))
        taps[0] += 1
        return mega(p, convolved(silu(convolved(x, p["taps"])), taps), x, stream)

    @jax.jit
    def results(x, stream, *leaves):
        def run(x, stream, *leaves):
            return apply(module, jax.tree.unflatten(structure, leaves), x)[0].onto(stream)

        out, pull = jax.vjp(run, x, stream, *leaves)
        return out, pull(d_out)

    out, gradients = results(x, stream, *leaves)
    np.testing.assert_allclose(out, oracle(*map(np.float64, (x, stream, *leaves))), rtol=1e-5, atol=1e-5)
    fixed = [leaf is params["taps"] or leaf is params["segments"] for leaf in leaves]
    for got, want, skip in zip(
        gradients, derivatives.gradients(oracle, (x, stream, *leaves), d_out), [False, False, *fixed], strict=True
    ):
        if not (skip and options is NO_CONVOLUTION):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * abs(want).max())


def test_a_closed_gate_is_the_identity():
    config = DecoderConfig(width=WIDTH, heads=2, kv_heads=1, head_dim=4, hidden=8)
    block = Block(config, Layer(mixer="chela"))
    x, tokens = np.random.default_rng(0).normal(size=(2, 9, WIDTH)).astype(np.float32), Tokens.arange(2, 9)
    params = nn.unbox(jax.jit(lambda key: block.init(key, x, tokens, tokens, None))(jax.random.key(0)))["params"]
    params["feed_forward"]["down"] *= 0
    run = jax.jit(lambda params: block.apply({"params": params}, x, tokens, tokens, None)[0])
    assert abs(run(params) - x).max() > 0.1
    params["chela"]["update_bias"] = params["chela"]["update_bias"].at[0].set(-1e4)
    np.testing.assert_array_equal(run(params), x)


def test_six_layers_of_gam_see_twelve_tokens_back():
    length, module = 20, GatedMemory(**SIZES, slots=8)
    params, x = drawn(module, length)

    def stack(x):
        for _ in range(6):
            x += apply(module, params, x)[0]
        return x[0]

    reached = (jax.jit(jax.jacobian(stack))(x)[:, :, 0] != 0).any((1, 3))
    ahead = np.arange(length)[:, None] - np.arange(length)[None]
    np.testing.assert_array_equal(reached, (ahead >= 0) & (ahead <= 12))


def test_gam_is_its_equations():
    module = GatedMemory(**SIZES, slots=8)
    params, x = drawn(module, 9)
    p, x = jax.tree.map(np.float64, params), np.float64(x)
    weights = np.exp(x @ p["bank"].T / WIDTH**0.5)
    read = weights / weights.sum(-1, keepdims=True) @ p["bank"]
    a, b = np.moveaxis(np.einsum("bte,enf->btnf", x, p["gates"]) + p["gates_bias"], 2, 0)
    true = sigmoid(a) * (convolved(x, p["taps"]) + p["taps_bias"]) + sigmoid(b) * read
    np.testing.assert_allclose(apply(module, params, np.float32(x))[0], true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [15, 16])
def test_the_bank_is_attention_to_keys_and_values_that_are_constant(length):
    rng = np.random.default_rng(0)
    x, bank, d_out = (rng.normal(size=shape).astype(np.float32) for shape in ((2, length, 8), (24, 8), (2, length, 8)))

    def attend(x, bank):
        keys = jnp.broadcast_to(bank[None, :, None], (2, 24, 1, 8))
        tokens = {"q_tokens": Tokens.arange(2, length), "k_tokens": Tokens.arange(2, 24)}
        how = {"mask": masks.everything(), **tokens, "implementation": "reference"}
        return striate.attention(x[:, :, None], keys, keys, **how)[:, :, 0]

    def results(run):
        out, pull = jax.jit(lambda *arrays: jax.vjp(run, *arrays))(x, bank)
        return out, *pull(d_out)

    for got, want in zip(results(lambda *arrays: read_bank(*arrays, chunk=5)), results(attend), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_weights_of_the_bank_do_not_exist_at_once():
    def temporary(chunk: int) -> int:
        x, bank = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4096, 8), (512, 8)))
        gradients = jax.grad(lambda *arrays: (read_bank(*arrays, chunk=chunk) ** 2).sum(), (0, 1))
        return jax.jit(gradients).lower(x, bank).compile().memory_analysis().temp_size_in_bytes

    assert temporary(128) < temporary(4096) / 8


@pytest.mark.parametrize(
    "module", [Chela(**SIZES, **CONVOLUTIONS), GatedMemory(**SIZES, slots=8)], ids=["chela", "gam"]
)
def test_token_by_token_is_all_at_once(module):
    params, x = drawn(module, 20, batch=2)
    out, _ = apply(module, params, x)
    first, past = apply(module, params, x[:, :1])

    def step(past, x):
        out, past = apply(module, params, x[:, None], past)
        return past, out

    _, later = jax.lax.scan(step, past, x.swapaxes(0, 1)[1:])
    for whole, one, others in zip(*map(jax.tree.leaves, (out, first, later)), strict=True):
        parts = np.concatenate([one, np.moveaxis(others[:, :, 0], 0, 1)], axis=1)
        np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6 if isinstance(module, GatedMemory) else 1e-5)
