"""Causal convolutions: the sum over the taps, document by document, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from striate import Tokens, UserError
from striate.lib.convolution import long_convolution, short_convolution
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.parallel import ReorderedScan, StateScan, ValueColumns
from suites.attention import mesh
from suites.linear import documents

SYSTEMS = {
    "contiguous": lambda n: (StateScan(mesh(sequence=n)), Contiguous(n)),
    "zigzag": lambda n: (StateScan(mesh(sequence=n), layout=ZigZag(n)), ZigZag(n)),
    "reordered": lambda n: (ReorderedScan(mesh(sequence=n), layout=Striped(n, 1)), Striped(n, 1)),
    "columns": lambda n: (ValueColumns(mesh(sequence=n), layout=Striped(n, 1)), Striped(n, 1)),
}


def oracle(x, taps, document):
    """In float64, token by token; what lies between two tokens of a segment is of their document, or padding."""
    x, taps, y = np.float64(x), np.float64(taps), np.zeros(x.shape)
    for b, t in np.ndindex(document.shape):
        for distance in range(min(len(taps), t + 1)):
            between = document[b, t - distance : t + 1]
            if document[b, t] == -1 or not np.isin(between, (document[b, t], -1)).all():
                break
            if between[0] != -1:
                y[b, t] += taps[distance] * x[b, t - distance]
    return y


def problem(taps: int, length: int, channels: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    x, kernel, d_y = (
        rng.normal(size=shape) for shape in ((2, length, channels), (taps, channels), (2, length, channels))
    )
    document = documents(rng, 2, length)
    return np.float32(x), np.float32(kernel), document, np.float32(d_y)


def tokens(document):
    return Tokens(position=0 * document, document=document)


def check(run, taps: int, length: int):
    """Outputs and, since the sum is linear in both factors, gradients: <d_y, y(dx)> is what d_x says for every dx."""
    x, kernel, document, d_y = problem(taps, length)
    np.testing.assert_allclose(run(x, kernel, document), oracle(x, kernel, document), rtol=1e-5, atol=2e-6 * taps**0.5)
    d_x, d_kernel = jax.jit(jax.grad(lambda x, kernel: (run(x, kernel, document) * d_y).sum(), (0, 1)))(x, kernel)
    for seed in range(3):
        dx, dk, *_ = problem(taps, length, seed=seed + 1)
        np.testing.assert_allclose((d_x * dx).sum(), (oracle(dx, kernel, document) * d_y).sum(), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose((d_kernel * dk).sum(), (oracle(x, dk, document) * d_y).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("taps", [1, 4])
def test_short_is_the_sum_over_the_taps(taps):
    check(lambda x, kernel, document: short_convolution(x, kernel, tokens=tokens(document)), taps, 50)


@pytest.mark.parametrize("length", [50, 200])
@pytest.mark.parametrize("taps", [1, 40, 300])
def test_long_is_the_sum_over_the_taps(taps, length):
    check(lambda x, kernel, document: long_convolution(x, kernel, tokens=tokens(document)), taps, length)


@pytest.mark.parametrize("length", [50, 200])
@pytest.mark.parametrize("taps", [1, 40, 300])
def test_long_by_fft_is_the_same_for_one_document(taps, length):
    x, kernel, document, d_y = problem(taps, length)
    one = np.zeros_like(document)

    def results(**how):
        y, pull = jax.vjp(lambda x, kernel: long_convolution(x, kernel, **how), x, kernel)
        return y, *pull(d_y)

    np.testing.assert_allclose(results()[0], oracle(x, kernel, one), rtol=1e-5, atol=1e-5 * taps**0.5)
    for got, want in zip(results(), results(tokens=tokens(one)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * abs(want).max())


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_strategy_is_the_same(name, shards):
    parallel, layout = SYSTEMS[name](shards)

    def run(x, kernel, document):
        x, document = layout.permute((x, document))
        return layout.restore(short_convolution(x, kernel, tokens=tokens(document), parallel=parallel))

    check(run, 4, 48)


@pytest.mark.parametrize("name", [None, *SYSTEMS])
def test_a_tail_goes_on_where_it_was_left(name):
    x, kernel, document, _ = problem(4, 48)
    document[:, [15, 31, 47]] = np.maximum(document[:, [15, 31, 47]], 0)
    parallel, layout = SYSTEMS[name](2) if name else (None, Contiguous(1))

    @jax.jit
    def step(x, document, tail):
        own_x, own = layout.permute((x, document))
        how = {"tokens": tokens(own), "initial_tail": tail, "return_tail": True, "parallel": parallel}
        y, tail = short_convolution(own_x, kernel, **how)
        return layout.restore(y), tail

    parts, tail = [], None
    for part in (np.s_[:, :16], np.s_[:, 16:32], np.s_[:, 32:]):
        y, tail = step(x[part], document[part], tail)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1), oracle(x, kernel, document), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tail.document, document[:, -3:])


def test_padding_at_the_end_is_not_in_the_tail():
    x, kernel, *_ = problem(4, 20)
    document = np.zeros((2, 20), np.int32)
    document[:, 12:16] = -1
    _, tail = short_convolution(x[:, :16], kernel, tokens=tokens(document[:, :16]), return_tail=True)
    y = short_convolution(x[:, 16:], kernel, tokens=tokens(document[:, 16:]), initial_tail=tail)
    whole = np.concatenate([x[:, :12], x[:, 16:]], 1)
    np.testing.assert_allclose(y, oracle(whole, kernel, 0 * document[:, 4:])[:, 12:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [None, "long", *SYSTEMS])
def test_a_document_changes_no_bit_of_another(name):
    (x, kernel, document, d_y), (other, *_) = problem(4, 64), problem(4, 64, seed=1)
    edited = document == 2
    assert edited.any() and not edited.all()
    parallel, layout = SYSTEMS[name](4) if name in SYSTEMS else (None, Contiguous(1))
    function = long_convolution if name == "long" else short_convolution
    how = {"parallel": parallel} if parallel else {}

    @jax.jit
    def results(x):
        def run(x):
            own_x, own = layout.permute((x, document))
            return layout.restore(function(own_x, jnp.asarray(kernel), tokens=tokens(own), **how))

        y, pull = jax.vjp(run, x)
        return y, *pull(d_y)

    changed = np.where(edited[..., None], other, x)
    (before, d_before), (after, d_after) = results(x), results(changed)
    np.testing.assert_array_equal(np.asarray(before)[~edited], np.asarray(after)[~edited])
    np.testing.assert_array_equal(d_before, d_after)
    assert (np.asarray(before)[edited] != np.asarray(after)[edited]).any()


def test_what_an_fft_would_do_to_documents():
    x, kernel, document, _ = problem(40, 64)
    changed = np.where((document == 2)[..., None], 100.0, x).astype(np.float32)
    before, after = (np.asarray(long_convolution(x, kernel))[document == 1] for x in (x, changed))
    assert (before != after).any()


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda: short_convolution(np.ones((1, 8, 3)), np.ones((4, 2))), r"x \(1, 8, 3\) and taps \(4, 2\) do not fit"),
        (
            lambda: long_convolution(np.ones((1, 8, 3)), np.ones((8, 3)), tokens=Tokens.arange(1, 7)),
            "need .*\\(1, 8\\)",
        ),
        (
            lambda: short_convolution(jnp.ones((1, 8, 4)), jnp.ones((4, 4)), parallel=StateScan(mesh(sequence=4))),
            "4 taps reaches over more than the 2 tokens",
        ),
    ],
)
def test_bad_input_is_answered(call, answer):
    with pytest.raises(UserError, match=answer):
        call()
