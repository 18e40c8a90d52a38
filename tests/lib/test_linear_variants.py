"""Members of the family of linear attention: each is its definition, in parts too, and over a sharded sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import linear_variants as oracle
from oracles.derivatives import gradients
from striate import Tokens, UserError, positions
from striate.lib.layouts import Striped, ZigZag
from striate.lib.linear_attention import linear_attention
from striate.lib.linear_variants import (
    elu_plus_one,
    flow,
    gated_lru,
    higher_order,
    least_squares_step,
    lightning_log_decay,
    running_softmax,
    unit,
)
from striate.lib.parallel import ReorderedScan, StateScan, ValueColumns
from suites.attention import mesh
from suites.linear import documents
from suites.members import (
    Member,
    Problem,
    check_documents_do_not_mix,
    check_gradients,
    check_memory_is_linear,
    check_values,
    problem,
)


def ordered(order: str) -> Member:
    return Member(functools.partial(higher_order, order=order), functools.partial(oracle.higher_order, order=order))


def normalised(q, k, v):
    """Of positive features."""
    return oracle.higher_order(q, k, v, "third") / oracle.higher_order(q, k, np.ones((len(q), 1)), "third")


MEMBERS = {
    "running softmax": Member(running_softmax, oracle.running_softmax),
    "flow": Member(flow, oracle.causal_flow),
    "second": ordered("second"),
    "asymmetric": ordered("asymmetric"),
    "third": ordered("third"),
}
every_member = pytest.mark.parametrize("name", MEMBERS)


@every_member
@pytest.mark.parametrize("how", [{"implementation": "reference"}, {"chunk": 16}], ids=str)
def test_every_member_is_its_definition(name, how):
    check_values(MEMBERS[name], problem(), **how)


@pytest.mark.long
@every_member
def test_gradients_are_those_of_the_definition(name):
    check_gradients(MEMBERS[name], problem(batch=1, length=19, heads=2, kv_heads=1), chunk=16)


@pytest.mark.long
@every_member
def test_a_document_changes_no_bit_of_another_and_padding_none_at_all(name):
    given = problem(length=40)
    check_documents_do_not_mix(MEMBERS[name], given, (given.document == 2) | (given.document == -1), chunk=16)


@pytest.mark.long
@every_member
def test_no_gradient_flows_from_what_comes_later_or_is_of_another_document(name):
    given = problem(batch=1, length=20, heads=2, kv_heads=1)
    weights = np.random.default_rng(4).normal(size=(2, 2)).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def slopes(arrays):
        out = MEMBERS[name].run(*arrays, tokens=given.tokens, chunk=16)
        return jnp.einsum("thv,hv->t", out[0], weights)

    reached = np.zeros((20, 20), bool)
    for x in slopes(given[:3]):
        reached |= (np.asarray(x)[:, 0] != 0).any((2, 3))
    seen = np.zeros((20, 20), bool)
    for place in oracle.by_run(given.document[0]):
        seen[np.ix_(place, place)] = np.tri(len(place), dtype=bool)
    np.testing.assert_array_equal(reached, seen)


@every_member
def test_a_member_goes_on_where_it_was_left(name):
    given = problem(length=36)
    whole, state, parts = MEMBERS[name].true(given), None, []

    @jax.jit
    def run(of_part: Problem, state):
        how = {"initial_state": state, "return_state": True, "chunk": 16}
        return MEMBERS[name].run(*of_part[:3], tokens=of_part.tokens, **how)

    for start in (0, 12, 24):
        out, state = run(Problem(*(x[:, start : start + 12] for x in given)), state)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5 * abs(whole).max())


STRIPED = Striped(4, 1)
SYSTEMS = {
    "zigzag": lambda: StateScan(mesh(sequence=4), layout=ZigZag(4)),
    "striped": lambda: ReorderedScan(mesh(sequence=4), layout=STRIPED),
    "columns": lambda: ValueColumns(mesh(sequence=4), layout=STRIPED),
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "system"), [*((name, "zigzag") for name in MEMBERS), *(("running softmax", x) for x in SYSTEMS)][1:]
)
def test_a_member_runs_over_a_sharded_sequence(name, system):
    given, parallel = problem(length=32, width=4, value_width=4), SYSTEMS[system]()
    laid_out = Problem(*(parallel.layout.permute(x) for x in given))
    out, true = MEMBERS[name](laid_out, parallel=parallel, chunk=16), MEMBERS[name].true(given)
    np.testing.assert_allclose(parallel.layout.restore(out), true, rtol=1e-5, atol=1e-5 * abs(true).max())


@pytest.mark.long
def test_gradients_cross_devices():
    given = problem(batch=1, length=16, heads=2, kv_heads=1, strength=3.0)
    check_gradients(MEMBERS["running softmax"], given, parallel=StateScan(mesh(sequence=4)), chunk=16)


@every_member
def test_half_precision_is_rounded_at_the_ends_alone(name):
    given = problem(batch=1)
    half = Problem(*(jnp.asarray(x, jnp.bfloat16) for x in given[:3]), given.document)
    out, true = MEMBERS[name](half, chunk=16), MEMBERS[name].true(half)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out), true, rtol=2**-7, atol=2**-7 * abs(true).max())


@pytest.mark.long
@every_member
def test_memory_is_linear_in_the_length(name):
    check_memory_is_linear(MEMBERS[name], chunk=16)


def test_lightning_decays_by_head_and_layer():
    np.testing.assert_allclose(lightning_log_decay(4), -(2.0 ** -np.array([2, 4, 6, 8])), rtol=1e-6)
    first, last = (lightning_log_decay(8, layer, 12) for layer in (0, 11))
    np.testing.assert_allclose(first, lightning_log_decay(8) * (1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(last, lightning_log_decay(8) * 1e-5, rtol=1e-2)
    assert np.isfinite(lightning_log_decay(8, 0, 1)).all()
    q, k, v, _ = problem(heads=2, batch=1)
    ages = np.arange(37)[:, None] - np.arange(37)[None]
    out = linear_attention(q, k, v, log_decay=lightning_log_decay(2), chunk=16)
    for head, slope in enumerate((2**-4, 2**-8)):
        decayed = np.tril(np.exp(-slope * ages.clip(0)) * (q[0, :, head] @ k[0, :, head].T)) @ v[0, :, head]
        np.testing.assert_allclose(out[0, :, head], decayed, rtol=1e-5, atol=1e-5 * abs(decayed).max())


def test_features():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 30
    np.testing.assert_allclose(elu_plus_one(x), np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: elu_plus_one(x).sum())(x)).all()
    np.testing.assert_allclose(unit(x), x / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(np.zeros_like(x))).all()


class TestRunningSoftmax:
    """Weights are a softmax over time in each channel."""

    attend = staticmethod(jax.jit(functools.partial(running_softmax, chunk=16), static_argnames="position"))

    def test_values_of_one_give_the_sum_of_the_query(self):
        q, f, v, _ = problem(strength=10.0)
        out = self.attend(q, f, np.ones_like(v))
        np.testing.assert_allclose(out, np.broadcast_to(q.sum(-1, keepdims=True), out.shape), rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("added", [100.0, -300.0])
    def test_a_constant_of_a_channel_changes_nothing(self, added):
        q, f, v, _ = problem()
        f = np.round(f * 64) / 64  # so that the sum is exact
        shift = (added + np.arange(3, dtype=np.float32))[None, None, None]
        np.testing.assert_allclose(self.attend(q, f + shift, v), self.attend(q, f, v), rtol=1e-5, atol=1e-5)

    def test_steep_logits_stay_exact_and_differentiable(self):
        given = problem(strength=100.0)
        check_values(MEMBERS["running softmax"], given, chunk=16)
        slopes = jax.grad(lambda f: (self.attend(given.q, f, given.v) ** 2).sum())(given.k)
        assert np.isfinite(slopes).all()

    def test_hidden_logits_count_for_nothing(self):
        given = problem()
        f = given.k.copy()
        f[np.random.default_rng(3).random(f.shape) < 0.4] = -np.inf
        f[:, :9, :, 0] = -np.inf
        check_values(MEMBERS["running softmax"], given._replace(k=f), chunk=16)
        slopes = jax.grad(lambda q, f: (self.attend(q, f, given.v) ** 2).sum(), (0, 1))(given.q, f)
        assert all(np.isfinite(x).all() for x in slopes)

    def test_the_influence_of_the_first_token_fades_as_one_in_t(self):
        q, f = np.ones((1, 4096, 1, 2), np.float32), np.zeros((1, 4096, 1, 2), np.float32)
        v = np.zeros((1, 4096, 1, 1), np.float32)
        v[0, 0] = 1
        np.testing.assert_allclose(self.attend(q, f, v)[0, :, 0, 0], 2 / np.arange(1, 4097), rtol=1e-6)

    def test_positions_turn_queries_and_keys(self):
        q, f, v, _ = problem(heads=2)
        tokens = Tokens.arange(2, 37)
        out = self.attend(q, f, v, tokens=tokens, position=positions.lrpe)
        frequency = np.float64(positions.frequencies(6))
        true = np.zeros(out.shape)
        for b, t, h in np.ndindex(2, 37, 2):
            weights = oracle.softmax_over_time(np.float64(f[b, : t + 1, h]))
            turned = np.cos((t - np.arange(t + 1))[:, None] * frequency[None]) * weights
            true[b, t, h] = (turned @ q[b, t, h]) @ v[b, : t + 1, h]
        np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())


class TestHigherOrder:
    def test_decays_are_those_of_the_steps(self):
        decay = np.float32(np.log(0.9))
        for order in ("second", "asymmetric", "third"):
            run = functools.partial(higher_order, order=order, log_decay=jnp.full((2,), decay))
            check_values(
                Member(run, functools.partial(oracle.higher_order, order=order, decay=0.9)), problem(), chunk=16
            )

    def test_normalised_weights_add_up_to_one(self):
        given = problem()
        given = given._replace(q=np.exp(given.q), k=np.exp(given.k))
        member = Member(functools.partial(higher_order, order="third", normalise=True), normalised)
        check_values(member, given, chunk=16)
        np.testing.assert_allclose(member(given._replace(v=np.ones_like(given.v)))[given.document >= 0], 1.0, rtol=1e-5)

    def test_two_hops_are_found_by_the_asymmetric_product_alone(self):
        """Leaf pairs, then pointers to them, then queries: the answer is two steps away."""
        eye, leaf = np.eye(6, dtype=np.float32), np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
        nothing, no_value = np.zeros((3, 6), np.float32), np.zeros((3, 4), np.float32)
        q = np.concatenate([nothing, eye[[1, 2, 0]], eye[[3, 4, 5]]])[None, :, None]
        k = np.concatenate([eye[:3], eye[3:], nothing])[None, :, None]
        v = np.concatenate([leaf, no_value, no_value])[None, :, None]
        found = higher_order(q, k, v, order="asymmetric")[0, 6:, 0]
        np.testing.assert_array_equal(found, leaf[[1, 2, 0]])
        np.testing.assert_array_equal(linear_attention(q, k, v)[0, 6:, 0], 0)

    def test_an_unknown_order_is_answered(self):
        with pytest.raises(UserError, match="order 'fourth' is not known; there are 'second', 'asymmetric', 'third'"):
            higher_order(*problem()[:3], order="fourth")


class TestLeastSquaresStep:
    """Systems x_{t+1} = W x_t: what a step of gradient descent on the pairs so far predicts."""

    def given(self, is_complex: bool, length=37):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, length, 2, 3)) + 1j * is_complex * rng.normal(size=(2, length, 2, 3))
        return np.complex64(x) if is_complex else np.float32(x.real), documents(rng, 2, length)

    def true(self, x, document):
        out = np.zeros(x.shape, np.complex128)
        for b, s in np.ndindex(x.shape[0], x.shape[2]):
            for place in oracle.by_run(document[b]):
                y = np.complex128(x[b, place, s])
                for t in range(1, len(y)):
                    step = y[1 : t + 1].T @ y[:t].conj() / t  # minus the gradient at W = 0
                    out[b, place[t], s] = step @ y[t]
        return out

    def run(self, x, document, **how):
        tokens = Tokens(position=document * 0, document=document)
        return jax.jit(lambda x: least_squares_step(x, tokens=tokens, chunk=16, **how))(x)

    @pytest.mark.parametrize("is_complex", [False, True])
    def test_it_is_a_step_on_the_squared_error(self, is_complex):
        x, document = self.given(is_complex)
        document[document == -1] = 4  # padding would lie between two of a system
        out = self.run(x, document)
        assert out.dtype == x.dtype
        np.testing.assert_allclose(out, self.true(x, document), rtol=1e-5, atol=1e-5)

    def test_the_step_is_what_the_gradient_of_the_error_says(self):
        x, _ = self.given(False)
        x = x[0, :, 0]

        def error(w):
            return 0.5 * ((x[1:] - x[:-1] @ w.T) ** 2).sum(1).mean()

        step = -jax.grad(error)(np.zeros((3, 3), np.float32))
        np.testing.assert_allclose(least_squares_step(x[None, :, None])[0, -1, 0], step @ x[-1], rtol=1e-4, atol=1e-5)

    def test_in_parts_and_over_devices(self):
        x, document = self.given(True, length=32)
        whole, state, parts = self.run(x, document), None, []
        for start in (0, 16):
            now = np.s_[:, start : start + 16]
            out, state = self.run(x[now], document[now], initial_state=state, return_state=True)
            parts.append(out)
        np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
        spread = self.run(x, document, parallel=StateScan(mesh(sequence=4)))
        np.testing.assert_allclose(spread, whole, rtol=1e-5, atol=1e-5)


class TestGatedLRU:
    def given(self, seed=0, batch=2, length=37, width=3):
        rng = np.random.default_rng(seed)
        u, i, r = (rng.normal(size=(batch, length, width)).astype(np.float32) for _ in range(3))
        rate = rng.uniform(0.01, 3, width).astype(np.float32)
        return u, oracle.sigmoid(i), oracle.sigmoid(r), rate, documents(rng, batch, length)

    def run(self, u, i, r, rate, document, **how):
        tokens = Tokens(position=np.zeros_like(document), document=document)
        return jax.jit(lambda *arrays: gated_lru(*arrays, tokens=tokens, **how))(u, i, r, rate)

    def true(self, document, u, i, r, rate):
        rate = np.broadcast_to(rate, u.shape)
        return oracle.over_documents(oracle.gated_lru, document, *(x[:, :, None] for x in (u, i, r, rate)))[:, :, 0]

    def test_where_the_gate_is_shut_a_state_stays_as_it_is(self):
        u, i, r, rate, document = self.given()
        document[:], r[:, 5:] = 0, 0
        h = np.asarray(self.run(u, i, r, rate, document))
        np.testing.assert_array_equal(h[:, 5:], h[:, 4:5].repeat(32, axis=1))

    @pytest.mark.parametrize("how", [{}, {"implementation": "reference"}, {"implementation": "xla"}], ids=str)
    def test_it_is_its_definition(self, how):
        given = self.given()
        np.testing.assert_allclose(self.run(*given, **how), self.true(given[4], *given[:4]), rtol=1e-5, atol=1e-6)

    def test_gradients_are_those_of_the_definition(self):
        *arrays, document = self.given(batch=1, length=19)
        d_out = np.random.default_rng(9).normal(size=arrays[0].shape)

        def loss(*arrays):
            return (self.run(*arrays, document) * d_out.astype(np.float32)).sum()

        want = gradients(functools.partial(self.true, document), arrays, d_out)
        for x, y in zip(jax.grad(loss, range(4))(*arrays), want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5 * abs(y).max())

    def test_frame_by_frame_is_the_whole(self):
        given = self.given(length=36)
        state, parts = None, []

        @jax.jit
        def run(state, rate, *arrays):
            tokens = Tokens(position=arrays[3] * 0, document=arrays[3])
            return gated_lru(*arrays[:3], rate, tokens=tokens, initial_state=state, return_state=True)

        for t in range(0, 36, 4):
            out, state = run(state, given[3], *(given[x][:, t : t + 4] for x in (0, 1, 2, 4)))
            parts.append(out)
        np.testing.assert_allclose(np.concatenate(parts, 1), self.true(given[4], *given[:4]), rtol=1e-5, atol=1e-6)

    def test_it_runs_over_a_sharded_sequence(self):
        given = self.given(length=32)
        out = self.run(*given, parallel=StateScan(mesh(sequence=4)))
        np.testing.assert_allclose(out, self.true(given[4], *given[:4]), rtol=1e-5, atol=1e-6)

    def test_without_recurrence_gate_the_state_stays_and_gradients_are_finite(self):
        u, i, r, rate, document = self.given()
        document = np.zeros_like(document)
        h = self.run(u, i, 0 * r, rate, document)
        np.testing.assert_array_equal(h, np.broadcast_to((i * u)[:, :1], h.shape))
        slopes = jax.grad(lambda r: (self.run(u, i, r, rate, document) ** 2).sum())(0 * r)
        assert np.isfinite(slopes).all() and (slopes != 0).any()

    def test_shapes_that_do_not_fit_are_answered(self):
        u, i, r, rate, _ = self.given()
        with pytest.raises(UserError, match=r"rate \(2,\) do not fit"):
            gated_lru(u, i, r, rate[:2])
