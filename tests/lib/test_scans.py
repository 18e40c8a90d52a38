"""Scans: all states of the recurrence at once, and the running log-sum-exp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.linear import recurrence
from striate.lib.recurrence import Inputs, State
from striate.lib.scans import LogSumExp, scan
from suites.linear import KINDS, attend, check_gradients, documents, part, problem

SUMS = [kind for kind in KINDS if kind[0] == "sum"]


def attended(given, **how):
    return jax.jit(lambda: attend(given, implementation="scan", **how))()


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 50])
def test_a_scan_puts_together_what_is_of_one_segment_in_its_order(length):
    """Lines y = a x + b modulo a prime, one after the other: in another order they are another line."""
    rng = np.random.default_rng(length)
    segment, prime = np.sort(rng.integers(0, 4, (3, length)), axis=1), 97
    x, before = rng.integers(1, prime, (2, 3, length)), rng.integers(1, prime, (2, 3))

    def then(earlier, later):
        (a, b), (c, d) = earlier, later
        return a * c % prime, (c * b + d) % prime

    got = jax.jit(lambda *arrays: scan(then, *arrays))(tuple(x), segment, tuple(before))
    for row in range(3):
        line, now = before[:, row], 0
        for t in range(length):
            line = then(line, x[:, row, t]) if segment[row, t] == now else x[:, row, t]
            now = segment[row, t]
            assert [y[row, t] for y in got] == list(line)


@pytest.mark.parametrize("kind", SUMS, ids=str)
def test_a_scan_is_the_recurrence(kind):
    given = problem(*kind)
    true, states = recurrence(given)
    out, state = attended(given)
    np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())
    np.testing.assert_allclose(state.memory, states, rtol=1e-5, atol=1e-5 * abs(states).max())
    out, state = attended(part(given, 0, 31))
    rest, state = attended(part(given, 31, 75), initial_state=state)
    np.testing.assert_allclose(np.concatenate([out, rest], 1), true, rtol=1e-5, atol=1e-5 * abs(true).max())
    np.testing.assert_allclose(state.memory, states, rtol=1e-5, atol=1e-5 * abs(states).max())


def test_gradients_of_a_scan_are_those_of_the_recurrence():
    check_gradients(problem("sum", True, "channel"), implementation="scan")


def test_the_delta_rule_is_refused():
    with pytest.raises(NotImplementedError, match="'scan' is for the rule 'sum'"):
        attend(problem("delta", False, "none"), implementation="scan")


def log_sum_exp_inputs(f, document) -> Inputs:
    k = np.zeros((*f.shape[:3], 2), f.dtype)
    return Inputs(k[..., None, :1], k, np.where(document[:, :, None, None] == -1, -np.inf, f), None, None, document)


def features(seed=0, batch=2, length=75, heads=2, width=3, strength=20.0):
    rng = np.random.default_rng(seed)
    f = strength * rng.normal(size=(batch, length, heads, width)).astype(np.float32)
    f[rng.random(f.shape) < 0.1] = -np.inf
    return f, documents(rng, batch, length)


def log_sum_exp_of_a_document_so_far(f, document):
    """float64 (B, T, K, V), one token and one sum at a time; NaN at padding."""
    out = np.full(f.shape, np.nan)
    for b in range(len(f)):
        seen, now = [], None
        for t, number in enumerate(document[b]):
            if number == -1:
                continue
            seen, now = [*(seen if number == now else []), f[b, t]], number
            with np.errstate(divide="ignore"):
                out[b, t] = np.logaddexp.reduce(np.float64(seen), axis=0)
    return out


def empty(f) -> State:
    memory = jnp.zeros((f.shape[0], f.shape[2], 2, f.shape[3]))
    return State(memory, memory[..., 0], jnp.full(f.shape[0], -1, jnp.int32))


def check_is_log_sum_exp(out, true):
    """m + log s, from what `LogSumExp.run` gives."""
    m, s, _ = np.moveaxis(np.float64(out), 3, 0)
    real = ~np.isnan(true)
    np.testing.assert_array_equal((s == 0)[real], np.isneginf(true[real]))
    there = real & (s > 0)
    np.testing.assert_allclose((m + np.log(np.where(there, s, 1)))[there], true[there], rtol=3e-7, atol=1e-6)
    assert (s[there] >= 1).all()


def test_the_running_log_sum_exp_goes_on_from_run_to_run():
    f, document = features()
    form = LogSumExp("sum", False)
    run, leave = jax.jit(form.run), jax.jit(lambda inputs, state: form.summarise(inputs).after(state))
    whole, last = run(log_sum_exp_inputs(f, document), empty(f))
    check_is_log_sum_exp(whole, log_sum_exp_of_a_document_so_far(f, document))
    state, parts = empty(f), []
    for start in (0, 25, 50):
        of_run = log_sum_exp_inputs(f[:, start : start + 25], document[:, start : start + 25])
        after = leave(of_run, state)
        out, state = run(of_run, state)
        parts.append(out)
        for x, y in zip(after, state, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate(parts, 1)[:, :, :, 0], whole[:, :, :, 0])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-6)
    np.testing.assert_allclose(state.memory, last.memory, rtol=1e-6)


def test_summaries_of_neighbours_compose():
    f, document = features(seed=1, length=39)
    summarise, state = jax.jit(LogSumExp("sum", False).summarise), empty(f)
    runs = (slice(0, 13), slice(13, 26), slice(26, 39))
    first, second, third = (summarise(log_sum_exp_inputs(f[:, run], document[:, run])) for run in runs)
    one_by_one = third.after(second.after(first.after(state)))
    for composed in (first.then(second).then(third), first.then(second.then(third))):
        for x, y in zip(composed.after(state), one_by_one, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_a_hundred_thousand_equal_terms_add_up():
    f = np.full((1, 100_000, 1, 1), 7.0, np.float32)
    out, _ = jax.jit(LogSumExp("sum", False).run)(log_sum_exp_inputs(f, np.zeros((1, 100_000), np.int32)), empty(f))
    np.testing.assert_array_equal(out[0, :, 0, 1, 0], np.arange(1, 100_001))
