"""Merged parts are the whole: st.merge, a prefix that a batch shares, a cache that is spread, prefill in chunks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import striate
from oracles.formulas import random_tokens
from striate import Tokens, UserError, masks, scores
from striate.lib.decoding.merging import relay_attention, sharded_attention

MASK = masks.parse("causal() & same('document') & window(30) & query('position', 2)")


def arrays(seed=0, batch=2, length=48, heads=4, kv_heads=2):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, 8)).astype(np.float32)
    k, v = (rng.normal(size=(batch, length, kv_heads, w)).astype(np.float32) for w in (8, 5))
    return q, k, v, random_tokens(rng, batch, length)


@pytest.mark.parametrize("cuts", [(0, 48), (0, 20, 48), (0, 1, 7, 30, 48)])
def test_merged_parts_are_the_whole_with_all_gradients(cuts):
    q, k, v, tokens = arrays()
    rng = np.random.default_rng(1)

    def parts(q, k, v):
        return striate.merge(
            *(
                striate.attention(
                    q,
                    k[:, a:b],
                    v[:, a:b],
                    mask=MASK,
                    q_tokens=tokens,
                    k_tokens=tokens.map(lambda x: x[:, a:b]),  # noqa: B023
                    return_lse=True,
                )
                for a, b in itertools.pairwise(cuts)
            )
        )

    def whole(q, k, v):
        return striate.attention(q, k, v, mask=MASK, q_tokens=tokens, return_lse=True)

    (got, pull), (expected, pull_whole) = jax.vjp(parts, q, k, v), jax.vjp(whole, q, k, v)
    blind = np.isneginf(expected[1])
    assert blind.any() and not blind.all()
    d_out = rng.normal(size=got[0].shape).astype(np.float32)
    d_lse = np.where(blind, 0, rng.normal(size=got[1].shape)).astype(np.float32)
    for x, y in zip((*got, *pull((d_out, d_lse))), (*expected, *pull_whole((d_out, d_lse))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=5e-6)


def test_merge_says_what_does_not_fit():
    out, lse = np.zeros((1, 3, 2, 4), np.float32), np.zeros((1, 3, 2), np.float32)
    with pytest.raises(UserError, match="at least one pair"):
        striate.merge()
    with pytest.raises(UserError, match=r"\(1, 3, 2, 4\), \(1, 3, 2\)"):
        striate.merge((out, lse), (out[:, :2], lse[:, :2]))


@pytest.mark.parametrize("score", [scores.plain(), scores.compose(scores.alibi(0.3), scores.sink_logit(0.5))], ids=repr)
def test_a_prefix_is_read_once(score):
    q, k, v, _ = arrays(batch=3)
    prefix, rows = 18, 3
    shared_k, shared_v = (
        np.concatenate([np.broadcast_to(x[:1, :prefix], (rows, prefix, *x.shape[2:])), x[:, prefix:]], 1)
        for x in (k, v)
    )
    tokens = Tokens.arange(rows, 48)
    own = tokens.map(lambda x: x[:, prefix:])
    how = {"mask": masks.causal(), "score": score}

    def relayed(q, k, v):
        return relay_attention(
            q[:, prefix:], k[:1, :prefix], v[:1, :prefix], k[:, prefix:], v[:, prefix:], q_tokens=own, **how
        )

    def whole(q, k, v):
        k, v = (jnp.concatenate([jnp.repeat(x[:1, :prefix], rows, 0), x[:, prefix:]], 1) for x in (k, v))
        return striate.attention(q[:, prefix:], k, v, q_tokens=own, k_tokens=tokens, return_lse=True, **how)

    (got, pull), (expected, pull_whole) = jax.vjp(relayed, q, shared_k, shared_v), jax.vjp(whole, q, shared_k, shared_v)
    for x, y in zip((*got, *pull(got)), (*expected, *pull_whole(expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", [scores.plain(), scores.off_by_one()], ids=repr)
def test_a_spread_cache_is_a_whole_one(score):
    q, k, v, tokens = arrays()
    mesh = jax.make_mesh((4,), ("keys",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    few = tokens.map(lambda x: x[:, -3:])
    how = {"mask": MASK, "score": score, "q_tokens": few, "k_tokens": tokens}

    def spread(q, k, v):
        return sharded_attention(q, k, v, mesh=mesh, axis="keys", **how)

    def whole(q, k, v):
        return striate.attention(q, k, v, return_lse=True, **how)

    (got, pull), (expected, pull_whole) = (jax.vjp(f, q[:, -3:], k, v) for f in (spread, whole))
    cotangents = got[0], jnp.where(jnp.isfinite(got[1]), got[1], 0)
    for x, y in zip((*got, *pull(cotangents)), (*expected, *pull_whole(cotangents)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("chunk", [1, 5, 16, 48])
def test_prefill_in_chunks_is_prefill_at_once(chunk):
    q, k, v, tokens = arrays()
    expected = striate.attention(q, k, v, mask=MASK, q_tokens=tokens)
    causal_order = tokens.replace(position=np.broadcast_to(np.arange(48, dtype=np.int32), (2, 48)))
    expected = striate.attention(q, k, v, mask=MASK, q_tokens=causal_order)
    outs = []
    for start in range(0, 48, chunk):
        stop = min(start + chunk, 48)
        now, seen = (causal_order.map(lambda x: x[:, a:stop]) for a in (start, 0))  # noqa: B023
        outs.append(
            striate.attention(q[:, start:stop], k[:, :stop], v[:, :stop], mask=MASK, q_tokens=now, k_tokens=seen)
        )
    np.testing.assert_allclose(np.concatenate(outs, 1), expected, rtol=1e-5, atol=1e-6)
