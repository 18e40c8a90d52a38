"""Linear recurrences over a sharded sequence: every strategy is the recurrence, and what it sends does not grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.linear import Problem, recurrence
from striate import UserError
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.parallel import ReorderedScan, StateScan, ValueColumns
from suites.attention import mesh
from suites.jaxprs import equations
from suites.linear import KINDS, attend, check_gradients, problem

SYSTEMS = {
    "contiguous, gather": lambda n: (StateScan(mesh(sequence=n), exchange="gather"), Contiguous(n)),
    "contiguous, steps": lambda n: (StateScan(mesh(sequence=n), exchange="steps"), Contiguous(n)),
    "zigzag, gather": lambda n: (StateScan(mesh(sequence=n), layout=ZigZag(n), exchange="gather"), ZigZag(n)),
    "zigzag, steps": lambda n: (StateScan(mesh(sequence=n), layout=ZigZag(n), exchange="steps"), ZigZag(n)),
    "reordered": lambda n: (ReorderedScan(mesh(sequence=n), layout=Striped(n, 1)), Striped(n, 1)),
    "columns": lambda n: (ValueColumns(mesh(sequence=n), layout=Striped(n, 2)), Striped(n, 2)),
}
ONE_OF_EACH = [("sum", True, "token"), ("sum", False, "channel"), ("delta", False, "token")]
PAIRS = [*((ONE_OF_EACH[0], name) for name in SYSTEMS), *((kind, "zigzag, steps") for kind in ONE_OF_EACH[1:])]


def solve(given: Problem, parallel, layout, **how):
    """As `attend`, the tokens in the order of the layout on their way."""

    def laid_out(x):
        return x if x is None or x.ndim < 2 else layout.permute(x)

    out, state = attend(Problem(*given[:2], *map(laid_out, given[2:])), parallel=parallel, chunk=16, **how)
    return layout.restore(out), state


def check(kind, name: str, shards: int):
    given = problem(*kind, length=64, value_width=8)
    true, states = recurrence(given)
    out, state = jax.jit(lambda: solve(given, *SYSTEMS[name](shards)))()
    np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())
    np.testing.assert_allclose(state.memory, states, rtol=1e-5, atol=1e-5 * abs(states).max())


@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=str)
def test_every_strategy_is_the_recurrence(kind, name):
    check(kind, name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_rule_on_every_number_of_shards(kind, name, shards):
    check(kind, name, shards)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=str)
def test_gradients_are_those_of_the_recurrence(kind, name):
    parallel, layout = SYSTEMS[name](4)
    run = functools.partial(solve, parallel=parallel, layout=layout)
    check_gradients(problem(*kind, length=64, value_width=8), run)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_of_every_rule_on_eight_shards(kind, name):
    parallel, layout = SYSTEMS[name](8)
    run = functools.partial(solve, parallel=parallel, layout=layout)
    check_gradients(problem(*kind, length=64, value_width=8), run)


@pytest.mark.long
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_state_goes_in_and_comes_out(name):
    given = problem("sum", True, "token", length=64, value_width=8)
    first, second = (
        Problem(*given[:2], *(None if x is None else x[:, cut] for x in given[2:])) for cut in (np.s_[:32], np.s_[32:])
    )
    _, state = attend(first, chunk=16)

    def gradients(run, memory, total):
        def loss(memory, total):
            out, end = run(second, initial_state=state._replace(memory=memory, total=total))
            return jnp.sin(out).sum() + (end.memory**2).sum(), (out, end)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(memory, total)

    runs = functools.partial(solve, parallel=SYSTEMS[name](4)[0], layout=SYSTEMS[name](4)[1]), attend
    got, want = (jax.jit(functools.partial(gradients, run))(state.memory, state.total) for run in runs)
    assert all(abs(x).max() > 0.01 for x in want[1])
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=str)
def test_a_document_changes_no_bit_of_another(kind, name):
    given, other = (problem(*kind, seed=seed, length=64, value_width=8) for seed in (0, 1))
    edited = given.document == 2
    assert edited.any() and not edited.all()

    def mixed(x, y):
        return None if x is None else np.where(edited.reshape(2, 64, *(1,) * (x.ndim - 2)), y, x)

    changed = Problem(*given[:2], *map(mixed, given[2:7], other[2:7]), given.document)
    parallel, layout = SYSTEMS[name](4)

    @jax.jit
    def results(*arrays):
        def run(q, k, v):
            return solve(given._replace(q=q, k=k, v=v, log_decay=arrays[3], beta=arrays[4]), parallel, layout)[0]

        out, pull = jax.vjp(run, *arrays[:3])
        return out, *pull(jnp.ones_like(out))

    for before, after in zip(results(*given[2:7]), results(*changed[2:7]), strict=True):
        np.testing.assert_array_equal(np.asarray(before)[~edited], np.asarray(after)[~edited])
        assert (np.asarray(before)[edited] != np.asarray(after)[edited]).any()


def test_states_of_striped_tokens_would_be_silently_wrong():
    given = problem("sum", False, "none", length=64, value_width=8)
    true, _ = recurrence(given)
    out, _ = solve(given, StateScan(mesh(sequence=4)), Striped(4, 1))
    assert np.isfinite(out).all() and abs(out - true).max() > 0.1 * abs(true).max()


def sent(parallel, length: int) -> dict[str, int]:
    """Bytes that a device hands to each kind of collective, forward and backward."""
    given = problem("sum", False, "token", length=length, value_width=8)
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda v: solve(given._replace(v=v), parallel, Contiguous(parallel.shards))[0].sum())
    )(given.v)
    names = ("all_gather", "ppermute", "psum", "reduce_scatter", "all_to_all")
    return {
        name: sum(times * x.aval.size * 4 for equation, times in equations(jaxpr.jaxpr, name) for x in equation.invars)
        for name in names
    }


@pytest.mark.parametrize("exchange", ["gather", "steps"])
def test_what_travels_does_not_grow_with_the_length(exchange):
    parallel = StateScan(mesh(sequence=8), exchange=exchange)
    short, long = sent(parallel, 64), sent(parallel, 256)
    assert short == long
    state = 2 * 2 * 8 * 8 * 4  # batch, heads, D, V
    passed = short["all_gather"] if exchange == "gather" else short["ppermute"]
    # Transitions and documents come to it; steps are three and one to the neighbour, and as many backward.
    assert passed < 1.3 * state if exchange == "gather" else passed < 1.3 * 8 * state


def test_the_exchange_is_chosen_by_what_a_device_holds():
    few, many = sent(StateScan(mesh(sequence=8)), 64), sent(StateScan(mesh(sequence=8)), 2048)
    assert few["ppermute"] and not few["all_gather"]
    assert many["all_gather"] and not many["ppermute"]


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (
            lambda: StateScan(mesh(sequence=4), layout=Striped(4, 1)),
            r"tokens of other devices lie between.*ZigZag\(4\)",
        ),
        (lambda: StateScan(mesh(sequence=4), layout=ZigZag(8)), "for 8 shards, and mesh axis 'sequence' has 4 devices"),
        (
            lambda: StateScan(mesh(sequence=4), exchange="ring"),
            "exchange 'ring' is not known; there are 'gather', 'steps'",
        ),
        (lambda: ReorderedScan(mesh(sequence=4), layout=ZigZag(4)), "is for a Striped layout"),
        (lambda: sent(ValueColumns(mesh(sequence=3)), 66), "deals the columns of the values to the 3 devices"),
        (lambda: sent(ReorderedScan(mesh(sequence=8), layout=Striped(8, 4)), 64), "= 256, and it is 64: use 256"),
    ],
)
def test_bad_input_is_answered(make, answer):
    with pytest.raises(UserError, match=answer):
        make()
