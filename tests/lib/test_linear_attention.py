"""The linear recurrence: every rule and decay, in chunks and token by token, with documents and states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.linear import Problem, recurrence
from striate import UserError
from suites.linear import KINDS, attend, check_gradients, part, problem


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
    check_gradients(problem(*kind), chunk=32)


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
