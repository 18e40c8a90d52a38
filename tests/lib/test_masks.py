"""Masks: three readings of one formula that agree, and text that reads back."""

import copy
import pickle
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.formulas import as_columns, as_rows, random_formula, random_tokens
from striate import Tokens, UserError, masks
from striate.lib.masks import ALL, MIXED, NONE

SEEDS = range(30)


def examples(seed: int, count=10, length=61):
    """(formula, query Tokens, key Tokens), the lengths different."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        formula = random_formula(rng, depth=int(rng.integers(4)))
        yield formula, random_tokens(rng, 2, length), random_tokens(rng, 2, length - 14)


def meaning(formula, q_tokens, k_tokens) -> np.ndarray:
    """bool (B, T, S), as the formula was written, by plain numpy."""
    shape = (*q_tokens.shape, k_tokens.shape[1])
    return np.broadcast_to(formula.visible(as_columns(q_tokens), as_rows(k_tokens)), shape)


def wrong_verdicts(mask, visible, q_tokens, k_tokens, tile) -> tuple[list, float]:
    """(blocks whose verdict of NONE or ALL is not true, share of the blocks that are pure and were called MIXED)."""

    def blocks(tokens, size):
        missing = -tokens.shape[1] % size
        padded = {name: np.pad(x, ((0, 0), (0, missing)), "edge") for name, x in tokens.fields().items()}
        return {name: x.reshape(len(x), -1, size) for name, x in padded.items()}

    q = jax.tree.map(lambda x: x[:, :, None], mask.query_summaries(blocks(q_tokens.as_queries(), tile[0])))
    k = jax.tree.map(lambda x: x[:, None, :], mask.key_summaries(blocks(k_tokens, tile[1])))
    starts = np.arange(0, visible.shape[1], tile[0]), np.arange(0, visible.shape[2], tile[1])
    some = np.logical_or.reduceat(np.logical_or.reduceat(visible, starts[0], 1), starts[1], 2)
    every = np.logical_and.reduceat(np.logical_and.reduceat(visible, starts[0], 1), starts[1], 2)
    verdict = np.broadcast_to(mask.verdict(q, k), some.shape)
    wrong = ((verdict == NONE) & some) | ((verdict == ALL) & ~every)
    return np.argwhere(wrong).tolist(), ((verdict == MIXED) & (every | ~some)).mean()


@pytest.mark.smoke
@pytest.mark.parametrize("seed", SEEDS)
def test_dense_is_what_the_formula_says(seed):
    for formula, q_tokens, k_tokens in examples(seed):
        dense = formula.mask.dense(q_tokens, k_tokens)
        assert dense.shape == (2, 61, 47) and dense.dtype == bool
        np.testing.assert_array_equal(dense, meaning(formula, q_tokens, k_tokens), err_msg=str(formula.mask))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_verdict_is_never_wrong(seed):
    rng = np.random.default_rng(seed)
    for formula, q_tokens, k_tokens in examples(seed):
        visible = meaning(formula, q_tokens, k_tokens)
        tile = rng.integers(1, 20, size=2)
        assert not wrong_verdicts(formula.mask, visible, q_tokens, k_tokens, tile)[0], (formula.mask, tile)
        assert wrong_verdicts(formula.mask, visible, q_tokens, k_tokens, (1, 1)) == ([], 0), formula.mask


@dataclass(frozen=True, repr=False)
class Overconfident(masks.Difference):
    """A Difference that looks at the least values only."""

    def bounds(self, query, key):
        def least(summaries):
            return {(reduction, field): summaries["least", field] for reduction, field in summaries}

        return super().bounds(least(query), least(key))


def test_a_wrong_verdict_is_found():
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 2, 61)
    wrong = Overconfident("position", "position", 0, None)
    visible = np.asarray(masks.causal().dense(tokens, tokens))
    found, _ = wrong_verdicts(wrong & masks.same("document"), visible, tokens, tokens, (8, 8))
    assert found
    assert not wrong_verdicts(masks.causal(), visible, tokens, tokens, (8, 8))[0]


@pytest.mark.parametrize(
    "text",
    [
        "causal()",
        "causal() & same('document')",
        "window(9)",
        "window(9, right=4) & same('document')",
        "causal() & (window(9) | sink(4))",
        "(causal() | prefix()) & same('document')",
        "after('frame')",
    ],
)
def test_in_natural_order_no_verdict_of_the_usual_masks_is_pessimistic(text):
    # Documents of whole tiles: in a tile that two documents share, positions range over both.
    lengths = (16, 40, 8, 24, 8)
    document = np.repeat([0, 1, 2, 3, -1], lengths)[None]
    position = np.concatenate([np.arange(n) for n in lengths])[None]
    if "document" not in text:
        position = np.arange(96)[None]
    tokens = Tokens(position=position, document=document, prefix=(position < 5) * 1, frame=position // 7)
    mask = masks.parse(text)
    assert wrong_verdicts(mask, np.asarray(mask.dense(tokens, tokens)), tokens, tokens, (8, 8)) == ([], 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_text_reads_back(seed):
    for formula, q_tokens, k_tokens in examples(seed):
        again = masks.parse(str(formula.mask))
        assert again == formula.mask and hash(again) == hash(formula.mask) and str(again) == str(formula.mask)
        np.testing.assert_array_equal(again.dense(q_tokens, k_tokens), meaning(formula, q_tokens, k_tokens))


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("causal() & (window(1023) | sink(4)) & same('document')", None),
        ("causal() | prefix() & same('document')", "causal() | key('prefix', 1, 1) & same('document')"),
        ("(causal() | prefix()) & same('document')", "(causal() | key('prefix', 1, 1)) & same('document')"),
        ("~causal() & ~same('document')", None),
        ("~(causal() & same('document'))", "~causal() | ~same('document')"),
        ("window(5, right=2) & after('frame')", None),
        ("window(5, name='frame')", "window(5, name='frame')"),
        ("window(5, None)", "difference('position', 'position', None, 5)"),
        ("window(None)", "causal()"),
        ("at_least('frame') | query('kind', 1, None)", None),
        ("difference('end', 'position', 1, None)", None),
        ("everything()", None),
        ("nothing()", None),
        (" causal ( ) ", "causal()"),
    ],
)
def test_printed_text(text, printed):
    wanted = (printed or text).replace("sink(4)", "causal() & key('position', None, 3)")
    assert str(masks.parse(text)) == wanted


def test_formulas_are_simplified():
    causal, same, window = masks.causal(), masks.same("document"), masks.window
    assert causal & window(5, right=3) == window(5)
    assert causal & same & window(5) == window(5) & same
    assert window(9) & masks.difference("position", "position", 10) == masks.nothing()
    assert ~~causal == causal and ~~(causal & same) == causal & same
    assert causal & masks.everything() == causal | masks.nothing() == causal
    assert causal & masks.nothing() == masks.nothing() and causal | masks.everything() == masks.everything()
    assert causal & causal == causal | causal == causal
    assert ~masks.everything() == masks.nothing()
    assert masks.difference("a", "b") == masks.everything()
    assert masks.difference("a", "b", 2, 1) == masks.nothing()
    assert causal != masks.after("position") and causal & same != causal | same


@pytest.mark.parametrize("seed", SEEDS)
def test_any_order_of_the_tokens_gives_the_same_pairs(seed):
    rng = np.random.default_rng(seed)
    for formula, q_tokens, k_tokens in examples(seed):
        p, r = rng.permutation(q_tokens.shape[1]), rng.permutation(k_tokens.shape[1])
        permuted = formula.mask.dense(q_tokens.map(lambda x, p=p: x[:, p]), k_tokens.map(lambda x, r=r: x[:, r]))
        dense = np.asarray(formula.mask.dense(q_tokens, k_tokens))
        np.testing.assert_array_equal(permuted, dense[:, p][:, :, r])


def test_readings_agree_inside_jit():
    for formula, q_tokens, k_tokens in examples(seed=0, count=4):
        traced = jax.jit(formula.mask.dense)(*jax.tree.map(jnp.asarray, (q_tokens, k_tokens)))
        np.testing.assert_array_equal(traced, formula.mask.dense(q_tokens, k_tokens))


def test_masks_copy_and_pickle():
    for formula, *_ in examples(seed=1):
        assert copy.deepcopy(formula.mask) == formula.mask == pickle.loads(pickle.dumps(formula.mask))


def test_fields():
    mask = masks.parse("causal() & (difference('end', 'position', 0) | query('kind', 1, 1)) | key('frame', 2, 2)")
    assert mask.query_fields == {"position", "end", "kind"}
    assert mask.key_fields == {"position", "frame"}
    assert mask.fields == {"position", "end", "kind", "frame"}
    assert masks.everything().fields == set()


def test_padding_sees_nothing_of_its_own_kind():
    tokens = Tokens(position=np.arange(4)[None], document=np.array([[0, 0, -1, -1]]))
    np.testing.assert_array_equal(
        masks.same("document").dense(tokens, tokens)[0],
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", r"The mask '' cannot be read \(invalid syntax\); write one such as \"causal\(\) & same\('document'\)\"\."),
        ("causal(", r"cannot be read \('\(' was never closed\)"),
        ("causall()", r"uses 'causall', which is no mask \(did you mean 'causal'\?\); there are causal, at_least, "),
        ("zzz()", r"uses 'zzz', which is no mask; there are "),
        ("causal() and same('document')", r"which is no formula; combine calls with & \| ~, as in "),
        ("causal", r"holds 'causal', which is no formula"),
        ("causal() + causal()", r"holds 'causal\(\) \+ causal\(\)', which is no formula"),
        ("~3", r"holds '3', which is no formula"),
        ("x.causal()", r"holds 'x.causal\(\)', which is no formula"),
        ("same(document)", r"has the argument document; arguments are numbers and quoted field names"),
        ("window()", r"cannot be read \(window\(\) missing 1 required positional argument: 'left'\)"),
        ("window(3, bogus=1)", r"got an unexpected keyword argument 'bogus'"),
        ("window(3.5)", r"difference\('position', 'position', 0, 3.5\) cannot be: .* bounds are whole numbers or None"),
        ("same(3)", r"difference\(3, 3, 0, 0\) cannot be: fields are names in quotes"),
        ("difference(None, None)", r"compares nothing: name a query field or a key field"),
    ],
)
def test_bad_text_is_answered(text, answer):
    with pytest.raises(UserError, match=answer):
        masks.parse(text)


def test_a_missing_field_is_answered_with_the_nearest():
    tokens = Tokens.arange(1, 4)
    with pytest.raises(
        UserError,
        match=r"The mask same\('documents'\) reads the query field 'documents', but the query Tokens have 'document', "
        r"'position' \(did you mean 'document'\?\): add it with tokens.replace\(documents=...\)\.",
    ):
        masks.same("documents").dense(tokens, tokens)
    with pytest.raises(UserError, match="reads the key field 'prefix', but the key Tokens have"):
        masks.prefix().check(tokens.replace(prefix=tokens.position), tokens)
