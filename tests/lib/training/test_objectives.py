"""The chunked cross-entropy: value and gradient of the naive one, in less memory, and without moving the sequence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from striate.lib.training.objectives import token_losses

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 64, 16, 24
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
AXES = ("data", "fsdp", "sequence", "tensor")


def example(batch=BATCH, length=LENGTH, vocabulary=VOCABULARY, seed=0):
    """(hidden, embedding, targets, weights); a third of the weights are 0."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0, 1, (batch, length)) * (rng.uniform(size=(batch, length)) > 1 / 3)
    return (
        jnp.float32(rng.normal(size=(batch, length, WIDTH))),
        jnp.float32(rng.normal(size=(vocabulary, WIDTH))),
        jnp.int32(rng.integers(0, vocabulary, (batch, length))),
        jnp.float32(weights),
    )


def truth(hidden, embedding, targets, weights):
    """(losses (B, T), gradient of hidden, gradient of embedding) of the weighted sum, float64."""
    hidden, embedding, weights = (np.asarray(x, np.float64) for x in (hidden, embedding, weights))
    logits = hidden @ embedding.T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hit = np.eye(len(embedding))[targets]
    d_logits = weights[..., None] * (p - hit)
    return -np.log((p * hit).sum(-1)), d_logits @ embedding, np.einsum("btv,bte->ve", d_logits, hidden)


def value_and_gradients(chunk, sharding=None):
    def loss(hidden, embedding, targets, weights):
        return (weights * token_losses(hidden, embedding, targets, chunk, sharding)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def naive(hidden, embedding, targets, weights):
    log_p = jax.nn.log_softmax(jnp.einsum("bte,ve->btv", hidden, embedding))
    return -(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]).sum()


def check(got, arrays):
    total, (d_hidden, d_embedding) = got
    losses, true_d_hidden, true_d_embedding = truth(*arrays)
    np.testing.assert_allclose(total, (np.float64(arrays[3]) * losses).sum(), rtol=1e-6)
    np.testing.assert_allclose(d_hidden, true_d_hidden, atol=2e-6)
    np.testing.assert_allclose(d_embedding, true_d_embedding, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 48, 1000])
def test_value_and_gradients_are_those_of_the_truth(chunk):
    arrays = example()
    check(value_and_gradients(chunk)(*arrays), arrays)
    np.testing.assert_allclose(token_losses(*arrays[:3], chunk), truth(*arrays)[0], rtol=1e-5)


def test_logits_of_half_precision_are_float32():
    hidden, embedding, targets, weights = example()
    half = hidden.astype(jnp.bfloat16), embedding.astype(jnp.bfloat16)
    losses = token_losses(*half, targets, 48)
    assert losses.dtype == jnp.float32
    # The products of bfloat16 numbers are exact in float32, so only the inputs are rounded.
    np.testing.assert_allclose(losses, truth(*half, targets, weights)[0], atol=1e-5)
    half_rounded = jax.nn.log_softmax(jnp.einsum("bte,ve->btv", *half))
    rounded = -jnp.take_along_axis(half_rounded, targets[..., None], axis=-1)[..., 0]
    assert np.abs(rounded - losses).max() > 1e-2


def test_logits_of_all_tokens_never_exist():
    arrays = example(batch=2, length=2048, vocabulary=512)
    logits = 4 * 2 * 2048 * 512

    def temporary(function):
        return function.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(jax.jit(jax.value_and_grad(naive, argnums=(0, 1)))) >= logits
    assert temporary(value_and_gradients(128)) < logits / 4


def on_mesh(shape, arrays):
    """(sharding of the tokens, the arrays on the mesh): embedding cut over vocabulary and width."""
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)
    tokens = NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
    table = NamedSharding(mesh, P("tensor", ("fsdp", "sequence")))
    places = tokens, table, tokens, tokens
    return tokens, [jax.device_put(x, place) for x, place in zip(arrays, places, strict=True)]


@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2)])
def test_any_mesh_gives_the_same(shape):
    arrays = example()
    sharding, sharded = on_mesh(shape, arrays)
    check(value_and_gradients(12, sharding)(*sharded), arrays)


def collectives(function, arrays) -> list[tuple[str, int, bool]]:
    """(kind, greatest number of elements, whether inside a loop) of each in the compiled program."""
    found = []
    for line in function.lower(*arrays).compile().as_text().splitlines():
        if match := COLLECTIVE.search(line):
            shapes = [[int(n) for n in shape.split(",") if n] for shape in re.findall(r"\[([\d,]*)\]", match[1])]
            found.append((match[2], max(int(np.prod(shape)) for shape in shapes), "while/body" in line))
    return found


def test_only_the_embedding_crosses_devices_and_only_once():
    arrays = example(length=512)
    sharding, sharded = on_mesh((1, 1, 8, 1), arrays)
    found = collectives(value_and_gradients(16, sharding), sharded)
    assert found and all(size <= VOCABULARY * WIDTH and not looped for _, size, looped in found), found

    def across_shards(hidden, embedding, targets, weights):
        chunks = (x.reshape(BATCH, -1, 16, *x.shape[2:]).swapaxes(0, 1) for x in (hidden, targets, weights))
        return jax.lax.map(jax.checkpoint(lambda xs: naive(xs[0], embedding, *xs[1:])), tuple(chunks)).sum()

    found = collectives(jax.jit(jax.value_and_grad(across_shards, argnums=(0, 1))), sharded)
    assert any(looped for _, _, looped in found) and any(size > VOCABULARY * WIDTH for _, size, _ in found), found
