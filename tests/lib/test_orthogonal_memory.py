"""Orthogonal memory: the window and the mean of what is before it, in parts, and over a sharded sequence."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import blocks as oracle
from oracles import linear_variants
from oracles.derivatives import gradients
from striate import Tokens, UserError, attention, masks
from striate.lib.layouts import Striped, ZigZag
from striate.lib.orthogonal_memory import orthogonal_memory, orthonormal
from striate.lib.parallel import AllGather, ReorderedScan, Ring, StateScan, ValueColumns
from striate.lib.positions import Rope, frequencies
from suites.attention import mesh

FREQUENCY = frequencies(8)


class Problem(NamedTuple):
    q: np.ndarray
    x: np.ndarray
    free: np.ndarray
    tokens: Tokens

    def true(self, q, x, free, window, frequency, normalise=False):
        out, group = np.zeros(q.shape), q.shape[2] // x.shape[2]
        for b, h in np.ndindex(len(q), q.shape[2]):
            basis = oracle.orthonormal(free[h // group])
            for place in linear_variants.by_number(self.tokens.document[b]):
                arrays = np.float64(q[b, place, h]), np.float64(x[b, place, h // group])
                out[b, place, h] = oracle.orthogonal_memory(*arrays, basis, window, frequency, normalise)
        return out


def problem(seed=0, batch=2, length=37, heads=4, kv_heads=2, width=6, rank=4) -> Problem:
    """Ragged documents, with padding between and at the ends."""
    rng = np.random.default_rng(seed)
    shapes = (batch, length, heads, width), (batch, length, kv_heads, width), (kv_heads, rank, width)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    rng = np.random.default_rng(7)
    document = np.sort(rng.integers(0, 3, (batch, length))).astype(np.int32)
    document[rng.random((batch, length)) < 0.1] = -1
    position = np.zeros_like(document)
    for row, of in zip(position, document, strict=True):
        for place in linear_variants.by_number(of):
            row[place] = np.arange(len(place))
    return Problem(*arrays, Tokens(position=position, document=document))


STATIC = ("window", "normalise", "position", "return_state", "parallel", "recurrence")


@functools.partial(jax.jit, static_argnames=STATIC)
def attend(q, x, free, tokens, **how):
    return orthogonal_memory(q, x, orthonormal(free), tokens=tokens, **how)


def seen(given: Problem, out):
    return np.where((given.tokens.document >= 0)[..., None, None], out, 0)


@pytest.mark.parametrize("frequency", [None, FREQUENCY], ids=["", "positions"])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_it_is_its_definition(window, frequency):
    given = problem()
    out = attend(*given, window=window, frequency=frequency)
    true = given.true(*given[:3], window, frequency)
    np.testing.assert_allclose(seen(given, out), true, rtol=1e-5, atol=1e-5)


def test_rows_of_a_normalised_memory_are_as_long_as_tokens():
    given, how = problem(), {"window": 5, "frequency": FREQUENCY, "normalise": True}
    true = given.true(*given[:3], **how)
    np.testing.assert_allclose(seen(given, attend(*given, **how)), true, rtol=1e-5, atol=2e-5)
    slopes = jax.grad(lambda given: (attend(*given, **how) ** 2).sum(), allow_int=True)(given)
    assert all(np.isfinite(x).all() for x in slopes[:3])


def test_a_window_of_everything_is_softmax_attention():
    given, mask = problem(rank=6), masks.causal() & masks.same("document")
    rope = Rope()
    out = attend(*given, window=64, position=rope)
    turned = rope.queries(given.q, given.tokens), rope.keys(given.x, given.tokens)
    plain = attention(*turned, jnp.asarray(given.x), mask=mask, q_tokens=given.tokens)
    np.testing.assert_allclose(seen(given, out), seen(given, plain), rtol=1e-6, atol=1e-6)


def test_rows_stay_orthonormal_while_they_are_learned():
    rng = np.random.default_rng(0)
    free, target = (jnp.float32(rng.normal(size=(2, 5, 7))) for _ in range(2))
    np.testing.assert_allclose(orthonormal(free)[0], oracle.orthonormal(free[0]), rtol=1e-5, atol=1e-5)
    step = jax.jit(jax.value_and_grad(lambda free: ((orthonormal(free) - target) ** 2).sum()))
    losses = []
    for _ in range(40):
        loss, slope = step(free)
        free, losses = free - 0.1 * slope, [*losses, loss]
        rows = np.asarray(orthonormal(free))
        np.testing.assert_allclose(rows @ rows.swapaxes(1, 2), np.eye(5)[None].repeat(2, 0), atol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(orthonormal(rows), rows, atol=1e-6)


@pytest.mark.long
def test_gradients_are_those_of_the_definition():
    given = problem(batch=1, length=14, heads=2, kv_heads=1, width=4, rank=3)
    how = {"window": 3, "frequency": frequencies(6)}
    true = functools.partial(given.true, window=3, frequency=how["frequency"])
    d_out = np.random.default_rng(9).normal(size=given.q.shape)

    def loss(arrays):
        return (attend(*arrays, given.tokens, **how) * seen(given, d_out).astype(np.float32)).sum()

    for got, want in zip(jax.grad(loss)(given[:3]), gradients(true, given[:3], d_out), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * abs(want).max())


def test_nothing_later_and_nothing_of_another_document_changes_a_bit():
    given, other = problem(), problem(seed=1)
    document, position = given.tokens.document, given.tokens.position
    for edited in ((document == 1) & (position >= 7), document == 2, document == -1):
        assert edited.any()
        mixed = (np.where(edited[..., None, None], y, x) for x, y in zip(given[:2], other[:2], strict=True))
        before, after = (np.asarray(attend(*x, *given[2:], window=5)) for x in (given[:2], mixed))
        np.testing.assert_array_equal(before[~edited & (document >= 0)], after[~edited & (document >= 0)])
    edited = (document == 1) & (position < 5)
    changed = attend(*(np.where(edited[..., None, None], 1, x) for x in given[:2]), *given[2:], window=5)
    later = (document == 1) & (position >= 5)
    assert (np.asarray(changed) != before)[later].any((1, 2)).all()


@pytest.mark.long
def test_it_goes_on_where_it_was_left():
    given, state, parts, how = problem(), None, [], {"window": 5, "frequency": FREQUENCY}
    whole = attend(*given, **how)
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 30), (30, 37)):
        tokens, k_tokens = (given.tokens.map(lambda x, cut=cut: x[:, cut]) for cut in (slice(start, stop), slice(stop)))
        arrays = given.q[:, start:stop], given.x[:, :stop], given.free
        out, state = attend(*arrays, tokens, k_tokens=k_tokens, initial_state=state, return_state=True, **how)
        parts.append(out)
    np.testing.assert_allclose(seen(given, np.concatenate(parts, 1)), seen(given, whole), rtol=1e-5, atol=1e-5)


def test_the_running_mean_of_many_tokens_is_their_mean():
    rng = np.random.default_rng(0)
    q, x = (rng.normal(size=(1, 2000, 1, 4)).astype(np.float32) for _ in range(2))
    free = rng.normal(size=(1, 3, 4)).astype(np.float32)
    _, (state, _) = attend(q, x, free, Tokens.arange(1, 2000), window=10, return_state=True)
    mean = oracle.orthonormal(free[0]) @ np.float64(x[0, :, 0]).mean(0)
    np.testing.assert_allclose(state.memory[0, 0, 0] / state.total[0, 0], mean, atol=1e-6)


ZIGZAG, STRIPED = ZigZag(4), Striped(4, 1)
SYSTEMS = {
    "zigzag": lambda m: (Ring(m), StateScan(m, layout=ZIGZAG), ZIGZAG),
    "striped": lambda m: (AllGather(m), ReorderedScan(m, layout=STRIPED), STRIPED),
    "columns": lambda m: (Ring(m), ValueColumns(m, layout=STRIPED), STRIPED),
}


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS)
def test_it_runs_over_a_sharded_sequence(system):
    given = problem(length=32)
    parallel, recurrence, layout = SYSTEMS[system](mesh(sequence=4))
    q, x, tokens = layout.permute((given.q, given.x, given.tokens))
    out = attend(q, x, given.free, tokens, window=5, frequency=FREQUENCY, parallel=parallel, recurrence=recurrence)
    true = given.true(*given[:3], 5, FREQUENCY)
    np.testing.assert_allclose(seen(given, layout.restore(out)), true, rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_at_the_ends_alone():
    given = problem(batch=1)
    given = given._replace(q=jnp.bfloat16(given.q), x=jnp.bfloat16(given.x))
    out, true = attend(*given, window=5, frequency=FREQUENCY), given.true(*given[:3], 5, FREQUENCY)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(seen(given, np.float64(out)), true, rtol=2**-6, atol=2**-6)


@pytest.mark.long
def test_memory_is_linear_in_the_length():
    def temporary_bytes(length: int) -> int:
        def both(q, x):
            out, pull = jax.vjp(lambda q, x: orthogonal_memory(q, x, jnp.eye(4)[None], window=64), q, x)
            return out, *pull(out)

        array = jax.ShapeDtypeStruct((1, length, 1, 4), np.float32)
        return jax.jit(both).lower(array, array).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) < 2.2 * temporary_bytes(1024)


def test_what_does_not_fit_is_answered():
    given = problem()
    basis = orthonormal(given.free)
    with pytest.raises(UserError, match="a multiple of the heads of x"):
        orthogonal_memory(given.q[:, :, :3], given.x, basis, window=5)
    with pytest.raises(UserError, match=r"needs \(2, r, 6\), with r at most 6"):
        orthogonal_memory(given.q, given.x, jnp.ones((2, 7, 6)), window=5)
    with pytest.raises(UserError, match="window is 0"):
        orthogonal_memory(given.q, given.x, basis, window=0)
