"""CoPE in tiles: its dense float64 truth with all gradients, linear memory, and the orders of tokens it refuses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import striate
from oracles import cope as oracle
from oracles import derivatives
from striate import Tokens, UserError, masks
from striate.lib.cope import cope
from striate.lib.layouts import Striped, ZigZag

LENGTH = 32
MASK = masks.causal() & masks.same("document")


class Problem(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    table: np.ndarray
    gate_k: np.ndarray


def problem(seed=0, tokens=None, heads=2, kv_heads=1, width=4, value_width=3, positions=5):
    """Normal arrays; with so few positions all rows are beyond the table before the last tile."""
    rng, shape = np.random.default_rng(seed), (1, LENGTH) if tokens is None else tokens.shape
    shapes = [(*shape, heads, width), (*shape, kv_heads, width), (*shape, kv_heads, value_width)]
    shapes += [(positions, width), (*shape, kv_heads, width)]
    return Problem(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def packed(documents=((0, 9), (2, 13), (-1, 4), (1, 6)), batch=1):
    """Documents in any order of their numbers, padding among them."""
    document = np.concatenate([np.full(n, number) for number, n in documents])
    position = np.concatenate([np.arange(n) for _, n in documents])
    return Tokens(*(np.tile(np.int32(x), (batch, 1)) for x in (position, document)))


@functools.partial(jax.jit, static_argnames=("mask", "tile", "implementation"))
def solve(arrays, cotangent, tokens, **options):
    """(result, gradients of all five arrays)"""

    def attend(q, k, v, table, gate_k):
        return cope(q, k, v, table, gate_k_BSKD=gate_k, q_tokens=tokens, **options)

    out, pull = jax.vjp(attend, *arrays)
    return out, *pull(cotangent)


def visible(mask, tokens):
    return np.asarray((MASK & mask).dense(tokens, tokens))


def assert_as_true_as_the_reference(arrays, mask, tokens, tile):
    """error <= 2 x the error of the dense form in float32, plus the rounding of the greatest entry."""
    cotangent = np.random.default_rng(1).normal(size=(*arrays.q.shape[:3], arrays.v.shape[-1])).astype(np.float32)

    def truth(q, k, v, table, gate_k):
        return oracle.attention(q, k, v, table, visible(mask, tokens), gate_k)

    true = truth(*map(np.float64, arrays)), *derivatives.gradients(truth, arrays, cotangent)
    dense = solve(arrays, cotangent, tokens, mask=mask, implementation="reference")
    tiled = solve(arrays, cotangent, tokens, mask=mask, tile=tile)
    for name, got, near, expected in zip(("out", *arrays._fields), tiled, dense, true, strict=True):
        greatest, error = abs(expected).max(), abs(near - expected).max()
        assert abs(got - expected).max() <= 2 * error + np.finfo(np.float32).eps * greatest, name
        assert error <= 1e-5 * greatest, name


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("tile", "mask", "batch", "fields"),
    [
        ((8, 8), masks.everything(), 1, {}),
        ((16, 5), masks.everything(), 2, {"positions": 30, "heads": 4, "kv_heads": 2, "width": 2, "value_width": 1}),
        ((128, 7), masks.window(9) | masks.sink(2), 1, {"positions": 12}),
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_the_truth(tile, mask, batch, fields):
    tokens = packed(batch=batch)
    assert_as_true_as_the_reference(problem(tokens=tokens, **fields), mask, tokens, tile)


def test_what_a_mask_hides_is_not_counted():
    arrays, tokens, mask = problem(positions=30), packed(), masks.sink(2)
    few = np.flatnonzero(tokens.position[0] < 2)
    seen = {"k_BSKD": arrays.k[:, few], "v_BSKV": arrays.v[:, few], "k_tokens": tokens.map(lambda x: x[:, few])}
    hidden = cope(*arrays[:4], q_tokens=tokens, mask=mask)
    np.testing.assert_allclose(hidden, cope(arrays.q, table_PD=arrays.table, q_tokens=tokens, **seen), atol=2e-6)


def forced(arrays, gate):
    """The arrays with another dim, in which every query is 1: gates are open (gate = 1) or shut (0), whatever q is."""

    def widen(x, entry):
        return np.concatenate([x, np.full((*x.shape[:-1], 1), entry, np.float32)], -1)

    shut = np.zeros_like(arrays.gate_k)
    table = widen(arrays.table, 0)
    return Problem(widen(arrays.q, 1), widen(arrays.k, 0), arrays.v, table, widen(shut, 400.0 * (2 * gate - 1)))


def test_open_gates_count_tokens():
    arrays, tokens = forced(problem(), gate=1), Tokens.arange(1, LENGTH)
    got, *_ = solve(arrays, arrays.q[..., :3], tokens, tile=(8, 8))
    distance = np.minimum(np.arange(LENGTH)[:, None] - np.arange(LENGTH) + 1, len(arrays.table) - 1)
    bias = np.einsum("bthd,tsd->bhts", arrays.q, arrays.table[distance.clip(0)])
    logits = 5**-0.5 * (np.einsum("bthd,bsd->bhts", arrays.q, arrays.k[:, :, 0]) + bias)
    weights = np.where(distance > 0, np.exp(logits), 0)
    expected = np.einsum("bhts,bsv->bthv", weights / weights.sum(-1, keepdims=True), arrays.v[:, :, 0])
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(
    "arrays", [forced(problem(), gate=0), problem(positions=1)], ids=["shut gates", "one position"]
)
def test_what_counts_nothing_is_plain_attention(arrays):
    got = cope(*arrays[:4], q_tokens=packed(), gate_k_BSKD=arrays.gate_k, tile=(8, 8))
    expected = striate.attention(*arrays[:3], mask=MASK, q_tokens=packed(), implementation="reference")
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_gates_are_those_of_the_keys_unless_others_are_given():
    arrays, tokens = problem(), packed()
    shared = cope(*arrays[:4], q_tokens=tokens)
    expected = oracle.attention(*map(np.float64, arrays[:4]), visible(masks.everything(), tokens))
    np.testing.assert_allclose(shared, expected, atol=2e-6)
    np.testing.assert_array_equal(shared, cope(*arrays[:4], q_tokens=tokens, gate_k_BSKD=arrays.k))


def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient():
    tokens = packed()
    arrays, blind = problem(), tokens.document[0] == -1
    out, d_q, d_k, d_v, _, d_gate = solve(arrays, arrays.q[..., :3], tokens, tile=(8, 8))
    assert blind.sum() == 4 and all(np.isfinite(x).all() for x in (out, d_q, d_k, d_v, d_gate))
    for x in (out, d_q, d_k, d_v, d_gate):
        assert (x[:, blind] == 0).all() and (x[:, ~blind] != 0).any()


def test_no_gradient_flows_where_the_mask_hides():
    arrays, tokens = problem(), packed()
    seen = visible(masks.everything(), tokens)[0]
    for row in (0, 8, 20, 31):
        cotangent = np.zeros((1, LENGTH, 2, 3), np.float32)
        cotangent[:, row] = 1
        _, _, d_k, d_v, _, d_gate = solve(arrays, cotangent, tokens, tile=(8, 8))
        np.testing.assert_array_equal((np.asarray(d_v) != 0).any((0, 2, 3)), seen[row])
        assert (d_k[:, ~seen[row]] == 0).all() and (d_gate[:, ~seen[row]] == 0).all()


def test_a_document_changes_no_bit_of_another():
    tokens, arrays, other = packed(), problem(), problem(seed=5)
    edited = tokens.document == 2
    changed = [
        np.where(edited[..., None, None], y, x) if x.ndim == 4 else x for x, y in zip(arrays, other, strict=True)
    ]
    cotangent = arrays.q[..., :3]
    before, after = (solve(Problem(*x), cotangent, tokens, tile=(8, 8)) for x in (arrays, changed))
    for at in (0, 1, 2, 3, 5):  # all but the gradient of the table, which is common
        np.testing.assert_array_equal(before[at][:, ~edited[0]], after[at][:, ~edited[0]])
    assert (before[0][:, edited[0]] != after[0][:, edited[0]]).any()


def test_hidden_tiles_are_not_computed():
    arrays, tokens = problem(), Tokens.arange(1, LENGTH)
    before = solve(arrays, arrays.q[..., :3], tokens, tile=(8, 8))[0]
    poisoned = arrays._replace(k=arrays.k.copy(), v=arrays.v.copy())
    poisoned.k[:, 24:], poisoned.v[:, 24:] = np.nan, np.nan
    after = solve(poisoned, arrays.q[..., :3], tokens, tile=(8, 8))[0]
    np.testing.assert_array_equal(before[:, :24], after[:, :24])
    assert np.isnan(after[:, 24:]).all()


def test_half_precision_is_as_true_as_the_dense_form():
    tokens = packed()
    arrays = Problem(*(x.astype(jnp.bfloat16) if x.ndim == 4 else x for x in problem()))
    wide = [np.float64(x) for x in arrays]
    true = oracle.attention(*wide[:4], visible(masks.everything(), tokens), wide[4])
    got, dense = (
        cope(*arrays[:4], q_tokens=tokens, gate_k_BSKD=arrays.gate_k, implementation=x) for x in ("xla", "reference")
    )
    assert got.dtype == jnp.bfloat16
    error, allowed = (abs(np.float64(x) - true).max() for x in (got, dense))
    assert error <= 2 * allowed + 0.25 * float(jnp.finfo(jnp.bfloat16).eps) * abs(true).max()


def test_queries_may_be_few_and_in_any_order():
    tokens, arrays = packed(), problem()
    whole = np.asarray(cope(*arrays[:4], q_tokens=tokens))
    some = np.random.default_rng(2).permutation(LENGTH)[:11]
    part = cope(
        arrays.q[:, some], *arrays[1:4], q_tokens=tokens.map(lambda x: x[:, some]), k_tokens=tokens, tile=(4, 8)
    )
    np.testing.assert_allclose(part, whole[:, some], atol=2e-6)


def test_interleaved_documents_are_in_order():
    tokens, arrays = packed(((0, 16), (1, 16))), problem()
    mixed = np.argsort(np.random.default_rng(3).permutation(np.repeat([0, 1], 16)), stable=True)
    back = np.argsort(mixed)
    whole = cope(*arrays[:4], q_tokens=tokens)
    got = cope(*(x[:, back] for x in arrays[:3]), arrays.table, q_tokens=tokens.map(lambda x: x[:, back]))
    np.testing.assert_allclose(got[:, mixed], whole, atol=2e-6)


@pytest.mark.parametrize("layout", [Striped(4), Striped(2, 8), ZigZag(4)], ids=str)
def test_keys_out_of_order_are_refused_or_poison_their_row(layout):
    tokens, arrays = Tokens.arange(2, LENGTH), problem(tokens=Tokens.arange(2, LENGTH))
    permuted = layout.permute(tokens)
    with pytest.raises(UserError, match=r"row 0, document 0, position \d+ comes after \d+: put them in natural order"):
        cope(*arrays[:4], q_tokens=permuted)
    cope(*arrays[:4], q_tokens=permuted, k_tokens=tokens)  # of queries any order will do
    half = Tokens(position=np.stack([tokens.position[0], permuted.position[1]]))
    compiled = jax.jit(lambda tokens: cope(*arrays[:4], q_tokens=tokens))(half)
    assert np.isfinite(compiled[0]).all() and np.isnan(compiled[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table_PD": np.zeros((5, 3), np.float32)}, r"table of CoPE has shape \(5, 3\); .* head_dim 4"),
        ({"gate_k_BSKD": np.zeros((1, LENGTH, 2, 4), np.float32)}, r"needs those of k, \(1, 32, 1, 4\)"),
        ({"mask": masks.switch([True, False])}, "differs from head to head"),
        ({"mask": masks.same("frame")}, "reads the query field 'frame'"),
        ({"tile": (0, 8)}, r"tile is \(0, 8\)"),
        ({"k_BSKD": np.zeros((1, LENGTH, 1, 5), np.float32)}, "q has head_dim 4 and k 5"),
    ],
)
def test_what_cannot_be_is_answered(change, message):
    q, k, v, table, _ = problem()
    with pytest.raises(UserError, match=message):
        cope(**{"q_BTHD": q, "k_BSKD": k, "v_BSKV": v, "table_PD": table} | change)


def test_an_unknown_implementation_is_answered():
    with pytest.raises(NotImplementedError, match="'pallas_tpu'"):
        cope(*problem()[:4], implementation="pallas_tpu")


def temporary_bytes(length, **options):
    """For results and gradients, as the compiler counts them."""
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (2, 1))
    table, position = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)

    def results_and_gradients(q, k, v, table, position, d_out):
        out, pull = jax.vjp(lambda *x: cope(*x, q_tokens=Tokens(position=position), **options), q, k, v, table)
        return out, pull(d_out)

    compiled = jax.jit(results_and_gradients).lower(q, k, k, table, position, q).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    assert temporary_bytes(8192) < 4.2 * temporary_bytes(2048)
    assert temporary_bytes(4096, implementation="reference") > 3.5 * temporary_bytes(2048, implementation="reference")
