"""Streams and rows against loops that spell the rules out."""

import jax.numpy as jnp
import numpy as np
import pytest

from striate.lib.text import BOUNDARY, VOCABULARY, decode, encode
from striate.lib.training.data import ngram_ids
from striate.lib.training.data.packing import Stream, pack


def texts(seed, count=12, longest=9):
    """Random documents, some of them empty."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(0, longest), np.uint8).tobytes() for _ in range(count)]


def stream(documents, order):
    return Stream(documents.__getitem__, np.array([len(text) for text in documents]), np.asarray(order))


def rows(seed, batch=3, length=40):
    """int32 (batch, length + 1): boundaries of probability 1/6 among bytes."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 256, (batch, length + 1), np.int32)
    return np.where(random.random(ids.shape) < 1 / 6, np.int32(BOUNDARY), ids)


@pytest.mark.parametrize("text", ["def f(x):\n", "żółw", "", bytes(range(256))])
def test_decode_inverts_encode(text):
    ids = encode(text)
    assert ids.dtype == np.int32
    assert decode(ids) == (text if isinstance(text, bytes) else text.encode())


def test_ids_that_are_no_bytes_decode_to_nothing():
    assert decode([[BOUNDARY, 104], [VOCABULARY - 1, 105]]) == b"hi"


@pytest.mark.parametrize("seed", range(4))
def test_every_slice_of_the_stream_is_the_slice_of_the_concatenation(seed):
    documents = texts(seed)
    order = np.random.default_rng(seed).permutation(len(documents))
    whole = np.array([i for at in order for i in (BOUNDARY, *documents[at])], np.int32)
    cut = stream(documents, order)
    assert len(cut) == len(whole)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            np.testing.assert_array_equal(cut.cut(start, stop), whole[start:stop])


def test_past_the_end_of_the_stream_is_padding():
    np.testing.assert_array_equal(stream([b"ab"], [0]).cut(1, 6), [97, 98, -1, -1, -1])


def test_a_slice_reads_only_the_documents_it_touches():
    documents, read = texts(5, longest=30), []

    def reading(at):
        read.append(at)
        return documents[at]

    lengths = np.array([len(text) for text in documents])
    watched = Stream(reading, lengths, np.arange(len(documents)))
    start = int(watched.stops[3])  # the boundary of document 4
    watched.cut(start, start + 1 + len(documents[4]))
    assert read == [4]


@pytest.mark.parametrize("seed", range(4))
def test_documents_are_numbered_and_positions_restart_in_every_row(seed):
    ids = rows(seed)
    batch = pack(ids, (), 1)
    for row in range(len(ids)):
        document = position = 0
        for t, token in enumerate(ids[row, :-1]):
            if token == BOUNDARY and t > 0:
                document, position = document + 1, 0
            assert batch.tokens.document[row, t] == document
            assert batch.tokens.position[row, t] == position
            position += 1
    np.testing.assert_array_equal(batch.inputs, ids[:, :-1])
    np.testing.assert_array_equal(batch.targets, ids[:, 1:])
    assert (batch.weights == 1).all()
    assert [x.dtype for x in (*batch[:3], batch.tokens.position, batch.tokens.document, batch.ngrams)] == [
        *(np.int32, np.int32, np.float32, np.int32, np.int32, np.int32)
    ]
    assert batch.ngrams.shape == (3, 40, 0)


def test_an_input_without_a_target_is_padding():
    batch = pack(np.array([[BOUNDARY, 97, 98, -1, -1]], np.int32), (), 1)
    np.testing.assert_array_equal(batch.weights, [[1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.tokens.document, [[0, 0, -1, -1]])
    assert batch.inputs.min() >= 0 and batch.targets.min() >= 0, "padding has to be a valid row of the embedding"


def ngram_oracle(ids, document, n):
    """The n-gram that ends at each token, spelt out: its ids inside the document, oldest first."""
    return [
        [tuple(row[s] for s in range(max(t - n + 1, 0), t + 1) if part[s] == part[t]) for t in range(len(row))]
        for row, part in zip(ids.tolist(), document.tolist(), strict=True)
    ]


@pytest.mark.parametrize("orders", [(1,), (2, 3, 4), (5, 2)])
def test_ngram_ids_name_the_ngrams(orders):
    """Equal n-grams have equal ids; with 2^31 - 1 buckets different ones have different ids."""
    ids = rows(7, batch=4, length=60) % 5  # few symbols, so that n-grams repeat
    document = np.sort(np.random.default_rng(8).integers(0, 6, ids.shape), axis=1).astype(np.int32)
    hashed = ngram_ids(ids, document, orders, 2**31 - 1)
    assert hashed.dtype == np.int32 and hashed.shape == (*ids.shape, len(orders))
    for column, n in enumerate(orders):
        spelt = [gram for row in ngram_oracle(ids, document, n) for gram in row]
        pairs = set(zip(spelt, hashed[..., column].ravel().tolist(), strict=True))
        assert len({gram for gram, _ in pairs}) == len({hash_ for _, hash_ in pairs}) == len(pairs) < len(spelt)


def test_ngram_ids_lie_in_their_buckets_and_fill_them():
    ids = rows(9, batch=4, length=2000)
    hashed = ngram_ids(ids, np.zeros_like(ids), (2, 3), 64)
    assert hashed.min() >= 0 and hashed.max() < 64
    counts = np.stack([np.bincount(hashed[..., column].ravel(), minlength=64) for column in (0, 1)])
    assert counts.max() < 3 * counts.mean()


def test_the_last_ids_alone_give_the_next_ngram_ids():
    """Generation keeps max(orders) - 1 ids and computes the ids of one more token, in JAX as in numpy."""
    ids, orders = rows(10, batch=2, length=30), (2, 3, 4)
    document = np.zeros_like(ids)
    whole = ngram_ids(ids, document, orders, 1000)
    for t in range(3, 31):
        last = ngram_ids(jnp.asarray(ids[:, t - 3 : t + 1]), jnp.zeros((2, 4), jnp.int32), orders, 1000)
        np.testing.assert_array_equal(last[:, -1], whole[:, t])


def test_ngrams_of_a_batch_never_reach_into_another_document():
    ids = rows(11)
    changed = ids.copy()
    start = 1 + int(np.argmax(ids[0, 1:-1] == BOUNDARY))  # the second document of row 0
    changed[0, :start] = (ids[0, :start] + 1) % 256
    ours, theirs = (pack(each, (2, 3), 512).ngrams for each in (ids, changed))
    np.testing.assert_array_equal(ours[0, start:], theirs[0, start:])
    assert (ours[0, :start] != theirs[0, :start]).any()
