"""Keys in pages are keys, wherever the pages lie: by XLA, and by the TPU kernel step by step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import striate
from striate import Tokens, UserError, masks, scores
from striate.lib.decoding.paging import paged_attention

PAGE, PAGES = 8, 5  # tokens of a page, pages of a row
MASK = masks.causal() & masks.same("document") & (masks.window(15) | masks.sink(2))


def arrays(queries=2, heads=4, kv_heads=2, width=128, seed=0):
    """(q, pages of keys, pages of values, table, how): rows of 36 and 17 tokens; NaN in the pages of nobody."""
    rng, length = np.random.default_rng(seed), PAGE * PAGES
    used = np.array([36, 17])[:, None]
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
    k_tokens = Tokens(place, document=np.where(place < used, 0, -1).astype(np.int32))
    q_tokens = Tokens((used - queries + np.arange(queries)).astype(np.int32))
    table = rng.permutation(2 * PAGES + 3)[: 2 * PAGES].reshape(2, PAGES).astype(np.int32)
    table[1, 3:] = -1
    q = rng.normal(size=(2, queries, heads, width)).astype(np.float32)
    k, v = (np.full((2 * PAGES + 3, PAGE, kv_heads, width), np.nan, np.float32) for _ in range(2))
    for pages in (k, v):
        pages[table[table >= 0]] = rng.normal(size=(len(table[table >= 0]), PAGE, kv_heads, width))
    return q, k, v, table, {"mask": MASK, "q_tokens": q_tokens, "k_tokens": k_tokens, "return_lse": True}


def whole(pages, table):
    """(batch, length, ...), zeros where there is no page."""
    held = (table >= 0).reshape(*table.shape, 1, 1, 1)
    return jnp.where(held, pages[np.maximum(table, 0)], 0).reshape(2, PAGE * PAGES, *pages.shape[2:])


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_tpu_interpret"])
@pytest.mark.parametrize(
    "score",
    [scores.plain(), scores.compose(scores.alibi(np.float32([0, 0.1, 0.2, 0.3])), scores.off_by_one())],
    ids=repr,
)
def test_pages_are_the_whole_with_gradients(implementation, score):
    q, k, v, table, how = arrays()
    if implementation != "pallas_tpu_interpret":  # the others look at pages that nobody has as well
        k, v = (np.nan_to_num(x) for x in (k, v))

    def paged(q, k, v):
        return paged_attention(q, k, v, table, score=score, implementation=implementation, **how)

    def together(q, k, v):
        return striate.attention(q, whole(k, table), whole(v, table), score=score, implementation="reference", **how)

    got, want = paged(q, k, v), together(q, k, v)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    k, v = (np.nan_to_num(x) for x in (k, v))
    for x, y in zip(*(jax.vjp(f, q, k, v)[1](want) for f in (paged, together)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("change", ["heads", "many queries", "low rank", "pages of 5"])
def test_what_the_kernel_does_not_take_as_it_is(change):
    q, k, v, table, how = arrays(queries=17 if change == "many queries" else 2)
    k, v = (np.nan_to_num(x) for x in (k, v))
    if change == "heads":
        how["mask"] = MASK & (masks.window(4) | masks.switch([True, False, False, True]))
    if change == "low rank":
        rng = np.random.default_rng(1)
        factors = rng.normal(size=(2, 2, 1, 3)), rng.normal(size=(2, PAGE * PAGES, 1, 3))
        how["score"] = scores.low_rank_bias(*(np.float32(x) for x in factors))
    if change == "pages of 5":
        k, v = (x[:, :5] for x in (k, v))
        how["k_tokens"] = how["k_tokens"].map(lambda x: x[:, : 5 * PAGES])
    got, want = (paged_attention(q, k, v, table, implementation=x, **how) for x in ("pallas_tpu_interpret", "xla"))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_page_may_be_shared():
    q, k, v, table, how = arrays()
    table[1, :2] = table[0, :2]  # a prefix that both rows have
    got = paged_attention(q, k, v, table, implementation="pallas_tpu_interpret", **how)
    want = striate.attention(q, whole(k, table), whole(v, table), **how)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"table": lambda x: x.astype(np.float32)}, "shape (2, 5) and dtype float32"),
        ({"table": lambda x: x[:1]}, "has 1 rows and q 2"),
        ({"v": lambda x: x[:, :4]}, "(13, 8, 2, 128) and of values (13, 4, 2, 128)"),
        ({"k": lambda x: x[0]}, "Pages of keys (8, 2, 128)"),
        ({"k": lambda x: x[..., :64]}, "q has head_dim 128 and k 64"),
        ({"table": lambda x: x[:, :4]}, "k_tokens have shape (2, 40); they need (2, 32)"),
        ({"q": lambda x: x[:, :1]}, "q_tokens have shape (2, 2); they need (2, 1)"),
        ({"mask": lambda _: masks.key("frame", 0)}, "'frame'"),
    ],
)
def test_what_does_not_fit_is_said(wrong, says):
    q, k, v, table, how = arrays()
    given = {"q": q, "k": k, "v": v, "table": table, **how}
    given |= {name: change(given[name]) for name, change in wrong.items()}
    arguments = [given.pop(name) for name in ("q", "k", "v", "table")]
    with pytest.raises(UserError, match=re.escape(says)):
        paged_attention(*arguments, **given)


def test_a_kernel_asked_for_by_name_that_cannot_run_says_so():
    *given, how = arrays()
    with pytest.raises(NotImplementedError, match="is for TPUs"):
        paged_attention(*given, implementation="pallas_tpu", **how)
