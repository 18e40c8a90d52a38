"""Masks: three readings of one formula that agree, and text that reads back."""

import copy
import pickle
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import papers
from oracles.formulas import as_columns, as_rows, random_formula, random_tokens
from striate import Tokens, UserError, masks
from striate.lib.masks import ALL, MIXED, NONE

SEEDS = range(30)


def examples(seed: int, count=10, length=61, heads=None):
    """(formula, query Tokens, key Tokens), the lengths different."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        formula = random_formula(rng, depth=int(rng.integers(5)), heads=heads)
        yield formula, random_tokens(rng, 2, length), random_tokens(rng, 2, length - 14)


def meaning(formula, q_tokens, k_tokens) -> np.ndarray:
    """bool (B, T, S), as the formula was written, by plain numpy."""
    shape = (*q_tokens.shape, k_tokens.shape[1])
    return np.broadcast_to(formula.visible(as_columns(q_tokens), as_rows(k_tokens)), shape)


def verdicts(mask, q_tokens, k_tokens, tile) -> np.ndarray:
    """int8 (B, query blocks, key blocks); a last shorter block repeats its last token."""

    def blocks(tokens, size):
        missing = -tokens.shape[1] % size
        padded = {name: np.pad(x, ((0, 0), (0, missing)), "edge") for name, x in tokens.fields().items()}
        return {name: x.reshape(len(x), -1, size) for name, x in padded.items()}

    query = mask.query_summaries(blocks(q_tokens.as_queries(), tile[0]))
    key = mask.key_summaries(blocks(k_tokens, tile[1]))
    verdict = mask.verdict(jax.tree.map(lambda x: x[:, :, None], query), jax.tree.map(lambda x: x[:, None, :], key))
    shape = (len(q_tokens.position), -(-q_tokens.shape[1] // tile[0]), -(-k_tokens.shape[1] // tile[1]))
    return np.broadcast_to(verdict, shape)


def judge(mask, visible, q_tokens, k_tokens, tile) -> tuple[list, int, int]:
    """(blocks whose verdict of NONE or ALL is not true, blocks that are pure, those of them that were called MIXED)."""
    starts = np.arange(0, visible.shape[1], tile[0]), np.arange(0, visible.shape[2], tile[1])
    some = np.logical_or.reduceat(np.logical_or.reduceat(visible, starts[0], 1), starts[1], 2)
    every = np.logical_and.reduceat(np.logical_and.reduceat(visible, starts[0], 1), starts[1], 2)
    verdict = verdicts(mask, q_tokens, k_tokens, tile)
    wrong, pure = ((verdict == NONE) & some) | ((verdict == ALL) & ~every), every | ~some
    return np.argwhere(wrong).tolist(), pure.sum(), (pure & (verdict == MIXED)).sum()


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
        assert not judge(formula.mask, visible, q_tokens, k_tokens, tile)[0], (formula.mask, tile)
        wrong, pure, pessimistic = judge(formula.mask, visible, q_tokens, k_tokens, (1, 1))
        assert not wrong and pure == visible.size and not pessimistic, formula.mask


def test_few_verdicts_are_pessimistic():
    tile, count = (8, 8), np.zeros(2, int)
    for seed in range(10):
        for formula, q_tokens, k_tokens in examples(seed):
            count += judge(formula.mask, meaning(formula, q_tokens, k_tokens), q_tokens, k_tokens, tile)[1:]
    pure, pessimistic = count
    print(f"{pessimistic} of {pure} pure blocks of {tile} tokens were called MIXED: {pessimistic / pure:.2%}")
    assert pure > 5_000 and pessimistic < 0.05 * pure


@pytest.mark.parametrize("seed", SEEDS)
def test_a_verdict_of_one_atom_is_never_pessimistic(seed):
    """For extents whose ends are all that is read, class bits and residue bits; above 32, residues of neighbours."""
    rng = np.random.default_rng(seed)
    tokens = Tokens(position=np.sort(rng.integers(-20, 60, size=(2, 96)), axis=1))
    run = Tokens(position=np.arange(96)[None] - 30)
    low, high = np.sort(rng.integers(-50, 50, size=2))
    one_sided = [masks.difference("position", "position", *bounds) for bounds in ((low, None), (None, high))]
    matrix = rng.random(rng.integers(1, 33, size=2)) < rng.choice([0.1, 0.9])
    atoms = [*one_sided, masks.table("position", "position", matrix)]
    atoms += [masks.modulo("position", "position", int(rng.integers(2, 33)), int(low))]
    atoms += [masks.modulo(None, "position", 32, 1), masks.table("position", None, matrix[:, :1])]
    cases = [(atom, tokens) for atom in (*atoms, *(~atom for atom in atoms))]
    cases += [(masks.modulo("position", "position", int(rng.integers(33, 70)), int(high)), run)]
    for mask, tokens in cases:
        visible = np.asarray(mask.dense(tokens, tokens))
        with np.errstate(over="raise"):
            assert judge(mask, visible, tokens, tokens, (4, 6))[::2] == ([], 0), mask


@dataclass(frozen=True, repr=False)
class Overconfident(masks.Difference):
    """A Difference that looks at the least values only."""

    def bounds(self, query, key):
        def least(summaries):
            return {(name, field): summaries["least", field] for name, field in summaries}

        return super().bounds(least(query), least(key))


def test_a_wrong_verdict_is_found():
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 2, 61)
    wrong = Overconfident("position", "position", 0, None)
    visible = np.asarray(masks.causal().dense(tokens, tokens))
    assert judge(wrong, visible, tokens, tokens, (8, 8))[0]
    assert not judge(masks.causal(), visible, tokens, tokens, (8, 8))[0]


def test_a_table_without_its_outside_is_found():
    """Class bits alone cannot say ALL: a block may hold a class that the matrix does not have."""
    tokens = Tokens(position=np.array([[0, 1, 33, 40, 0, 1, 1, 0]]))
    mask = masks.table("position", "position", [[1, 1], [1, 1]])
    blocks = {"position": tokens.position.reshape(2, 4)}
    query, key = mask.query_summaries(blocks), mask.key_summaries(blocks)
    expanded = jax.tree.map(lambda x: x[:, None], query)
    assert mask.verdict(expanded, key).tolist() == [[MIXED, MIXED], [MIXED, ALL]]
    expanded["greatest", "position"] = key["greatest", "position"] = np.array(1)
    assert mask.verdict(expanded, key).tolist() == [[ALL, ALL], [ALL, ALL]]


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
        "modulo('position', 'position', 8) & same('document')",
        "table('frame', 'frame', [[1, 0, 1], [1, 1, 1], [0, 0, 1]])",
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
    wrong, _, pessimistic = judge(mask, np.asarray(mask.dense(tokens, tokens)), tokens, tokens, (8, 8))
    assert not wrong and not pessimistic


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
        ("~causal() & ~same('document')", "difference('position', 'position', None, -1) & ~same('document')"),
        ("~(causal() & same('document'))", "difference('position', 'position', None, -1) | ~same('document')"),
        ("window(5, right=2) & after('frame')", None),
        ("window(5, name='frame')", "window(5, name='frame')"),
        ("window(5, None)", "difference('position', 'position', None, 5)"),
        ("window(None)", "causal()"),
        ("at_least('frame') | query('kind', 1, None)", None),
        ("difference('end', 'position', 1, None)", None),
        ("causal() | window(5, right=5)", "difference('position', 'position', -5, None)"),
        ("table('kind', 'kind', [[True, 0], (1, 1)])", "table('kind', 'kind', [[1, 0], [1, 1]])"),
        ("~table('kind', None, [[1], [0], [1]])", None),
        ("modulo('position', 'position', 4)", None),
        ("modulo('position', None, 4, -1)", "modulo('position', None, 4, 3)"),
        ("~modulo('position', 'start', 3, 1)", None),
        ("~modulo('position', 'start', 2)", "modulo('position', 'start', 2, 1)"),
        ("switch([True, False]) & causal()", None),
        ("~switch([1, 0]) | causal()", "switch([False, True]) | causal()"),
        ("switch(True)", "everything()"),
        ("causal() & switch(False)", "nothing()"),
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
    for mask in (causal, same, causal & same, causal | same, causal & ~same, (causal | same) & window(3)):
        assert mask & ~mask == ~mask & mask == masks.nothing() and mask | ~mask == masks.everything()


def test_differences_of_the_same_fields_are_fused():
    a, window = masks.difference, masks.window
    assert ~a("a", "b", 3) == a("a", "b", None, 2) and ~a("a", "b", None, 3) == a("a", "b", 4)
    assert masks.causal() | window(5, right=5) == window(None, right=5)
    assert a("a", "b", 0, 2) | a("a", "b", 3, 9) == a("a", "b", 0, 9)
    assert a("a", "b", 0, 2) | a("a", "b", 8, 9) | a("a", "b", 3, 7) == a("a", "b", 0, 9)
    assert a("a", "b", 4) | a("a", "b", None, 3) == masks.everything()
    assert a("a", "b", 0, 9) & ~a("a", "b", 5, 20) == a("a", "b", 0, 4)
    assert a("a", "b", 0, 9) & ~a("a", "b", 20, 30) == a("a", "b", 0, 9)
    assert a("a", "b", 3, 4) & ~a("a", "b", 0, 9) == masks.nothing()
    apart = a("a", "b", 0, 2) | a("a", "b", 4, 9)
    assert str(apart) == "difference('a', 'b', 0, 2) | difference('a', 'b', 4, 9)"
    assert isinstance(a("a", "b") & a("a", "c", 1) & a("c", "a", 1), masks.And)


def test_tables_and_modulos_of_the_same_fields_are_fused():
    def table(matrix):
        return masks.table("kind", "kind", matrix)

    square, wide = table([[1, 0], [1, 1]]), table([[1, 0, 1]])
    assert square & wide == table([[1, 0, 0], [0, 0, 0]])
    assert square | wide == table([[1, 0, 1], [1, 1, 0]])
    assert square & ~wide == table([[0, 0, 0], [1, 1, 0]])
    assert square | ~wide == ~table([[0, 0, 1], [0, 0, 0]])
    assert table([[0, 0]]) == square & table([[0, 1]]) == masks.nothing()
    assert square & ~square == masks.nothing() and ~~square == square

    def every(remainder, divisor=3):
        return masks.modulo("position", "position", divisor, remainder)

    assert every(0) & every(1) == masks.nothing() and every(0) & every(3) == every(0)
    assert every(0) & ~every(1) == every(0) == ~every(1) & every(0)
    assert ~every(0, 2) == every(1, 2) and every(0, 2) | every(1, 2) == every(5, 1) == masks.everything()
    assert isinstance(every(0, 3) & every(0, 5), masks.And) and isinstance(~every(0) & ~every(1), masks.And)


@pytest.mark.parametrize("named", (*papers.MASKS, *papers.PER_HEAD), ids=lambda named: named.name)
def test_masks_of_published_systems(named):
    rng, mask = np.random.default_rng(0), named.mask
    assert masks.parse(str(mask)) == mask
    for _ in range(5):
        tokens, tile = named.tokens(rng, batch=2, length=64), rng.integers(2, 17, size=2)
        visible = named.visible(tokens, tokens)
        assert visible.any() and not visible.all()
        for head, one in enumerate(mask.for_heads(mask.heads or 1)):
            meant = visible if mask.heads is None else visible[:, head]
            np.testing.assert_array_equal(one.dense(tokens, tokens), meant)
            assert not judge(one, meant, tokens, tokens, tile)[0]
            assert not any(judge(one, meant, tokens, tokens, (1, 1))[::2])


HEADS = 3


@pytest.mark.parametrize("seed", SEEDS)
def test_every_head_has_its_own_formula(seed):
    for formula, q_tokens, k_tokens in examples(seed, heads=HEADS):
        shape = (HEADS, *q_tokens.shape, k_tokens.shape[1])
        visible = np.broadcast_to(formula.visible(as_columns(q_tokens), as_rows(k_tokens)), shape)
        assert formula.mask.heads in (None, HEADS) and masks.parse(str(formula.mask)) == formula.mask
        for head, mask in zip(visible, formula.mask.for_heads(HEADS), strict=True):
            assert mask.heads is None and masks.parse(str(mask)) == mask
            np.testing.assert_array_equal(mask.dense(q_tokens, k_tokens), head, err_msg=str(formula.mask))


def test_switches_simplify_away():
    causal, even = masks.causal(), masks.switch([True, False, True, False])
    mask = (even | causal) & masks.same("document")
    assert mask.heads == even.heads == 4 and causal.heads is None
    assert mask.head(0) == masks.same("document") and mask.head(1) == causal & masks.same("document")
    assert mask.for_heads(4) == (mask.head(0), mask.head(1)) * 2
    assert causal.for_heads(3) == (causal,) * 3 and causal.head(7) == causal
    assert even & ~even == masks.nothing() and even | ~even == masks.switch(True) == masks.everything()
    assert even & masks.switch([1, 1, 0, 0]) == masks.switch(np.array([True, False, False, False]))
    assert masks.switch([False, False]) == masks.nothing() and masks.switch(np.bool_(1)) == masks.everything()


def test_a_formula_with_heads_has_no_reading_of_its_own():
    mask, tokens = masks.switch([True, False]) & masks.causal(), Tokens.arange(1, 4)
    summaries = mask.query_summaries(tokens.fields()), mask.key_summaries(tokens.fields())
    for read in (
        lambda: mask.dense(tokens, tokens),
        lambda: mask.tile(tokens.fields(), tokens.fields()),
        lambda: mask.verdict(*summaries),
    ):
        with pytest.raises(UserError, match=r"read head\(h\) of the mask, h from 0 to 1, or all of for_heads\(2\)"):
            read()
    with pytest.raises(UserError, match=r"The mask switch.* has switches for 2 heads, and here are 3: give every"):
        mask.for_heads(3)
    with pytest.raises(UserError, match=r"has no head 2: it has heads 0 to 1"):
        mask.head(2)
    with pytest.raises(UserError, match=r"has switches for 2 heads and switch\(\[.*\]\) for 3: give all switches of"):
        mask & masks.switch([True, False, True])


@pytest.mark.parametrize("seed", SEEDS)
def test_any_order_of_the_tokens_gives_the_same_pairs(seed):
    rng = np.random.default_rng(seed)
    for formula, q_tokens, k_tokens in examples(seed):
        p, r = rng.permutation(q_tokens.shape[1]), rng.permutation(k_tokens.shape[1])
        permuted = formula.mask.dense(q_tokens.map(lambda x, p=p: x[:, p]), k_tokens.map(lambda x, r=r: x[:, r]))
        dense = np.asarray(formula.mask.dense(q_tokens, k_tokens))
        np.testing.assert_array_equal(permuted, dense[:, p][:, :, r])


def test_readings_agree_inside_jit():
    atoms = masks.table("node", "node", np.tri(32)) & masks.table("kind", None, [[1], [0], [1]])
    atoms |= masks.modulo("position", "frame", 5, 2) | masks.modulo(None, "node", 50, 2)
    ((formula, q_tokens, k_tokens),) = examples(seed=2, count=1)
    mask = formula.mask | atoms
    traced = jax.jit(mask.dense)(*jax.tree.map(jnp.asarray, (q_tokens, k_tokens)))
    np.testing.assert_array_equal(traced, mask.dense(q_tokens, k_tokens))
    blocks = {name: x[:, :60].reshape(2, 6, 10) for name, x in q_tokens.fields().items()}
    ours = mask.query_summaries(blocks), mask.key_summaries(blocks)
    theirs = jax.jit(lambda blocks: (mask.query_summaries(blocks), mask.key_summaries(blocks)))(blocks)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all(x.shape == (2, 6) and x.dtype == np.int32 for x in jax.tree.leaves((ours, theirs)))
    np.testing.assert_array_equal(jax.jit(mask.verdict)(*theirs), mask.verdict(*ours))


def test_summaries_are_what_the_formula_reads():
    blocks = {"position": np.array([[-3, 4], [31, 40]]), "kind": np.array([[0, 2], [1, 1]]), "other": np.zeros((2, 2))}
    mask = masks.causal() & masks.table("position", "kind", np.ones((32, 3))) & masks.modulo("position", None, 3, 1)
    summaries = {read: x.tolist() for read, x in mask.query_summaries(blocks).items()}
    assert summaries == {
        ("least", "position"): [-3, 31],
        ("greatest", "position"): [4, 40],
        ("classes", "position"): [1 << 4, -(1 << 31)],
        ("residues", "position", 3, 1): [(1 << 2) + 1, 1],
    }
    assert mask.key_summaries(blocks)["classes", "kind"].tolist() == [5, 2]
    assert {field for _, field, *_ in mask.key_summaries(blocks)} == {"position", "kind"}
    assert masks.modulo("position", "kind", 33).query_reads == {("least", "position"), ("greatest", "position")}
    assert masks.everything().query_summaries(blocks) == {}


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
        (
            "same(document)",
            r"has the argument document; arguments are numbers, quoted field names, True, False and lists",
        ),
        (
            "table('a', 'b', [[1, 0], [1]])",
            r"table\('a', 'b', ...\) cannot be: its matrix has the shape \(2,\), and needs",
        ),
        ("table('a', 'b', [[]])", r"the shape \(1, 0\), and needs rows of equal length, from \(1, 1\) to \(32, 32\)"),
        (f"table('a', 'b', {[[1]] * 33})", r"its matrix has the shape \(33, 1\)"),
        ("table('a', 'b', [[1, 2]])", r"its matrix holds 2, and entries are 0 or 1, False or True"),
        ("table(None, None, [[1]])", r"compares nothing: name a query field or a key field"),
        ("modulo('a', 'b', 0)", r"modulo\('a', 'b', 0, 0\) cannot be: the divisor is a whole number from 1 on"),
        ("modulo('a', 'b', 2.5)", r"cannot be: the divisor is a whole number from 1 on, the remainder a whole number"),
        ("modulo('a', 3, 2)", r"cannot be: fields are names in quotes"),
        ("switch([])", r"switch\(\[\]\) cannot be: it takes True, False, or a list of them with one for each head"),
        ("switch('on')", r"switch\('on'\) cannot be"),
        ("switch([[True], [False]])", r"cannot be: it takes True, False"),
        ("window()", r"cannot be read \(window\(\) missing 1 required positional argument: 'left'\)"),
        ("window(3, bogus=1)", r"got an unexpected keyword argument 'bogus'"),
        ("window(3.5)", r"difference\('position', 'position', 0, 3.5\) cannot be: bounds are whole numbers or None"),
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
