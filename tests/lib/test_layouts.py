"""Layouts: orders that are permutations, the work they predict against closed formulas and against counting, and orders
that are searched for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.formulas import random_formula, random_tokens
from striate import Tokens, UserError, masks
from striate.lib.layouts import Contiguous, Dealt, Striped, TileMap, ZigZag, balance, balanced
from striate.lib.layouts.work import by_shard
from striate.lib.masks import ALL, MIXED, NONE

SIZES = [(1, 12), (2, 4), (4, 8), (8, 16)]  # (shards, tokens of a shard)
LAYOUTS = [make(shards) for shards, _ in SIZES for make in (Contiguous, Striped, ZigZag)] + [
    Striped(1, 4),
    Striped(2, 2),
    Striped(4, 8),
    Striped(8, 4),
    Dealt(1, (3, 0, 11)),
    Dealt(4, (24, 0, 5, 8, 31)),
    Dealt(8, tuple(range(120, -8, -8))),
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


def test_dealt_pieces_follow_each_other_as_they_are_named():
    rng = np.random.default_rng(5)
    for _ in range(20):
        starts = (0, *np.sort(rng.choice(np.arange(1, 60), size=rng.integers(1, 12), replace=False)).tolist())
        pieces = dict(zip(starts, np.split(np.arange(60), starts[1:]), strict=True))
        named = tuple(rng.permutation(starts).tolist())
        layout = Dealt(3, named)
        np.testing.assert_array_equal(layout.order(60), np.concatenate([pieces[start] for start in named]))
        assert layout == Dealt(3, named) and hash(layout) == hash(Dealt(3, named))
        assert layout != Dealt(3, (named[-1], *named[:-1]))
    assert str(Dealt(2, (3, 0, 1))) == "Dealt(shards=2, 3 pieces)"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiles_are_whole_or_have_no_places(layout):
    length = layout.shards * shard_length(layout)
    order = layout.order(length).tolist()
    for tile in (1, 2, 3, 4, 8, 16):
        places = layout.places(length, tile)
        pieces = [order[i : i + tile] for i in range(0, length, tile)]
        natural = {tuple(range(i, i + tile)): i // tile for i in range(0, length, tile)}
        wanted = [natural.get(tuple(piece)) for piece in pieces]
        if shard_length(layout) % tile or None in wanted:
            assert places is None
        else:
            np.testing.assert_array_equal(places, wanted)


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


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.shards == 4], ids=str)
def test_one_map_serves_every_order_of_whole_tiles(layout):
    rng, length = np.random.default_rng(3), 4 * shard_length(layout)
    for tile in (1, 2, 4, 8):
        tokens, mask = random_tokens(rng, 2, length), random_formula(rng).mask
        places = layout.places(length, tile)
        if places is not None:
            work = TileMap.of(mask, tokens, (tile, tile)).work(4, places)
            np.testing.assert_array_equal(work.counts, layout.work(mask, tokens, (tile, tile)).counts)


def test_chunks_of_the_map_make_no_difference(monkeypatch):
    rng = np.random.default_rng(11)
    tokens, mask = random_tokens(rng, 3, 60), masks.causal() & masks.switch([True, False, True]) | masks.same("frame")
    whole = TileMap.of(mask, tokens, (4, 5))
    monkeypatch.setattr("striate.lib.layouts.work.CHUNK", 100)
    for name in ("mixed", "full", "live"):
        np.testing.assert_array_equal(getattr(TileMap.of(mask, tokens, (4, 5)), name), getattr(whole, name))


def test_the_heads_of_a_mask_are_added_up():
    tokens = random_tokens(np.random.default_rng(2), 2, 32)
    mask = masks.causal() & (masks.same("document") | masks.switch([True, False, False]))
    counts = [Striped(4, 2).work(mask.head(h), tokens, (2, 4)).counts for h in range(3)]
    np.testing.assert_array_equal(Striped(4, 2).work(mask, tokens, (2, 4)).counts, sum(counts))
    assert (counts[0] != counts[1]).any()


def test_offsets_and_totals_are_those_of_the_devices():
    rng = np.random.default_rng(4)
    for layout in (Contiguous(4), Striped(4, 2), ZigZag(4)):
        for mask in (masks.window(5), masks.window(2) | masks.key("position", 0, 0), masks.nothing()):
            work = layout.work(mask, random_tokens(rng, 1, 32), (1, 1))
            busy = [[work.live[step, device] for device in range(4)] for step in range(4)]
            assert work.offsets == tuple(step for step in range(4) if any(busy[step]))
            assert work.busiest == max(sum(busy[step][device] for step in range(4)) for device in range(4))


@pytest.mark.parametrize("width", [1, 2, 8, 9, 16, 17, 25])
def test_a_window_in_contiguous_order_has_work_at_so_many_offsets(width):
    work = Contiguous(8).work(masks.window(width - 1), Tokens.arange(1, 64), (4, 4))
    assert work.offsets == tuple(range(1 + -(-(width - 1) // 8)))


def packed(rng, length, mean):
    """One row of documents of random lengths, each with its own positions."""
    ends = np.cumsum(rng.geometric(1 / mean, size=length))
    document = np.searchsorted(ends, np.arange(length), side="right")
    position = np.arange(length) - np.append(0, ends)[document]
    return Tokens(position=position[None].astype(np.int32), document=document[None].astype(np.int32))


BALANCED = [masks.causal() & masks.same("document"), masks.same("document"), masks.window(20) & masks.same("document")]


@pytest.mark.parametrize("mask", BALANCED, ids=str)
@pytest.mark.parametrize("lockstep", [True, False])
def test_balanced_is_never_worse_than_stripes_and_mostly_better(mask, lockstep):
    rng, better = np.random.default_rng(8), 0
    for shards, tile in ((4, 8), (4, 2), (8, 4), (8, 2)):
        tokens = packed(rng, 512, mean=60)
        work = {
            layout: layout.work(mask, tokens, (tile, tile))
            for layout in (
                balanced(mask, tokens, shards, tile, lockstep),
                *(Striped(shards, tile * n) for n in (1, 2, 4)),
                Contiguous(shards),
            )
        }
        dealt, *stripes = [x.critical_path if lockstep else x.busiest for x in work.values()]
        assert next(iter(work.values())).live.sum() == min(x.live.sum() for x in work.values())
        assert dealt <= min(stripes)
        better += dealt < min(stripes)
    assert better >= 3


def test_balanced_evens_out_what_stripes_do_not():
    """Every fourth tile sees everything: striped over four shards, all of it falls to one of them."""
    heavy = np.repeat(np.arange(64) % 4 == 0, 2)[None].astype(np.int32)
    tokens = Tokens.arange(1, 128).replace(heavy=heavy)
    mask = masks.query("heavy", 1, 1) | masks.same("position")
    assert Striped(4, 2).work(mask, tokens, (2, 2)).balance < 0.3
    for lockstep in (True, False):
        layout = balanced(mask, tokens, 4, 2, lockstep)
        assert layout.work(mask, tokens, (2, 2)).balance > 0.95
        assert layout == balanced(mask, tokens, 4, 2, lockstep)
        assert sorted(layout.starts) == list(range(0, 128, 2))


def test_the_rows_of_a_batch_share_one_order():
    rng = np.random.default_rng(6)
    rows = [packed(rng, 256, mean=40) for _ in range(2)]
    tokens = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    mask, tile = masks.causal() & masks.same("document"), (4, 4)
    layout = balanced(mask, tokens, 4, 4)
    apart = sum(layout.work(mask, row, tile).live for row in rows)
    np.testing.assert_array_equal(layout.work(mask, tokens, tile).live, apart)
    assert layout.work(mask, tokens, tile).critical_path <= Striped(4, 4).work(mask, tokens, tile).critical_path


def test_swaps_keep_the_sums_that_they_follow():
    rng = np.random.default_rng(9)
    live = rng.integers(0, 5, size=(48, 48), dtype=np.uint8)
    dealing = balance._Dealing(live, np.arange(48).reshape(6, 8))
    before = balance._path(dealing.work)
    places = dealing.shorten()
    assert (dealing.places != np.arange(48).reshape(6, 8)).any()
    np.testing.assert_array_equal(dealing.work, by_shard(live, dealing.places, dealing.places))
    np.testing.assert_array_equal(np.sort(places.reshape(-1)), np.arange(48))
    assert balance._path(by_shard(live, places, places)) < before


def test_the_softened_path_has_the_gradient_that_is_followed():
    work, shift = np.random.default_rng(10).uniform(0, 9, size=(5, 5)), 1e-5
    path, gradient = balance._softened(work, 0.7)
    assert balance._path(work) < path < balance._path(work) + 5 * 0.7 * np.log(5)
    for d, e in np.ndindex(5, 5):
        moved = [
            balance._softened(work + sign * shift * (np.indices((5, 5)) == [[[d]], [[e]]]).all(0), 0.7)[0]
            for sign in (1, -1)
        ]
        assert gradient[d, e] == pytest.approx((moved[0] - moved[1]) / (2 * shift), abs=1e-5)


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
        (Dealt(8, (0, 64)), 60, "multiple of 8, got 60: use 56 or 64"),
        (Dealt(8, (0, 64)), 64, r"needs a length of more than 64 tokens, .* got 64: make it again"),
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
    for starts in ((), (1, 2), (0, 2, 2), (0, -1)):
        with pytest.raises(UserError, match="pieces start at token 0 and at further ones, each named once"):
            Dealt(2, starts)
    with pytest.raises(
        UserError, match=r"Striped\(shards=4, stripe=3\) needs a length that is a multiple of 12, got 16"
    ):
        balanced(masks.causal(), Tokens.arange(1, 16), 4, 3)
    with pytest.raises(UserError, match=r"these Tokens are traced: count it outside of jax\.jit"):
        jax.jit(lambda tokens: Contiguous(2).work(masks.causal(), tokens).ideal)(Tokens.arange(1, 4))
    with pytest.raises(UserError, match="reads the query field 'frame'"):
        Contiguous(2).work(masks.same("frame"), Tokens.arange(1, 4))
