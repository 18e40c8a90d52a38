"""Attention on one device: the suite for every implementation, random masks, shapes, skipping and transformations."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import striate
from oracles import attention as oracle
from oracles.formulas import as_columns, as_rows, random_formula, random_tokens
from striate import Tokens, UserError, masks
from striate.lib import attention
from striate.lib.blockwise import Blockwise, live_blocks
from suites import attention as suite
from suites.attention import (
    REFERENCE,
    RULE,
    System,
    check_bound,
    check_errors,
    random_problem,
    reference_errors,
    solve,
    truth,
    visible,
)
from suites.jaxprs import equations

XLA = System("xla")
REAL_TILES = 10**9


@pytest.mark.smoke
@pytest.mark.parametrize("system", [XLA], ids=str)
class TestXla(suite.AttentionSuite):
    pass


@pytest.mark.parametrize("system", [REFERENCE], ids=str)
class TestReference(suite.AttentionSuite):
    """The truth that others are compared with: its own bound is absolute."""

    @pytest.mark.parametrize(("dtype", "heads", "kv_heads"), [("float32", 4, 2), ("bfloat16", 8, 1)])
    def test_results_and_gradients_obey_the_bound(self, system, dtype, heads, kv_heads):
        problem = self.problem(system, dtype=dtype, heads=heads, kv_heads=kv_heads)
        # Sums of some hundred terms in float32, and one rounding of the result to the dtype.
        self.check(system, problem, 8 * jnp.finfo(jnp.float32).eps + jnp.finfo(dtype).eps / 2)

    def test_in_float64_it_is_the_oracle(self, system):
        with jax.enable_x64(True):
            self.check(system, self.problem(system, dtype="float64"), 8 * jnp.finfo(jnp.float64).eps)

    def check(self, system, problem, rounding):
        shown = visible(RULE, problem)
        errors = suite.errors(solve(system, RULE, problem), truth(shown, problem))
        sizes = truth(shown, problem, oracle.magnitudes)
        for name, error in errors.items():
            assert error <= float(rounding) * getattr(sizes, name).max(), name

    def test_a_hidden_block_is_not_computed(self, system):
        """The dense form computes them all: a control of the test itself."""
        with pytest.raises(AssertionError, match="out"):
            super().test_a_hidden_block_is_not_computed(system)


def random_masks(seed: int, count: int):
    """(mask, its meaning, problem of 100 queries and 300 keys), with some pairs visible and some hidden."""
    rng = np.random.default_rng(seed)
    while count:
        formula, q_tokens, k_tokens = random_formula(rng), random_tokens(rng, 8, 100), random_tokens(rng, 8, 300)
        shown = np.broadcast_to(formula.visible(as_columns(q_tokens), as_rows(k_tokens)), (8, 100, 300))
        if 0 < shown.mean() < 1:
            count -= 1
            yield formula.mask, shown, random_problem(rng, q_tokens, k_tokens)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_random_masks(seed):
    for mask, shown, problem in random_masks(seed, count=4):
        check_bound(XLA, mask, problem, shown)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_random_masks(seed):
    for mask, shown, problem in random_masks(seed, count=10):
        check_bound(XLA, mask, problem, shown)
    jax.clear_caches()  # see conftest.py


@pytest.mark.parametrize(
    ("length", "keys", "heads", "kv_heads", "width", "value_width", "dtype"),
    [
        (100, 100, 3, 3, 8, 8, "float32"),
        (300, 300, 4, 2, 16, 24, "bfloat16"),
        (1030, 1030, 2, 2, 8, 4, "float32"),
        (130, 1030, 8, 1, 4, 8, "float32"),
        (1, 300, 4, 1, 16, 16, "float32"),
    ],
)
def test_any_shape_in_real_tiles(length, keys, heads, kv_heads, width, value_width, dtype):
    rng = np.random.default_rng(length)
    q_tokens, k_tokens = random_tokens(rng, 2, length), random_tokens(rng, 2, keys)
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": value_width}
    problem = random_problem(rng, q_tokens, k_tokens, dtype=dtype, **sizes)
    check_bound(XLA, masks.causal() & masks.same("document") | masks.prefix(), problem, tile=REAL_TILES)


@pytest.mark.parametrize("system", [XLA, REFERENCE], ids=str)
def test_nothing_and_everything(system):
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 2, 50)
    problem = random_problem(rng, tokens)
    got = solve(system, masks.nothing(), problem)
    assert np.isneginf(got.lse).all() and not any(x.any() for x in (got.out, got.dq, got.dk, got.dv))
    check_errors(solve(system, masks.everything(), problem), *everything(problem))


def everything(problem):
    shown = np.ones((2, 50, 50), bool)
    true, sizes = truth(shown, problem), truth(shown, problem, oracle.magnitudes)
    return true, sizes, problem, reference_errors(masks.everything(), problem, true)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("out", lambda x: np.float32(x.astype(jnp.bfloat16))),
        ("lse", lambda x: x + 1e-5),
        ("dq", lambda x: x * (1 + 1e-5)),
        ("dk", lambda x: np.where(np.arange(50)[None, :, None, None] == 7, 0, x)),
        ("dv", lambda x: np.where(np.arange(50)[None, :, None, None] == 7, np.nan, x)),
    ],
)
def test_the_bound_finds_small_errors(name, spoil):
    rng = np.random.default_rng(0)
    problem = random_problem(rng, random_tokens(rng, 2, 50))
    got = solve(XLA, masks.everything(), problem)
    check_errors(got, *everything(problem))
    with pytest.raises(AssertionError, match=name):
        check_errors(got._replace(**{name: spoil(getattr(got, name))}), *everything(problem))


def inputs(length=64, keys=None, heads=4, kv_heads=2, width=8, batch=2):
    rng = np.random.default_rng(0)
    shapes = (batch, length, heads, width), *[(batch, keys or length, kv_heads, width)] * 2
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_defaults():
    q, k, v = inputs()
    out, lse = striate.attention(q, k, v, return_lse=True)
    assert lse.shape == q.shape[:3] and lse.dtype == jnp.float32
    tokens = Tokens.arange(2, 64)
    for same in (
        striate.attention(q, k, v, mask=masks.everything(), q_tokens=tokens, k_tokens=tokens, implementation="xla"),
        striate.attention(q, k, v, scale=8**-0.5, implementation=("pallas_gpu", "pallas_tpu", "xla")),
    ):
        np.testing.assert_array_equal(same, out)
    causal = striate.attention(q, k, v, mask=masks.causal())
    np.testing.assert_array_equal(causal, striate.attention(q, k, v, mask=masks.causal(), q_tokens=tokens))
    reference = striate.attention(2 * q, k, v, scale=0.25, implementation="reference")
    np.testing.assert_allclose(striate.attention(q, k, v, scale=0.5), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    q, k, v = (x.astype(dtype) for x in inputs())
    out, lse = striate.attention(q, k, v, return_lse=True)
    gradients = jax.grad(lambda *x: striate.attention(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)
    assert out.dtype == dtype and lse.dtype == jnp.float32 and all(x.dtype == dtype for x in gradients)


def test_vmap_is_a_loop():
    q, k, v = (jnp.stack([x, x[::-1] + 1, 2 * x]) for x in inputs())
    position = jnp.stack([jnp.arange(64)[None].repeat(2, 0) // n for n in (1, 2, 3)]).astype(jnp.int32)

    def loss(q, k, v, position):
        out, lse = striate.attention(q, k, v, mask=masks.causal(), q_tokens=Tokens(position=position), return_lse=True)
        return (out**2).sum() + lse.sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    looped = [gradient(*x) for x in zip(q, k, v, position, strict=True)]
    for mapped, *each in zip(jax.jit(jax.vmap(gradient))(q, k, v, position), *looped, strict=True):
        np.testing.assert_allclose(mapped, jnp.stack(each), rtol=1e-5, atol=1e-5)


def test_scan_is_a_loop():
    q, k, v = inputs()
    layers = jnp.linspace(0.5, 1.5, 3)

    def layer(x, weight):
        return x + striate.attention(weight * x, k, v, mask=masks.causal()), None

    def unrolled(x):
        for weight in layers:
            x, _ = layer(x, weight)
        return (x**2).sum()

    scanned = jax.grad(lambda x: (jax.lax.scan(layer, x, layers)[0] ** 2).sum())(q)
    np.testing.assert_allclose(scanned, jax.grad(unrolled)(q), rtol=1e-5, atol=1e-5)


class TestSkipping:
    """The lists of blocks that have work, from which both passes take theirs."""

    def live(self, mask, tokens):
        problem = Blockwise(mask, 1.0, (16, 32))
        return live_blocks(problem, *problem.sides(suite.PLAIN, tokens.as_queries(), tokens))

    def test_causal_skips_what_lies_above_the_diagonal(self):
        by_query, by_key = self.live(masks.causal(), Tokens.arange(1, 512))
        first, last = 16 * np.arange(32), 16 * np.arange(32) + 15
        np.testing.assert_array_equal(by_query.live[0], last // 32 + 1)
        np.testing.assert_array_equal(by_query.full[0], (first + 1) // 32)
        np.testing.assert_array_equal(by_key.live[0], 32 - 2 * np.arange(16))

    def test_documents_meet_themselves_only(self):
        document = jnp.arange(512, dtype=jnp.int32)[None] // 64
        tokens = Tokens(position=jnp.arange(512, dtype=jnp.int32)[None], document=document)
        by_query, by_key = self.live(masks.same("document"), tokens)
        assert (by_query.live == 2).all() and (by_query.full == 2).all() and (by_key.live == 4).all()
        np.testing.assert_array_equal(np.sort(by_query.order[0, 5, :2]), [2, 3])

    def test_blocks_are_those_of_the_dense_mask(self):
        rng = np.random.default_rng(0)
        for _ in range(8):
            mask, tokens = random_formula(rng).mask, random_tokens(rng, 2, 128)
            by_query, by_key = self.live(mask, jax.tree.map(jnp.asarray, tokens))
            blocks = np.asarray(mask.dense(tokens, tokens)).reshape(2, 8, 16, 4, 32)
            for lists, some, every in (
                (by_query, blocks.any((2, 4)), blocks.all((2, 4))),
                (by_key, blocks.any((2, 4)).swapaxes(1, 2), blocks.all((2, 4)).swapaxes(1, 2)),
            ):
                place = np.argsort(lists.order, -1)  # of every block in its list
                assert (place < lists.live[..., None])[some].all(), mask
                assert not (place < lists.full[..., None])[~every].any(), mask


def test_remat_by_the_names_computes_no_attention_again():
    q, k, v = inputs()
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def loss(q):
        return striate.attention(jnp.sin(q), k, v, mask=masks.causal()).sum()

    def products(function):
        jaxpr = jax.make_jaxpr(jax.grad(function))(q).jaxpr
        return len(list(equations(jaxpr, "dot_general"))), len(list(equations(jaxpr, "sin")))

    as_it_is, sines = products(loss)
    assert products(jax.checkpoint(loss, policy=policy)) == (as_it_is, 2 * sines)
    assert products(jax.checkpoint(loss))[0] > as_it_is


def test_the_choice_is_logged_once(caplog):
    attention._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="striate"):
        for _ in range(2):
            striate.attention(*inputs())
    assert caplog.messages == ["attention on cpu: xla, one device"]


Q, K, V = inputs(length=16)
TOKENS = Tokens.arange(2, 16)


@pytest.mark.parametrize(
    ("arrays", "options", "answer"),
    [
        ((Q[0], K, V), {}, r"q has shape \(16, 4, 8\); attention needs \(batch, length, heads, width\): 4 axes"),
        ((Q, K[:, :0], V), {}, r"k has shape \(2, 0, 2, 8\); attention needs at least one entry on every axis"),
        ((Q.astype(int), K, V), {}, "have dtypes int32, float32, float32; attention needs one floating dtype: cast"),
        ((Q, K.astype(jnp.bfloat16), V), {}, "have dtypes float32, bfloat16, float32"),
        ((Q[:1], K, V), {}, r"q \(1, 16, 4, 8\), k \(2, 16, 2, 8\), v \(2, 16, 2, 8\) do not fit: the batch is common"),
        ((Q, K, V[:, :8]), {}, r"v \(2, 8, 2, 8\) do not fit: .* length and heads to k and v"),
        ((Q, K, V[:, :, :1]), {}, r"v \(2, 16, 1, 8\) do not fit"),
        ((Q, K[..., :4], V), {}, "q has head_dim 8 and k 4; they need the same"),
        ((Q[:, :, :3], K, V), {}, "3 query heads are no multiple of 2 key/value heads: change one of them"),
        ((Q, K[:, :8], V[:, :8]), {}, "16 queries and 8 keys: with different lengths pass both q_tokens and k_tokens"),
        ((Q, K, V), {"q_tokens": Tokens.arange(1, 16)}, r"q_tokens have shape \(1, 16\); the arrays need .* \(2, 16\)"),
        (
            (Q, K, V),
            {"q_tokens": TOKENS, "k_tokens": Tokens.arange(2, 8)},
            r"k_tokens have shape \(2, 8\); the arrays need \(batch, length\) = \(2, 16\)",
        ),
        ((Q, K, V), {"mask": "causal()"}, r"mask is a str; attention needs a formula .* masks.parse\(text\)"),
        ((Q, K, V), {"mask": masks.same("documents")}, r"query Tokens have .* \(did you mean 'document'\?\)"),
        ((Q, K, V), {"implementation": "xl"}, "implementation 'xl' is not known; there are 'reference', 'xla', "),
    ],
)
def test_bad_input_is_answered(arrays, options, answer):
    with pytest.raises(UserError, match=answer):
        striate.attention(*arrays, **options)


def test_what_is_asked_for_and_cannot_run_is_no_silent_fallback():
    with pytest.raises(
        NotImplementedError,
        match=r"'pallas_gpu' is for GPUs, and this program is not .*: use implementation=None or 'xla'",
    ):
        striate.attention(Q, K, V, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="'pallas_tpu' is for TPUs, and this program is not"):
        striate.attention(Q, K, V, implementation="pallas_tpu")
