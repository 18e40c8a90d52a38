"""The linear recurrence: every rule and decay, in chunks and token by token, with documents and states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.linear import Problem, recurrence
from striate import Tokens, UserError
from striate.lib.linear_attention import linear_attention

DECAYS = ("none", "head", "token", "channel")
KINDS = [("sum", False, decay) for decay in DECAYS] + [("sum", True, "token"), ("sum", True, "channel")]
KINDS += [("delta", False, decay) for decay in DECAYS]


def documents(rng, batch: int, length: int) -> np.ndarray:
    """Ragged ones, with padding between and at the ends, and one whose number comes again."""
    document = np.stack([np.sort(rng.integers(0, 5, length)) for _ in range(batch)])
    document[document == 3] = 1
    document[rng.random((batch, length)) < 0.1] = -1
    return document.astype(np.int32)


def problem(
    rule, normalise, decay, seed=0, batch=2, length=75, heads=4, kv_heads=2, width=8, value_width=5, strength=1.0
):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, k = normal(batch, length, heads, width), normal(batch, length, kv_heads, width)
    if normalise:
        q, k = np.exp(q), np.exp(k)
    if rule == "delta":
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    shapes = {"head": (kv_heads,), "token": (batch, length, kv_heads), "channel": (batch, length, kv_heads, width)}
    g = None if decay == "none" else -strength * np.exp(normal(*shapes[decay]))
    beta = rng.random((batch, length, kv_heads)).astype(np.float32) if rule == "delta" else None
    v = normal(batch, length, kv_heads, value_width)
    return Problem(rule, normalise, q, k, v, g, beta, documents(rng, batch, length))


def attend(given: Problem, **how):
    tokens = Tokens(position=np.zeros_like(given.document), document=given.document)
    fixed = {"rule": given.rule, "normalise": given.normalise, "tokens": tokens, "return_state": True}
    return linear_attention(given.q, given.k, given.v, log_decay=given.log_decay, beta=given.beta, **fixed, **how)


def part(given: Problem, start: int, stop: int) -> Problem:
    def cut(x):
        return x if x is None or x.ndim < 2 else x[:, start:stop]

    return Problem(*given[:2], *map(cut, given[2:]))


@pytest.mark.parametrize(
    "how", [{"implementation": "reference"}, {"chunk": 16}, {"chunk": 32}, {"chunk": 100}, {}], ids=str
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_form_is_the_recurrence(kind, how):
    given = problem(*kind)
    true, states = recurrence(given)
    out, state = attend(given, **how)
    np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())
    np.testing.assert_allclose(state.memory, states, rtol=1e-5, atol=1e-5 * abs(states).max())


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_those_of_the_recurrence(kind):
    given = problem(*kind)
    names = [name for name in ("q", "k", "v", "log_decay", "beta") if getattr(given, name) is not None]
    rng = np.random.default_rng(9)
    d_out = rng.normal(size=(*given.q.shape[:3], given.v.shape[3]))
    d_memory = rng.normal(size=(2, 2, *given.k.shape[3:], *given.v.shape[3:]))

    def gradients(dtype, **how):
        def loss(arrays):
            out, state = attend(given._replace(**dict(zip(names, arrays, strict=True))), **how)
            return (out * d_out.astype(dtype)).sum() + (state.memory * d_memory.astype(dtype)).sum()

        return jax.jit(jax.grad(loss))([getattr(given, name).astype(dtype) for name in names])

    with jax.enable_x64(True):
        true = [np.asarray(x) for x in gradients(np.float64, implementation="reference")]
    for name, got, want in zip(names, gradients(np.float32, chunk=32), true, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * abs(want).max(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_state_goes_on_where_it_was_left(kind):
    given = problem(*kind)
    whole, state = attend(given, chunk=32)
    parts, at = [], None
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 75)):
        out, at = attend(part(given, start, stop), chunk=16, initial_state=at)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for x, y in zip(at, state, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("strength", [1e-6, 50.0, 1e4])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[2] != "none"], ids=str)
def test_weak_and_strong_decays(kind, strength):
    given = problem(*kind, strength=strength)
    true, _ = recurrence(given)
    out, state = attend(given)
    np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())

    def loss(v, log_decay):
        return (attend(given._replace(v=v, log_decay=log_decay))[0] ** 2).sum()

    assert all(np.isfinite(x).all() for x in jax.grad(loss, (0, 1))(given.v, given.log_decay))
    assert np.isfinite(state.memory).all()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_document_changes_no_bit_of_another(kind):
    given = problem(*kind, length=100)
    edited = given.document == 2
    assert edited.any() and not edited.all()
    other = problem(*kind, length=100, seed=1)

    def mixed(x, y):
        return x if x is None or x.ndim < 2 else np.where(edited.reshape(2, 100, *(1,) * (x.ndim - 2)), y, x)

    changed = Problem(*given[:2], *(mixed(x, y) for x, y in zip(given[2:7], other[2:7], strict=True)), given.document)

    @functools.partial(jax.jit, static_argnums=0)
    def results(_, given_arrays):
        def run(q, k, v):
            return attend(given._replace(**{**given_arrays, "q": q, "k": k, "v": v}), chunk=16)[0]

        out, pull = jax.vjp(run, *(given_arrays[name] for name in "qkv"))
        return out, *pull(jnp.ones_like(out))

    def both(of: Problem):
        return results(
            None, {name: x for name, x in of._asdict().items() if isinstance(x, np.ndarray) and name != "document"}
        )

    for before, after in zip(both(given), both(changed), strict=True):
        np.testing.assert_array_equal(np.asarray(before)[~edited], np.asarray(after)[~edited])
        assert (np.asarray(before)[edited] != np.asarray(after)[edited]).any()


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"rule": "sums"}, "rule 'sums' is not known; there are 'sum', 'delta'"),
        ({"beta": np.ones((2, 75, 2), np.float32)}, "beta has shape .* under the rule 'sum'"),
        ({"log_decay": np.zeros(3, np.float32)}, r"log_decay has shape \(3,\); it needs one of \(2,\), \(2, 75, 2\)"),
        ({"q": np.ones((2, 75, 3, 8), np.float32)}, "heads a multiple of k's heads"),
        ({"v": np.ones((2, 74, 2, 8), np.float32)}, "do not fit"),
    ],
)
def test_bad_input_is_answered(change, answer):
    with pytest.raises(UserError, match=answer):
        attend(problem("sum", False, "none")._replace(**change))
    with pytest.raises(UserError, match="chunk is 0"):
        attend(problem("sum", False, "none"), chunk=0)
