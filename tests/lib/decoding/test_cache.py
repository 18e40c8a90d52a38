"""Decoding through the cache, whatever is fed at a time, equals one forward pass over the whole text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from striate.lib.ngrams import ngram_ids
from striate.lib.tokens import Tokens
from striate.models.decoder import Decoder, DecoderConfig, Layer, empty_cache

LENGTH = 24
CONFIG = DecoderConfig(
    width=32,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=48,
    pattern=(Layer(mask="causal()"), Layer(mask="causal() & (window(5) | sink(2))")),
    ngram_orders=(2, 3),
    ngram_buckets=50,
    ngram_width=8,
    implementation="reference",
)


@functools.cache
def example():
    """(variables, inputs, tokens, n-gram ids)."""
    inputs = np.random.default_rng(0).integers(0, 257, (2, LENGTH)).astype(np.int32)
    tokens = Tokens.arange(2, LENGTH)
    ngrams = ngram_ids(inputs, np.asarray(tokens.document), CONFIG.ngram_orders, CONFIG.ngram_buckets)
    variables = nn.unbox(jax.jit(Decoder(CONFIG).init)(jax.random.key(0), inputs, tokens, ngrams))
    return variables, inputs, tokens, ngrams


@functools.partial(jax.jit, static_argnums=0)
def step(config, variables, batch, cache=None):
    return Decoder(config).apply(variables, *batch, cache)


def decode(config, variables, batch, pieces):
    """Hidden states of `batch`, fed in pieces of these lengths, and the cache at the end."""
    cache, found, start = empty_cache(config, 2, LENGTH + 8), [], 0
    for length in pieces:
        piece = jax.tree.map(lambda x, start=start, end=start + length: x[:, start:end], batch)
        hidden, cache = step(config, variables, piece, cache)
        found.append(hidden)
        start += length
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize(
    ("pieces", "implementation"),
    [
        ((LENGTH,), "reference"),
        ((1,) * LENGTH, "reference"),
        ((9,) + (1,) * (LENGTH - 9), "xla"),
        ((7, 12, 5), "reference"),
    ],
)
def test_any_pieces_give_the_logits_of_one_forward_pass(pieces, implementation):
    variables, *batch = example()
    config = dataclasses.replace(CONFIG, implementation=implementation)
    whole, pieced = step(config, variables, batch), decode(config, variables, batch, pieces)[0]
    expected, logits = (Decoder(config).apply(variables, hidden, method="logits") for hidden in (whole, pieced))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_the_cache_holds_the_tokens_and_empty_slots_are_padding():
    variables, *batch = example()
    _, cache = decode(CONFIG, variables, batch, (9, LENGTH - 9))
    assert cache.used == LENGTH
    np.testing.assert_array_equal(cache.tokens.position[:, :LENGTH], batch[1].position)
    np.testing.assert_array_equal(cache.tokens.document[:, LENGTH:], -1)
    for layer in cache.layers:
        assert layer.keys.shape == (CONFIG.repeats, 2, LENGTH + 8, CONFIG.kv_heads, CONFIG.head_dim)
        assert np.all(layer.keys[:, :, LENGTH:] == 0) and np.all(layer.keys[:, :, :LENGTH].any(axis=(-1, -2)))


def test_padding_in_the_prompt_changes_nothing():
    variables, inputs, tokens, ngrams = example()
    expected, _ = decode(CONFIG, variables, (inputs, tokens, ngrams), (LENGTH,))
    hole = (tokens.position >= 9) & (tokens.position < 14)
    position = jnp.where(tokens.position < 9, tokens.position, tokens.position - 5)
    padded = Tokens(position=position, document=jnp.where(hole, -1, 0))
    shifted = [np.concatenate([x[:, :9], x[:, :5], x[:, 9:-5]], axis=1) for x in (inputs, ngrams)]
    got, _ = decode(CONFIG, variables, (shifted[0], padded, shifted[1]), (14,) + (1,) * (LENGTH - 14))
    np.testing.assert_allclose(got[:, 14:], expected[:, 9:-5], atol=1e-5)
    # Were the padding seen, it would change them.
    seen = shifted[0], padded.replace(document=jnp.zeros_like(position)), shifted[1]
    got, _ = decode(CONFIG, variables, seen, (14,) + (1,) * (LENGTH - 14))
    assert np.abs(got[:, 14:] - expected[:, 9:-5]).max() > 1e-2
