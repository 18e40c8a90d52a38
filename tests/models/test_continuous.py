"""HiSS: its levels are what they are when their chunks are rows of a batch, and nothing goes back in time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from striate import Tokens, UserError
from striate.lib.parallel import Across, Ring, StateScan
from striate.models.continuous import HiSS, Stack, with_differences
from striate.models.decoder import DecoderConfig, Layer
from suites.attention import mesh

CHUNK, CHUNKS, CHANNELS = 4, 8, 2
LENGTH = CHUNK * CHUNKS
LEVEL = DecoderConfig(
    width=6, heads=1, kv_heads=1, head_dim=4, hidden=8, layers=1, pattern=(Layer(mixer="gated_linear"),)
)
MODEL = HiSS(LEVEL, LEVEL, CHUNK, outputs=3)
X = np.random.default_rng(0).normal(size=(2, LENGTH, CHANNELS)).astype(np.float32)
# Two documents in the first row, of 3 and 5 chunks; the second row ends in the middle of a chunk.
LENGTHS = [[12, 20], [26]]
DOCUMENT = np.stack([np.repeat([0, 1], LENGTHS[0]), np.where(np.arange(LENGTH) < 26, 5, -1)]).astype(np.int32)
POSITION = np.stack([np.concatenate([np.arange(n) for n in LENGTHS[0]]), np.arange(LENGTH)]).astype(np.int32)
TOKENS = Tokens(position=POSITION, document=DOCUMENT)


@functools.cache
def parameters(model=MODEL):
    return jax.jit(model.init)(jax.random.key(0), X, TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x, tokens):
    return model.apply(params, x, tokens)


def part(params, name):
    return {"params": params["params"][name]}


def test_it_is_the_levels_by_themselves_chunks_as_rows():
    """One scan that begins anew in every chunk is the scan of a batch of chunks; so are its gradients."""
    params, one = parameters(), np.zeros_like(DOCUMENT)
    tokens = Tokens(position=np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)), document=one)

    def in_rows(params):
        rows = with_differences(X, tokens).reshape(2 * CHUNKS, CHUNK, 2 * CHANNELS)
        low = Stack(LEVEL, LEVEL.width).apply(part(params, "low"), rows, Tokens.arange(2 * CHUNKS, CHUNK))
        last = low[:, -1].reshape(2, CHUNKS, -1)
        return Stack(LEVEL, 3).apply(part(params, "high"), last, Tokens.arange(2, CHUNKS))

    np.testing.assert_allclose(run(MODEL, params, X, tokens), jax.jit(in_rows)(params), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        jax.jit(jax.grad(lambda params, f=f: (f(params) ** 2).sum()))(params)
        for f in (lambda params: MODEL.apply(params, X, tokens), in_rows)
    )
    for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * abs(y).max())


def test_without_a_low_level_and_chunks_of_one_sample_it_is_the_flat_model():
    flat = HiSS(None, LEVEL, 1, outputs=3)
    params = parameters(flat)
    want = run(Stack(LEVEL, 3), part(params, "high"), with_differences(X, TOKENS), TOKENS)
    np.testing.assert_array_equal(run(flat, params, X, TOKENS), want)


def test_documents_packed_are_documents_by_themselves():
    packed = run(MODEL, parameters(), X, TOKENS)[0]
    for start, stop in ((0, 12), (12, 32)):
        alone = run(MODEL, parameters(), X[:1, start:stop], Tokens.arange(1, stop - start))[0]
        np.testing.assert_allclose(packed[start // CHUNK : stop // CHUNK], alone, rtol=1e-5, atol=1e-6)


def test_no_bit_depends_on_later_chunks_or_on_padding():
    changed = X.copy()
    changed[0, 17:20], changed[1, 26:] = 9, 9  # the last samples of a chunk, and padding
    before, after = (np.asarray(run(MODEL, parameters(), x, TOKENS)) for x in (X, changed))
    np.testing.assert_array_equal(after[0, :4], before[0, :4])
    np.testing.assert_array_equal(after[1, :6], before[1, :6])  # whole chunks; the one that ends in padding is none
    assert (after[0, 4:] != before[0, 4:]).all()


def test_over_a_sharded_sequence_it_is_the_same():
    there = mesh(sequence=4)
    across = MODEL.clone(parallel=Across(Ring(there), StateScan(there)))
    got, want = (run(model, parameters(), X, TOKENS) for model in (across, MODEL))
    whole = jnp.asarray(DOCUMENT[:, CHUNK - 1 :: CHUNK] != -1)[..., None]
    np.testing.assert_allclose(jnp.where(whole, got, 0), jnp.where(whole, want, 0), rtol=1e-5, atol=1e-5)


def test_samples_that_fill_no_chunk_are_answered():
    with pytest.raises(UserError, match="30 samples are no multiple of the chunk 4"):
        MODEL.apply(parameters(), X[:, :30], TOKENS.map(lambda x: x[:, :30]))
