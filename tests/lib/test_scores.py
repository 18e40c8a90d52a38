"""Scores: their meaning, the gradients of their parameters, their composition, and the errors of wrong ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import striate
from oracles import scores as oracle
from oracles.formulas import random_tokens
from striate import Tokens, UserError, masks, scores
from striate.lib.layouts import Striped
from striate.lib.parallel import AllGather, Ring, Ulysses
from suites.attention import RULE, System, check_score, random_problem, visible

HEADS = 4
CASES = oracle.all_cases(np.random.default_rng(7), HEADS)


def problem(seed=0, length=56, batch=2, **shape):
    rng = np.random.default_rng(seed)
    return random_problem(rng, random_tokens(rng, batch, length), heads=HEADS, **shape)


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_all_gradients_obey_the_bound(case):
    given = problem()
    check_score(System("xla"), RULE, case, given, visible(RULE, given), tile=24)


def every_mesh():
    """Every score around a ring; by the other strategies those that are made of all the rest, but for the slow run."""
    for case in CASES:
        for strategy in (Ring, AllGather, Ulysses):
            always = strategy is Ring or case.name in ("composed", "custom")
            marks = pytest.mark.long if always else pytest.mark.slow
            yield pytest.param(case, strategy, id=f"{case.name}-{strategy.__name__}", marks=marks)


@pytest.mark.parametrize(("case", "strategy"), [*every_mesh()])
def test_it_is_the_same_on_every_mesh(case, strategy):
    mesh = jax.make_mesh((4,), ("sequence",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    given = problem(length=104, kv_heads=2)
    check_score(System(parallel=strategy(mesh), layout=Striped(4, 13)), RULE, case, given, visible(RULE, given))


@pytest.mark.parametrize("rounds", [2, 4])
def test_a_share_of_the_heads_at_a_time_gives_the_same(rounds):
    mesh = jax.make_mesh((2,), ("sequence",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    given = problem(length=52, kv_heads=4)
    for case in CASES:
        if case.name in ("composed", "custom", "t5 bidirectional=True"):
            check_score(System(parallel=Ring(mesh, rounds=rounds)), RULE, case, given, visible(RULE, given))


def test_heads_and_batches_that_are_spread_add_up_their_gradients():
    axes = {"data": 2, "sequence": 2, "tensor": 2}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * 3)
    given = problem(length=52)
    for case in CASES:
        if case.name in ("composed", "custom"):
            check_score(System(parallel=Ring(mesh)), RULE, case, given, visible(RULE, given))


def test_scores_of_different_classes_never_share_a_program():
    """Unequal treedefs, not only unequal hashes: else jit takes one for the other when their hashes fall together."""
    structures = [jax.tree.structure(case.score) for case in CASES]
    for a, b in itertools.combinations(range(len(CASES)), 2):
        assert structures[a] != structures[b] or type(CASES[a].score) is type(CASES[b].score)
    assert jax.tree.structure(scores.alibi(HEADS)) == jax.tree.structure(scores.alibi(2 * HEADS))


def attend(score, given, **how):
    q, k, v, q_tokens, k_tokens, *_ = given
    return striate.attention(q, k, v, mask=masks.causal(), score=score, q_tokens=q_tokens, k_tokens=k_tokens, **how)


def test_equalities():
    given = problem()
    given = given._replace(q_tokens=Tokens.arange(2, 56), k_tokens=Tokens.arange(2, 56))

    def near(a, b):
        np.testing.assert_allclose(attend(a, given), attend(b, given), rtol=1e-5, atol=1e-6)

    slope = np.float32([0.1, 0.2, 0.3, 0.4])
    near(scores.power(0.0, slope), scores.alibi(slope))
    near(scores.softcap(1e6), scores.plain())
    near(scores.temperature(2.0), scores.compose(scores.temperature(0.5), scores.temperature(4.0)))
    near(scores.sink_logit(-1e9), scores.plain())
    factors = scores.alibi_factors(slope, given.q_tokens.position, given.k_tokens.position)
    near(scores.low_rank_bias(*factors), scores.alibi(slope))
    with pytest.raises(AssertionError):
        near(scores.alibi(slope), scores.plain())


def test_weights_of_a_power_law_are_a_power_law():
    tokens = Tokens.arange(1, 30)
    q, v = np.zeros((1, 30, 1, 4), np.float32), np.eye(30, dtype=np.float32)[None, :, None]
    out = striate.attention(q, q, v, mask=masks.causal(), score=scores.power(2.0), q_tokens=tokens)
    law = (1.0 + np.arange(30)[::-1]) ** -2.0
    np.testing.assert_allclose(out[0, -1, 0], law / law.sum(), rtol=1e-5)


def test_signed_weights_of_positive_logits_are_the_softmax_and_a_turned_query_turns_its_output():
    given = problem()
    same = given._replace(q=abs(given.q), k=abs(given.k))
    np.testing.assert_allclose(attend(scores.signed(), same), attend(scores.plain(), same), rtol=1e-6, atol=1e-6)
    turned = given._replace(q=-given.q)
    np.testing.assert_array_equal(attend(scores.signed(), turned), -attend(scores.signed(), given))


def test_a_sink_is_one_more_key_of_value_zero():
    q, k, v, *_ = problem(batch=1, kv_heads=HEADS)
    logits = np.float32([0.5, -1.0, 2.0, 0.0])
    # A further column of the queries is 1 and meets the logit in the first key; in all others it meets 0.
    first = np.zeros((1, 1, HEADS, 17), np.float32)
    first[0, 0, :, -1] = logits * 4
    wide_q, wide_k = (np.pad(x, [(0, 0)] * 3 + [(0, 1)], constant_values=last) for x, last in ((q, 1), (k, 0)))
    wide_k, wide_v = np.concatenate([first, wide_k], 1), np.pad(v, [(0, 0), (1, 0), (0, 0), (0, 0)])
    rest = Tokens(position=np.arange(56, dtype=np.int32)[None])
    keys = Tokens(position=np.arange(-1, 56, dtype=np.int32)[None])
    causal = {"mask": masks.causal(), "q_tokens": rest}
    expected = striate.attention(wide_q, wide_k, wide_v, k_tokens=keys, scale=1 / 4, **causal)
    got = striate.attention(q, k, v, score=scores.sink_logit(logits), **causal)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_low_rank_bias_is_the_dense_bias_and_so_are_its_gradients(kv_heads):
    rng = np.random.default_rng(3)
    given = problem(kv_heads=kv_heads)
    a, b = (rng.normal(size=(2, 56, h, 3)).astype(np.float32) for h in (HEADS, kv_heads))

    def dense(a, b, q, k, v):
        k, v, b = (jnp.repeat(x, HEADS // kv_heads, 2) for x in (k, v, b))
        logits = jnp.einsum("bthd,bshd->bhts", q, k) / 4 + jnp.einsum("bthr,bshr->bhts", a, b)
        hidden = ~np.asarray(masks.causal().dense(given.q_tokens, given.k_tokens))[:, None]
        return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(jnp.where(hidden, -jnp.inf, logits), -1), v)

    def low_rank(a, b, q, k, v):
        return attend(scores.low_rank_bias(a, b), given._replace(q=q, k=k, v=v))

    arrays = a, b, given.q, given.k, given.v
    # No row is hidden from itself under a causal mask.
    (out, pull), (expected, pull_dense) = jax.vjp(low_rank, *arrays), jax.vjp(dense, *arrays)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    for got, true in zip(pull(given.d_out), pull_dense(given.d_out), strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-3, atol=2e-5)


def test_factors():
    rng = np.random.default_rng(4)
    x, y = (rng.normal(size=(2, n, 3)).astype(np.float32) for n in (20, 30))
    a, b = scores.squared_distance_factors(x, y, np.float32([0.5, 2.0]))
    assert a.shape[-1] == 5
    expected = -np.float32([0.5, 2.0])[:, None, None] * ((x[:, None, :, None] - y[:, None, None]) ** 2).sum(-1)
    np.testing.assert_allclose(np.einsum("bthr,bsr->bhts", a, b[:, :, 0]), expected, rtol=1e-4, atol=1e-4)
    bias = np.einsum("htr,hsr->hts", *(rng.normal(size=(4, n, 5)).astype(np.float32) for n in (20, 30)))
    a, b, kept = scores.svd_factors(bias, 5)
    np.testing.assert_allclose(np.einsum("thr,shr->hts", a[0], b[0]), bias, atol=1e-4)
    np.testing.assert_allclose(kept, 1, atol=1e-6)
    assert (np.asarray(scores.svd_factors(bias, 2)[2]) < 0.99).all()


def test_slopes_are_those_of_the_paper():
    np.testing.assert_array_equal(scores.alibi_slopes(8), 2.0 ** -np.arange(1, 9, dtype=np.float32))
    np.testing.assert_allclose(scores.alibi_slopes(12)[8:], 2.0 ** -np.float32([0.5, 1.5, 2.5, 3.5]))


@pytest.mark.parametrize(("buckets", "farthest", "both"), [(32, 128, False), (32, 128, True), (8, 20, False)])
def test_buckets_are_those_of_the_paper(buckets, farthest, both):
    back = np.arange(-300, 300)
    score = scores.t5_bias(np.arange(buckets, dtype=np.float32)[None], both, farthest)
    got = score.logit(jnp.zeros(600), {"position": jnp.asarray(back)}, {"position": 0})
    expected = oracle.t5_bucket(back, buckets, farthest, both)
    np.testing.assert_array_equal(np.asarray(got).reshape(-1), expected)
    assert set(expected) == set(range(buckets)) - ({buckets // 2} if both else set())


def test_gradients_of_parameters_are_those_of_finite_differences():
    given = problem()

    @jax.jit
    def loss(slopes):
        return (attend(scores.alibi(slopes), given) ** 2).sum()

    slopes = jnp.float32([0.1, 0.2, 0.3, 0.4])
    gradient = jax.grad(loss)(slopes)
    for head in range(HEADS):
        step = np.zeros(HEADS, np.float32)
        step[head] = 1e-2
        slope = (loss(slopes + step) - loss(slopes - step)) / 2e-2
        np.testing.assert_allclose(gradient[head], slope, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scores.t5_bias(np.zeros(8)), r"shape \(8,\); it needs \(heads, buckets\)"),
        (lambda: scores.t5_bias(np.zeros((4, 32)), max_distance=8), r"max_distance=8: .* a max_distance > 16"),
        (lambda: scores.compose(scores.softcap(5.0), scores.low_rank_bias(*[np.zeros((1, 4, 1, 2))] * 2)), "first"),
        (lambda: scores.compose(scores.sigmoid(0.0), scores.softcap(5.0)), "after sigmoid, which comes last"),
        (lambda: scores.low_rank_bias(np.zeros((4, 2)), np.zeros((4, 2))), "4 axes"),
        (lambda: attend(scores.alibi(np.zeros(3)), problem()), r"shape \(3,\) and there are 4 heads"),
        (lambda: attend(scores.alibi(0.1, "frame_"), problem()), "frame_"),
        (lambda: attend(scores.low_rank_bias(*[np.zeros((1, 9, 1, 2), np.float32)] * 2), problem()), r"\(2 or 1, 56,"),
    ],
)
def test_errors_say_what_to_change(make, message):
    with pytest.raises(UserError, match=message):
        make()
