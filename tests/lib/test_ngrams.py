"""Hashed n-grams: the same where the same tokens end inside one document, spread evenly, and the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from striate.lib.ngrams import ngram_ids

ORDERS = (1, 2, 4)
RNG = np.random.default_rng(0)
INPUTS = RNG.integers(0, 5, (2, 300)).astype(np.int32)
DOCUMENT = np.sort(RNG.integers(0, 30, (2, 300)), axis=1).astype(np.int32)


def ngram(row: int, end: int, n: int) -> tuple[int, ...]:
    """The tokens of the n-gram that ends at `end`, fewer where its document starts inside."""
    start = max(end - n + 1, np.flatnonzero(DOCUMENT[row] == DOCUMENT[row, end])[0])
    return tuple(INPUTS[row, start : end + 1])


def test_ids_are_equal_where_the_ngrams_are():
    ids = ngram_ids(INPUTS, DOCUMENT, ORDERS, 2**30)
    assert ids.dtype == np.int32 and ids.shape == (2, 300, 3)
    for i, n in enumerate(ORDERS):
        of_ngram = {}
        for row, end in np.ndindex(INPUTS.shape):
            of_ngram.setdefault(ngram(row, end, n), set()).add(int(ids[row, end, i]))
        assert all(len(found) == 1 for found in of_ngram.values())
        assert len(set.union(*of_ngram.values())) == len(of_ngram)


def test_numpy_and_jax_agree():
    ids = ngram_ids(INPUTS, DOCUMENT, ORDERS, 1000)
    jitted = jax.jit(lambda inputs, document: ngram_ids(inputs, document, ORDERS, 1000))
    traced = jitted(jnp.asarray(INPUTS), jnp.asarray(DOCUMENT))
    assert isinstance(ids, np.ndarray) and traced.dtype == jnp.int32
    np.testing.assert_array_equal(ids, traced)


def test_the_last_tokens_are_enough_to_continue():
    ids = ngram_ids(INPUTS, DOCUMENT, ORDERS, 1000)
    for end in (3, 50, 299):
        window = np.s_[:, end + 1 - max(ORDERS) : end + 1]
        np.testing.assert_array_equal(ngram_ids(INPUTS[window], DOCUMENT[window], ORDERS, 1000)[:, -1], ids[:, end])


@pytest.mark.parametrize("buckets", [4096, 4099])
def test_ids_spread_evenly(buckets):
    inputs = np.random.default_rng(1).integers(0, 256, (1, 100 * buckets)).astype(np.int32)
    counts = np.bincount(ngram_ids(inputs, 0 * inputs, (3,), buckets).ravel(), minlength=buckets)
    assert len(counts) == buckets
    # 100 in each on average; of a Poisson count the variance is the mean.
    assert 0.9 < counts.var() / 100 < 1.1


def test_no_orders_give_no_ids():
    assert ngram_ids(INPUTS, DOCUMENT, (), 1000).shape == (2, 300, 0)
