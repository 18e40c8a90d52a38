"""The delta product: its steps one after the other, in parts too, and over a sharded sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import delta_product as oracle
from oracles.linear_variants import sigmoid
from striate import Tokens, UserError
from striate.lib.delta_product import delta_product, mean_of_three
from striate.lib.layouts import Striped, ZigZag
from striate.lib.linear_attention import linear_attention
from striate.lib.linear_variants import unit
from striate.lib.parallel import ReorderedScan, StateScan, ValueColumns
from suites.attention import mesh
from suites.members import (
    Member,
    Problem,
    check_documents_do_not_mix,
    check_gradients,
    check_memory_is_linear,
    check_values,
    problem,
)


class Product(Member):
    def true(self, given, *arrays):
        return self.truth(given.document, *(arrays or given[:3]))


def product(order: int, trick: str, decayed: bool = False) -> Product:
    """Of keys made to length 1, with strengths of the keys, and of values with decays that they say."""

    def run(q, k, v, **how):
        how |= {"log_decay": -jax.nn.sigmoid(v.sum(-1))} if decayed else {}
        return delta_product(q, unit(k), v, jax.nn.sigmoid(k.sum(-1)), order=order, trick=trick, **how)

    def truth(document, q, k, v):
        beta, log_decay = sigmoid(np.float64(k).sum(-1)), -decayed * sigmoid(np.float64(v).sum(-1))
        keys = k / np.linalg.norm(np.float64(k), axis=3, keepdims=True)
        return oracle.delta_product(document, q, keys, v, beta, log_decay, order, trick)

    return Product(run, truth)


PRODUCTS = {
    "derivative": product(2, "derivative"),
    "third derivative": product(3, "derivative"),
    "rotary": product(3, "rotary"),
    "both, decayed": product(2, "both", decayed=True),
}
every_product = pytest.mark.parametrize("name", PRODUCTS)


@every_product
@pytest.mark.parametrize("how", [{"implementation": "reference"}, {"chunk": 16}, {}], ids=str)
def test_every_product_is_its_steps(name, how):
    check_values(PRODUCTS[name], problem(), **how)


@pytest.mark.long
@pytest.mark.parametrize("name", ["third derivative", "both, decayed"])
def test_gradients_are_those_of_the_steps(name):
    check_gradients(PRODUCTS[name], problem(batch=1, length=19, heads=2, kv_heads=1), chunk=16)


def test_a_document_changes_no_bit_of_another_and_padding_none_at_all():
    given = problem(length=40)
    edited = (given.document == 2) | (given.document == -1)
    check_documents_do_not_mix(PRODUCTS["both, decayed"], given, edited, chunk=16)


@pytest.mark.parametrize("name", ["third derivative", "both, decayed"])
def test_a_product_goes_on_where_it_was_left(name):
    given = problem(length=36)
    given.document[:, [11, 12, 35]] = np.maximum(given.document[:, [11, 12, 35]], 0)
    state, parts = None, []

    @jax.jit
    def run(of_part: Problem, state):
        how = {"initial_state": state, "return_state": True, "chunk": 16}
        return PRODUCTS[name].run(*of_part[:3], tokens=of_part.tokens, **how)

    for cut in (np.s_[:, :12], np.s_[:, 12:13], np.s_[:, 13:]):
        out, state = run(Problem(*(x[cut] for x in given)), state)
        parts.append(out)
    true = PRODUCTS[name].true(given)
    np.testing.assert_allclose(np.concatenate(parts, 1), true, rtol=1e-5, atol=1e-5 * abs(true).max())


SYSTEMS = {
    "zigzag": lambda: StateScan(mesh(sequence=4), layout=ZigZag(4)),
    "striped": lambda: ReorderedScan(mesh(sequence=4), layout=Striped(4, 2)),
    "columns": lambda: ValueColumns(mesh(sequence=4), layout=Striped(4, 1)),
}
every_system = pytest.mark.parametrize("system", SYSTEMS)


@every_system
def test_a_product_runs_over_a_sharded_sequence(system):
    given, parallel = problem(length=32, width=4, value_width=4), SYSTEMS[system]()
    laid_out = Problem(*(parallel.layout.permute(x) for x in given))
    member = PRODUCTS["third derivative"]
    out, true = member(laid_out, parallel=parallel, chunk=16), member.true(given)
    np.testing.assert_allclose(parallel.layout.restore(out), true, rtol=1e-5, atol=1e-5 * abs(true).max())


@every_system
def test_repeated_tokens_lie_in_the_order_of_the_stretched_layout(system):
    layout = SYSTEMS[system]().layout
    stretched = SYSTEMS[system]().stretched(3).layout
    x = np.arange(32)[None]
    np.testing.assert_array_equal(stretched.permute(x.repeat(3, 1)), layout.permute(x).repeat(3, 1))


def test_order_one_is_the_delta_rule():
    given, beta = problem(), np.random.default_rng(1).random((2, 37, 2)).astype(np.float32)

    def run(function, **how):
        return jax.jit(lambda q, k, v: function(q, unit(k), v, beta=beta, tokens=given.tokens, chunk=16, **how))

    out, rule = run(delta_product, order=1, trick="both"), run(linear_attention, rule="delta")
    np.testing.assert_allclose(out(*given[:3]), rule(*given[:3]), rtol=1e-6, atol=1e-6)


def test_with_keys_at_right_angles_it_stores_and_overwrites_exactly():
    rng = np.random.default_rng(0)
    place = np.concatenate([np.arange(8), rng.integers(0, 8, 24)])
    k, v = np.eye(8, dtype=np.float32)[place], rng.integers(-9, 10, (32, 3)).astype(np.float32)
    asked = rng.integers(0, 8, 32)
    last = [max((s for s in range(t + 1) if place[s] == asked[t]), default=None) for t in range(32)]
    q = np.eye(8, dtype=np.float32)[asked]
    arrays = (x[None, :, None] for x in (q, k, v))
    out = delta_product(*arrays, jnp.ones((1, 32, 1)), order=1, chunk=16)[0, :, 0]
    np.testing.assert_array_equal(out, [0 * v[0] if s is None else v[s] for s in last])


def test_half_precision_is_rounded_at_the_ends_alone():
    given = problem(batch=1)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (given.q, unit(given.k), given.v)]
    run = jax.jit(functools.partial(delta_product, beta=jnp.full((1, 37, 2), 0.5), tokens=given.tokens, chunk=16))
    out, want = run(*half), run(*(x.astype(jnp.float32) for x in half))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), want, rtol=2**-7, atol=2**-7 * abs(want).max())


@pytest.mark.long
def test_memory_is_linear_in_the_length():
    check_memory_is_linear(PRODUCTS["derivative"], chunk=16)


class TestMeanOfThree:
    def given(self, length=37):
        given = problem(length=length, kv_heads=1, width=4)
        return given.k[:, :, 0], given.tokens

    def test_it_is_its_definition(self):
        x, tokens = self.given()
        np.testing.assert_allclose(
            mean_of_three(x, tokens=tokens)[0], oracle.mean_of_three(tokens.document, x), rtol=1e-5, atol=1e-6
        )

    @every_system
    def test_over_a_sharded_sequence_and_from_a_tail(self, system):
        x, tokens = self.given(64)
        tokens.document[:, 31] = np.maximum(tokens.document[:, 31], 0)
        parallel, tail, parts = SYSTEMS[system](), None, []
        run = jax.jit(functools.partial(mean_of_three, parallel=parallel))
        for cut in (np.s_[:, :32], np.s_[:, 32:]):
            own_x, own = parallel.layout.permute((x[cut], tokens.map(lambda x, cut=cut: x[cut])))
            mean, tail = run(own_x, tokens=own, initial_tail=tail)
            parts.append(parallel.layout.restore(mean))
        want = oracle.mean_of_three(tokens.document, x)
        np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "answer"),
    [
        ({"order": 0}, "order 0 and trick 'derivative' cannot be: the order is at least 1"),
        ({"trick": "finite"}, "tricks are 'derivative', 'rotary', 'both'"),
        ({"tokens": Tokens.arange(1, 8)}, r"tokens have shape \(1, 8\)"),
    ],
)
def test_bad_input_is_answered(how, answer):
    with pytest.raises(UserError, match=answer):
        delta_product(*problem()[:3], np.ones((2, 37, 2), np.float32), **how)
