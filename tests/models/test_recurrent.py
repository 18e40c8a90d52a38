"""Recurrent layers: what a layer may read, documents, decoding from states, and several devices."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from striate.lib.layouts import Striped, ZigZag
from striate.lib.parallel import Across, ReorderedScan, Ring, StateScan, ValueColumns
from striate.lib.tokens import Tokens
from striate.models.decoder import Decoder, DecoderConfig, Layer, empty_cache
from striate.models.mixers import MIXERS
from suites.attention import mesh

LENGTH = 32
CAUSAL = [name for name, kind in MIXERS.items() if kind.recurs and not kind.sees_later]
USUAL = ("gated_delta",)  # the rest of them as often as all tests are run
NAMES = [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in CAUSAL]


@pytest.fixture(autouse=True, scope="module")
def _small_windows():
    """So that what is before a window is read."""
    with mock.patch.dict(MIXERS, lavo=dataclasses.replace(MIXERS["lavo"], options={"window": 5})):
        yield


@functools.cache
def example(name: str):
    """(config, variables, inputs, tokens of two documents and padding, n-gram ids): the mixer and attention in turn."""
    config = DecoderConfig(
        vocabulary=40, width=16, layers=4, heads=4, kv_heads=2, head_dim=8, hidden=24,
        pattern=(Layer(mixer=name), Layer()),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.integers(0, 40, (2, LENGTH)), jnp.int32)
    document = np.repeat([[0, 1], [3, 3]], LENGTH // 2, axis=1).astype(np.int32)
    document[:, -3:] = -1
    position = np.where(np.arange(LENGTH) < LENGTH // 2, 0, [[LENGTH // 2], [0]])
    tokens = Tokens(position=jnp.asarray(np.arange(LENGTH)[None] - position, jnp.int32), document=jnp.asarray(document))
    ngrams = jnp.zeros((2, LENGTH, 0), jnp.int32)
    variables = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), inputs, tokens, ngrams))
    return config, variables, inputs, tokens, ngrams


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_token_reads_the_tokens_of_its_document_up_to_itself(name):
    config, variables, _, tokens, ngrams = example(name)
    # A row of the table for each token of one row of the batch: the gradient of the table is that of the input.
    inputs = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    row = jax.tree.map(lambda x: x[:1], tokens)
    params = variables["params"]

    def hidden(table):
        return Decoder(config).apply({"params": {**params, "embedding": table}}, inputs, row, ngrams[:1])[0]

    @jax.jit
    def jacobian(table):
        out, pull = jax.vjp(hidden, table)
        cotangents = np.random.default_rng(1).normal(size=(LENGTH, *out.shape)) * np.eye(LENGTH)[:, :, None]
        return jax.vmap(pull)(jnp.float32(cotangents))[0]

    jacobian = jacobian(params["embedding"])
    assert np.isfinite(jacobian).all()
    reached = np.asarray(jacobian != 0).any(-1)[:, :LENGTH]
    document, place = np.asarray(row.document[0]), np.arange(LENGTH)
    real = document >= 0
    seen = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    np.testing.assert_array_equal(reached[real][:, real], seen[real][:, real])
    assert not reached[real][:, ~real].any()


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_one_forward_pass(name):
    config, variables, *batch = example(name)
    step = jax.jit(lambda batch, cache: Decoder(config).apply(variables, *batch, cache))
    whole = jax.jit(lambda batch: Decoder(config).apply(variables, *batch))(batch)
    cache, found = empty_cache(config, 2, LENGTH), []
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, LENGTH)):
        out, cache = step(jax.tree.map(lambda x, cut=slice(start, stop): x[:, cut], batch), cache)
        found.append(out)
    real = np.asarray(batch[1].document) >= 0
    np.testing.assert_allclose(np.concatenate(found, 1)[real], np.asarray(whole)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_padding_of_a_prompt_changes_nothing(name):
    config, variables, inputs, _, ngrams = example(name)
    tokens = Tokens.arange(2, LENGTH)
    step = jax.jit(lambda batch, cache: Decoder(config).apply(variables, *batch, cache))
    parts = {}
    for padding in (0, 5):
        document = jnp.where(jnp.arange(9 + padding)[None] < 9, tokens.document[:, : 9 + padding], -1)
        prompt = inputs[:, : 9 + padding], Tokens(tokens.position[:, : 9 + padding], document), ngrams[:, : 9 + padding]
        _, cache = step(prompt, empty_cache(config, 2, LENGTH))
        later = jax.tree.map(lambda x: x[:, 9:12], (inputs, tokens, ngrams))
        parts[padding], _ = step(later, cache)
    np.testing.assert_allclose(parts[5], parts[0], rtol=1e-5, atol=1e-5)


STRATEGIES = {
    "states, zigzag": (lambda m: StateScan(m, layout=ZigZag(4)), ZigZag(4)),
    "states, striped": (lambda m: ReorderedScan(m, layout=Striped(4, 2)), Striped(4, 2)),
    "columns, striped": (lambda m: ValueColumns(m, layout=Striped(4, 1)), Striped(4, 1)),
}
PAIRS = [pytest.param(*name.values, "states, zigzag", marks=name.marks) for name in NAMES]
PAIRS += [("gated_delta", "states, striped"), ("gated_delta", "columns, striped")]


@pytest.mark.long
@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_several_devices_give_the_same_loss_and_gradients(name, strategy):
    config, variables, *batch = example(name)
    make, layout = STRATEGIES[strategy]
    devices = mesh(sequence=4)
    across = Across(Ring(devices), make(devices))

    def gradients(parallel, batch, order):
        def loss(variables):
            hidden = order(Decoder(config, parallel).apply(variables, *batch))
            return (jnp.where(real, hidden, 0) ** 3).sum()

        return jax.jit(jax.value_and_grad(loss))(variables)

    real = (np.asarray(batch[1].document) >= 0)[..., None]
    want = gradients(None, batch, lambda x: x)
    got = gradients(across, layout.permute(batch), layout.restore)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * max(abs(y).max(), 1e-3))
