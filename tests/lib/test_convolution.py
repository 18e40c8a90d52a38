"""Causal convolutions: the sum over the taps, document by document, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from striate import Tokens, UserError
from striate.lib.convolution import long_convolution, multiscale_taps, short_convolution
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
FAR = 40  # taps that reach over several devices
ACROSS = [(short_convolution, 4, 2), (short_convolution, 4, 4), (long_convolution, 5, 4), (long_convolution, FAR, 4)]


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

    @jax.jit
    def results(x, kernel):
        y, pull = jax.vjp(lambda x, kernel: run(x, kernel, document), x, kernel)
        return y, *pull(d_y)

    y, d_x, d_kernel = results(x, kernel)
    np.testing.assert_allclose(y, oracle(x, kernel, document), rtol=1e-5, atol=2e-6 * taps**0.5)
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

    @functools.partial(jax.jit, static_argnames="several")
    def results(several: bool):
        how = {"tokens": tokens(one)} if several else {}
        y, pull = jax.vjp(lambda x, kernel: long_convolution(x, kernel, **how), x, kernel)
        return y, *pull(d_y)

    np.testing.assert_allclose(results(False)[0], oracle(x, kernel, one), rtol=1e-5, atol=1e-5 * taps**0.5)
    for got, want in zip(results(False), results(True), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * abs(want).max())


@pytest.mark.parametrize(("function", "taps", "shards"), ACROSS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_strategy_is_the_same(name, function, taps, shards):
    parallel, layout = SYSTEMS[name](shards)

    def run(x, kernel, document):
        x, document = layout.permute((x, document))
        return layout.restore(function(x, kernel, tokens=tokens(document), parallel=parallel))

    check(run, taps, 48)


@pytest.mark.parametrize("taps", [5, FAR])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_strategy_by_fft(name, taps):
    (parallel, layout), (x, kernel, *_) = SYSTEMS[name](4), problem(taps, 48)

    @jax.jit
    def step(x, tail):
        y, tail = long_convolution(layout.permute(x), kernel, parallel=parallel, initial_tail=tail, return_tail=True)
        return layout.restore(y), tail

    y, tail = step(x, None)
    parts = np.concatenate([y, step(x, tail)[0]], 1)
    true = oracle(np.concatenate([x, x], 1), kernel, np.zeros((2, 96), int))
    np.testing.assert_allclose(parts, true, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("function", "taps"), [(short_convolution, 4), (long_convolution, FAR)])
@pytest.mark.parametrize("name", [None, *SYSTEMS])
def test_a_tail_goes_on_where_it_was_left(name, function, taps):
    x, kernel, document, _ = problem(taps, 48)
    document[:, [15, 31, 47]] = np.maximum(document[:, [15, 31, 47]], 0)
    parallel, layout = SYSTEMS[name](2) if name else (None, Contiguous(1))

    @jax.jit
    def step(x, document, tail):
        own_x, own = layout.permute((x, document))
        how = {"tokens": tokens(own), "initial_tail": tail, "return_tail": True, "parallel": parallel}
        y, tail = function(own_x, kernel, **how)
        return layout.restore(y), tail

    parts, tail = [], None
    for part in (np.s_[:, :16], np.s_[:, 16:32], np.s_[:, 32:]):
        y, tail = step(x[part], document[part], tail)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1), oracle(x, kernel, document), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tail.document, document[:, -taps + 1 :])


def test_a_long_convolution_goes_on_token_by_token():
    x, kernel, document, _ = problem(FAR, 24)
    document[document == -1] = 4

    def step(tail, token):
        x, document = token
        how = {"tokens": tokens(document[:, None]), "initial_tail": tail, "return_tail": True}
        y, tail = long_convolution(x[:, None], kernel, **how)
        return tail, y[:, 0]

    _, tail = long_convolution(x[:, :1], kernel, tokens=tokens(document[:, :1]), return_tail=True)
    _, y = jax.lax.scan(step, tail, (x.swapaxes(0, 1)[1:], document.T[1:]))
    np.testing.assert_allclose(y.swapaxes(0, 1), oracle(x, kernel, document)[:, 1:], rtol=1e-5, atol=1e-5)


def test_padding_at_the_end_is_not_in_the_tail():
    x, kernel, *_ = problem(4, 20)
    document = np.zeros((2, 20), np.int32)
    document[:, 12:16] = -1
    _, tail = short_convolution(x[:, :16], kernel, tokens=tokens(document[:, :16]), return_tail=True)
    y = short_convolution(x[:, 16:], kernel, tokens=tokens(document[:, 16:]), initial_tail=tail)
    whole = np.concatenate([x[:, :12], x[:, 16:]], 1)
    np.testing.assert_allclose(y, oracle(whole, kernel, 0 * document[:, 4:])[:, 12:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("function", "taps"), [(short_convolution, 4), (long_convolution, FAR)])
@pytest.mark.parametrize("name", [None, *SYSTEMS])
def test_a_document_changes_no_bit_of_another(name, function, taps):
    (x, kernel, document, d_y), (other, *_) = problem(taps, 64), problem(taps, 64, seed=1)
    edited = document == 2
    assert edited.any() and not edited.all()
    parallel, layout = SYSTEMS[name](4) if name else (None, Contiguous(1))

    @jax.jit
    def results(x):
        def run(x):
            own_x, own = layout.permute((x, document))
            return layout.restore(function(own_x, jnp.asarray(kernel), tokens=tokens(own), parallel=parallel))

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


def test_memory_is_linear_in_the_length_whatever_the_taps():
    def temporary(length: int) -> int:
        x, tokens = jax.ShapeDtypeStruct((1, length, 8), jnp.float32), Tokens.arange(1, length)
        gradients = jax.grad(lambda x, taps: (long_convolution(x, taps, tokens=tokens) ** 2).sum(), (0, 1))
        return jax.jit(gradients).lower(x, x.update(shape=x.shape[1:])).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.1 * temporary(2048)


def test_taps_of_several_scales():
    segments = np.random.default_rng(0).normal(size=(3, 4, 2))
    at = np.arange(16)

    def stretched(values, factor):  # a value lies in the middle of its stretch, and the first and last go on outwards
        return np.interp((at + 0.5) / factor - 0.5, np.arange(4), values) * (at < 4 * factor)

    for channel in range(2):
        true = sum(0.5**i * stretched(segments[i, :, channel], 2**i) for i in range(3))
        np.testing.assert_allclose(multiscale_taps(jnp.float32(segments))[:, channel], true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda: short_convolution(np.ones((1, 8, 3)), np.ones((4, 2))), r"x \(1, 8, 3\) and taps \(4, 2\) do not fit"),
        (
            lambda: long_convolution(np.ones((1, 8, 3)), np.ones((8, 3)), tokens=Tokens.arange(1, 7)),
            "need .*\\(1, 8\\)",
        ),
        (
            lambda: short_convolution(jnp.ones((1, 8, 6)), jnp.ones((4, 6)), parallel=StateScan(mesh(sequence=4))),
            "deals the channels of the convolution to the 4 devices .* 6 do not divide",
        ),
    ],
)
def test_bad_input_is_answered(call, answer):
    with pytest.raises(UserError, match=answer):
        call()
