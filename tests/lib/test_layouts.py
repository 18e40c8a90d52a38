"""Layouts: orders that are permutations, and the work they predict against closed formulas and against counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.formulas import random_formula, random_tokens
from striate import Tokens, UserError, masks
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.masks import ALL, MIXED, NONE

SIZES = [(1, 12), (2, 4), (4, 8), (8, 16)]  # (shards, tokens of a shard)
LAYOUTS = [make(shards) for shards, _ in SIZES for make in (Contiguous, Striped, ZigZag)] + [
    Striped(1, 4),
    Striped(2, 2),
    Striped(4, 8),
    Striped(8, 4),
]


def shard_length(layout) -> int:
    return dict(SIZES)[layout.shards]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_order_is_a_permutation_that_restore_undoes(layout):
    length = layout.shards * shard_length(layout)
    np.testing.assert_array_equal(np.sort(layout.order(length)), np.arange(length))
    tree = {"x": np.arange(3 * length).reshape(3, length), "tokens": Tokens.arange(3, length)}
    permuted = layout.permute(tree)
    np.testing.assert_array_equal(permuted["x"], tree["x"][:, layout.order(length)])
    np.testing.assert_array_equal(permuted["tokens"].position[1], layout.order(length))
    assert isinstance(permuted["x"], np.ndarray) and isinstance(permuted["tokens"].position, jax.Array)
    for x, y in zip(jax.tree.leaves(layout.restore(permuted)), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(x, y)
    other_axis = layout.permute(np.arange(2 * length).reshape(length, 2), axis=0)
    np.testing.assert_array_equal(other_axis[:, 0], 2 * layout.order(length))
    traced = jax.jit(lambda x: layout.restore(layout.permute(x)))(jnp.asarray(tree["x"]))
    np.testing.assert_array_equal(traced, tree["x"])


@pytest.mark.parametrize(("shards", "c"), SIZES)
def test_orders_are_those_of_the_papers(shards, c):
    d, y = np.arange(shards)[:, None], np.arange(c)[None]
    np.testing.assert_array_equal(Striped(shards, 1).order(shards * c).reshape(shards, c), y * shards + d)
    np.testing.assert_array_equal(Contiguous(shards).order(shards * c).reshape(shards, c), d * c + y)
    np.testing.assert_array_equal(Striped(shards, c).order(shards * c), Contiguous(shards).order(shards * c))
    h = c // 2
    zigzag = np.where(y < h, d * h + y, (2 * shards - 1 - d) * h + (y - h))
    np.testing.assert_array_equal(ZigZag(shards).order(shards * c).reshape(shards, c), zigzag)
    stripes = (y // 2 * shards + d) * 2 + y % 2
    np.testing.assert_array_equal(Striped(shards, 2).order(shards * c).reshape(shards, c), stripes)


@pytest.mark.parametrize(("shards", "c"), SIZES)
def test_causal_pairs_follow_the_closed_formulas(shards, c):
    tokens = Tokens.arange(1, shards * c)
    step, device = np.arange(shards)[:, None], np.arange(shards)[None]
    own, full = c * (c + 1) // 2, np.full((shards, shards), c * c)
    wanted = {
        Contiguous(shards): np.where(step == 0, own, np.where(device >= step, full, 0)),
        Striped(shards): np.where(device >= step, own, c * (c - 1) // 2),
        ZigZag(shards): np.where(step == 0, own, full // 2),
    }
    for layout, pairs in wanted.items():
        work = layout.work(masks.causal(), tokens, tile=(1, 1))
        np.testing.assert_array_equal(work.live, pairs)
        np.testing.assert_array_equal(work.counts.sum(-1), full)
        assert work.ideal == c * shards * (c * shards + 1) / 2 / shards
        assert work.critical_path == pairs.max(1).sum()
        assert work.balance == pytest.approx(work.ideal / work.critical_path)


@pytest.mark.smoke
def test_the_figures_of_the_papers():
    def critical_path(layout, c, tile):
        return layout.work(masks.causal(), Tokens.arange(1, 8 * c), tile=(tile, tile)).critical_path

    assert critical_path(Contiguous(8), 16, 1) == 1928
    assert critical_path(Striped(8), 16, 1) == 1088
    assert critical_path(ZigZag(8), 16, 1) == 1032
    assert critical_path(Contiguous(8), 1024, 128) == 484
    assert critical_path(Striped(8), 1024, 128) == critical_path(Striped(8, 128), 1024, 128) == 288
    assert critical_path(ZigZag(8), 1024, 128) == 260


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_counts_are_those_of_the_dense_mask(layout):
    rng = np.random.default_rng(7)
    c = shard_length(layout)
    formulas = [random_formula(rng, depth).mask for depth in (1, 2, 3)]
    # One side alone decides the second and third.
    usual = [masks.causal() & masks.same("document"), masks.prefix(), masks.query("frame", 1), masks.everything()]
    for mask in (*usual, *formulas):
        tokens = random_tokens(rng, 2, layout.shards * c)
        order = layout.order(layout.shards * c)
        dense = np.asarray(mask.dense(tokens, tokens))[:, order][:, :, order]
        blocks = dense.reshape(2, layout.shards, c, layout.shards, c).sum((0, 2, 4))
        counts = layout.work(mask, tokens, tile=(1, 1)).counts
        for step in range(layout.shards):
            for device in range(layout.shards):
                seen = blocks[device, (device - step) % layout.shards]
                np.testing.assert_array_equal(counts[step, device], [2 * c * c - seen, 0, seen], err_msg=str(mask))


def test_counts_of_larger_tiles_hold_every_verdict():
    tokens = Tokens.arange(1, 2 * 40)
    counts = Contiguous(2).work(masks.causal(), tokens, tile=(8, 16)).counts
    kinds = {name: counts[..., i].tolist() for i, name in enumerate(("none", "mixed", "all"))}
    assert (NONE, MIXED, ALL) == (-1, 0, 1)
    # A shard of 40 has 5 query tiles and 3 key tiles, the last of them short; on the diagonal 5 tiles are mixed.
    assert kinds == {"none": [[6, 6], [15, 0]], "mixed": [[5, 5], [0, 0]], "all": [[4, 4], [0, 15]]}


@pytest.mark.parametrize(
    ("layout", "length", "answer"),
    [
        (
            Striped(8, 3),
            100,
            r"Striped\(shards=8, stripe=3\) needs a length that is a multiple of 24, got 100: use 96 or 120, or",
        ),
        (ZigZag(4), 3, r"ZigZag\(shards=4\) needs a length that is a multiple of 8, got 3: use 8, or another layout"),
        (Contiguous(8), 4097, "multiple of 8, got 4097: use 4096 or 4104"),
    ],
)
def test_a_length_that_does_not_divide_is_answered(layout, length, answer):
    for call in (layout.check, layout.order, lambda n: layout.permute(np.zeros((1, n)))):
        with pytest.raises(UserError, match=answer):
            call(length)


def test_senseless_numbers_are_answered():
    for make in (lambda: Striped(0), lambda: Striped(4, 0), lambda: ZigZag(-1), lambda: Contiguous(0)):
        with pytest.raises(UserError, match=r"cannot be: its numbers are at least 1"):
            make()
    with pytest.raises(UserError, match="reads the query field 'frame'"):
        Contiguous(2).work(masks.same("frame"), Tokens.arange(1, 4))
