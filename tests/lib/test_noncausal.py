"""Linear attention to all of a document: in any order of the tokens, and as two recurrences."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from oracles import bidirectional
from oracles import linear_variants as oracle
from oracles.derivatives import gradients
from striate import Tokens, UserError
from striate.lib.layouts import ZigZag
from striate.lib.linear_attention import linear_attention
from striate.lib.noncausal import (
    Direction,
    centred_convolution,
    global_attention,
    global_flow,
    global_softmax,
    quasiseparable,
)
from striate.lib.parallel import StateScan
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

MEMBERS = {
    "attention": Member(global_attention, oracle.global_attention, oracle.by_number),
    "softmax": Member(global_softmax, oracle.global_softmax, oracle.by_number),
    "flow": Member(global_flow, oracle.global_flow, oracle.by_number),
}
every_member = pytest.mark.parametrize("name", MEMBERS)


@every_member
def test_every_member_is_its_definition(name):
    check_values(MEMBERS[name], problem())


@every_member
def test_gradients_are_those_of_the_definition(name):
    check_gradients(MEMBERS[name], problem(batch=1, length=13, heads=2, kv_heads=1))


@every_member
def test_a_document_changes_no_bit_of_another_and_padding_none_at_all(name):
    given = problem(length=40)
    check_documents_do_not_mix(MEMBERS[name], given, (given.document == 2) | (given.document == -1))


@every_member
def test_tokens_in_another_order_give_the_same_in_that_order(name):
    given, order = problem(), np.random.default_rng(2).permutation(37)
    out = MEMBERS[name](Problem(*(x[:, order] for x in given)))
    np.testing.assert_allclose(out, MEMBERS[name](given)[:, order], rtol=2e-5, atol=1e-5)


@pytest.mark.long
@every_member
def test_memory_is_linear_in_the_length(name):
    check_memory_is_linear(MEMBERS[name])


def test_over_a_sharded_sequence_only_sums_cross():
    given, over = problem(length=64), mesh(sequence=4)
    place = NamedSharding(over, P(None, "sequence"))
    arrays = [jax.device_put(x, place) for x in given]

    def attend(q, k, v, document):
        return global_softmax(q, k, v, tokens=Tokens(position=document * 0, document=document))

    compiled = jax.jit(attend, out_shardings=place).lower(*arrays).compile()
    true = MEMBERS["softmax"].true(given)
    np.testing.assert_allclose(compiled(*arrays), true, rtol=1e-5, atol=1e-5 * abs(true).max())
    assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()


def test_softmax_is_stable_and_its_weights_add_up_to_one():
    q, f, v, document = given = problem(strength=100.0)
    check_values(MEMBERS["softmax"], given)
    q = np.asarray(jax.nn.softmax(q))
    out = MEMBERS["softmax"](Problem(q, f, np.ones_like(v), document))
    np.testing.assert_allclose(out[document >= 0], 1.0, rtol=1e-5)


def test_no_decay_in_both_directions_less_the_own_term_is_global_attention():
    q, k, v, document = problem(heads=2)
    document = np.sort(document)  # where a number comes again, a recurrence has lost it
    tokens = Tokens(position=document * 0, document=document)
    backwards = linear_attention(q[:, ::-1], k[:, ::-1], v[:, ::-1], tokens=tokens.map(lambda x: x[:, ::-1]))[:, ::-1]
    own = np.where(document[:, :, None, None] >= 0, (q * k).sum(-1, keepdims=True) * v, 0)
    both = linear_attention(q, k, v, tokens=tokens) + backwards - own
    np.testing.assert_allclose(both, global_attention(q, k, v, tokens=tokens), rtol=1e-5, atol=1e-5)


def test_over_the_tokens_so_far_it_is_the_recurrence_without_a_decay():
    q, k, v, _ = problem(batch=1, length=9)
    prefixes = np.where(np.tri(9, dtype=bool), 0, -1).astype(np.int32)
    tokens = Tokens(position=prefixes * 0, document=prefixes)
    each = global_attention(*(x.repeat(9, axis=0) for x in (q, k, v)), tokens=tokens)
    np.testing.assert_allclose(each[np.arange(9), np.arange(9)], linear_attention(q, k, v)[0], rtol=1e-5, atol=1e-5)


def test_scaled_by_the_number_of_tokens_it_is_their_mean():
    q, k, v, _ = problem(batch=1, length=25, heads=2)
    out = global_attention(q / 5, k / 5, v)  # both divided by sqrt(n), of Efficient Attention
    mean = np.einsum("bthd,bshd,bshv->bthv", *np.float64([q, k]), np.float64(v)) / 25
    np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-5)


class TestCentredConvolution:
    def given(self, seed=0, taps=5, length=40):
        rng = np.random.default_rng(seed)
        shapes = (2, length, 3), (taps, 3), (2, length, 3)
        x, kernel, d_y = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        document = documents(np.random.default_rng(3), 2, length)
        return x, kernel, d_y, document, Tokens(position=0 * document, document=document)

    @pytest.mark.parametrize("taps", [1, 5])
    def test_it_is_the_sum_over_the_taps_of_both_sides(self, taps):
        x, kernel, d_y, document, tokens = self.given(taps=taps)
        y, pull = jax.vjp(lambda x, kernel: centred_convolution(x, kernel, tokens=tokens), x, kernel)
        np.testing.assert_allclose(y, bidirectional.centred_convolution(x, kernel, document), rtol=1e-5, atol=1e-5)
        d_x, d_kernel = pull(d_y)
        dx, dk, *_ = self.given(seed=1, taps=taps)  # the sum is linear in both
        true = bidirectional.centred_convolution
        np.testing.assert_allclose((d_x * dx).sum(), (true(dx, kernel, document) * d_y).sum(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose((d_kernel * dk).sum(), (true(x, dk, document) * d_y).sum(), rtol=1e-4, atol=1e-4)

    def test_it_runs_over_a_sharded_sequence_in_its_order(self):
        x, kernel, _, document, tokens = self.given()
        there = mesh(sequence=4)
        y = centred_convolution(x, kernel, tokens=tokens, parallel=StateScan(there))
        np.testing.assert_allclose(y, bidirectional.centred_convolution(x, kernel, document), rtol=1e-5, atol=1e-5)
        with pytest.raises(UserError, match=r"centred_convolution .* under ZigZag\(.*restore the order"):
            centred_convolution(x, kernel, tokens=tokens, parallel=StateScan(there, layout=ZigZag(4)))

    def test_an_even_number_of_taps_is_answered(self):
        with pytest.raises(UserError, match="not 4"):
            centred_convolution(*self.given(taps=4)[:2])


def test_shapes_that_do_not_fit_are_answered():
    q, k, v, _ = problem()
    with pytest.raises(UserError, match="do not fit"):
        global_attention(q, k[:, :, :, :2], v)
    with pytest.raises(UserError, match=r"tokens have shape \(2, 36\)"):
        global_softmax(q, k, v, tokens=Tokens.arange(2, 36))


class TestQuasiseparable:
    def given(self, seed=0, batch=2, length=37, heads=2, width=3, value_width=2):
        rng = np.random.default_rng(seed)
        q, k, q_back, k_back = (rng.normal(size=(batch, length, heads, width)) for _ in range(4))
        g, g_back = (-np.exp(rng.normal(size=(batch, length, heads))) for _ in range(2))
        v, diagonal = rng.normal(size=(batch, length, heads, value_width)), rng.normal(size=(batch, length, heads))
        arrays = (q, k, g, q_back, k_back, g_back, v, diagonal)
        return [x.astype(np.float32) for x in arrays], documents(rng, batch, length)

    def run(self, arrays, document, **how):
        tokens = Tokens(position=np.zeros_like(document), document=document)

        @jax.jit
        def mix(q, k, g, q_back, k_back, g_back, v, diagonal):
            both = Direction(q, k, g), Direction(q_back, k_back, g_back)
            return quasiseparable(*both, v, diagonal, tokens=tokens, chunk=16, **how)

        return mix(*arrays)

    def true(self, document, *arrays):
        arrays = (x if x.ndim == 4 else x[..., None] for x in arrays)
        return oracle.over_documents(oracle.quasiseparable, document, *arrays)

    def test_it_is_its_matrix(self):
        arrays, document = self.given()
        true = self.true(document, *arrays)
        np.testing.assert_allclose(self.run(arrays, document), true, rtol=1e-5, atol=1e-5 * abs(true).max())

    @pytest.mark.long
    def test_gradients_are_those_of_the_matrix(self):
        arrays, document = self.given(batch=1, length=11, heads=1)
        d_out = np.random.default_rng(9).normal(size=arrays[6].shape)
        got = jax.grad(lambda arrays: (self.run(arrays, document) * d_out.astype(np.float32)).sum())(arrays)
        for x, y in zip(got, gradients(functools.partial(self.true, document), arrays, d_out), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5 * abs(y).max())

    def test_a_document_changes_no_bit_of_another_and_padding_none_at_all(self):
        (arrays, document), (others, _) = self.given(length=40), self.given(seed=1, length=40)
        for edited in (document == 2, document == -1):
            assert edited.any()
            mixed = [
                np.where(edited.reshape(*edited.shape, *(1,) * (x.ndim - 2)), y, x)
                for x, y in zip(arrays, others, strict=True)
            ]
            before, after = (np.asarray(self.run(x, document)) for x in (arrays, mixed))
            np.testing.assert_array_equal(before[~edited], after[~edited])
            np.testing.assert_array_equal(after[document == -1], 0)

    def test_with_both_directions_alike_it_turns_with_its_input(self):
        (q, k, g, *_, v, diagonal), _ = self.given()
        arrays = [q, k, g, q, k, g, v, diagonal]
        document = np.zeros((2, 37), np.int32)
        turned = self.run([x[:, ::-1] for x in arrays], document)
        np.testing.assert_allclose(turned, self.run(arrays, document)[:, ::-1], rtol=1e-5, atol=1e-5)

    @pytest.mark.long
    def test_it_runs_over_a_sharded_sequence_in_its_order(self):
        arrays, document = self.given(length=32)
        out, true = self.run(arrays, document, parallel=StateScan(mesh(sequence=4))), self.true(document, *arrays)
        np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())
        with pytest.raises(UserError, match=r"under ZigZag\(.*restore the order"):
            self.run(arrays, document, parallel=StateScan(mesh(sequence=4), layout=ZigZag(4)))

    def test_without_keys_only_the_diagonal_is_left(self):
        arrays, document = self.given()
        arrays[1], arrays[4] = 0 * arrays[1], 0 * arrays[4]
        own = np.where(document[:, :, None, None] >= 0, arrays[7][..., None] * arrays[6], 0)
        np.testing.assert_array_equal(self.run(arrays, document), own)
