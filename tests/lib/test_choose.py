"""The choice of a layout and a strategy: predictions against a ring that is walked pair by pair, and what it says."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import striate
from oracles.formulas import random_formula, random_tokens
from striate import Tokens, UserError, masks
from striate.lib.layouts import Contiguous, Dealt, ZigZag
from striate.lib.parallel import AllGather, Ring, RingUlysses, Ulysses
from striate.lib.parallel.choose import GENERIC, HARDWARE, Hardware, Strategy, choose, kernel_tile
from striate.lib.parallel.ring import live_offsets
from suites.attention import mesh

LENGTH, SHARDS, HEADS, KV_HEADS, WIDTH = 32, 4, 4, 2, 8
SHAPE = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH}
PER_HEAD = masks.causal() & (masks.same("document") | masks.switch([True, True, False, False]))


class Walked(NamedTuple):
    """What a strategy does, from the dense mask and from arrays that are really cut."""

    path: float
    offsets: tuple[int, ...]
    sent: tuple[int, int]
    held: int


def walk(strategy: Strategy, visible_HBTT: np.ndarray, kv_heads: int) -> Walked:
    """One formula, tokens in the order of a layout; every visible pair is a tile of one token."""
    heads, batch, length, _ = visible_HBTT.shape
    dealt = strategy.dealt
    ring = SHARDS // dealt
    tokens, repeated = length // ring, int(np.lcm(kv_heads, dealt))
    q = np.zeros((batch, tokens, heads // dealt, WIDTH), np.float16)
    block = np.zeros((2, batch, tokens, repeated // dealt, WIDTH), np.float16)
    gradients = block.astype(np.float32)
    if strategy.kind is AllGather:
        own = [visible_HBTT[:, :, d * tokens : (d + 1) * tokens].sum() / heads / batch for d in range(SHARDS)]
        others = SHARDS - 1
        sent = others * block.nbytes, others * (block.nbytes + gradients.nbytes)
        return Walked(max(own), (0,), sent, SHARDS * (block.nbytes + gradients.nbytes))
    work = np.zeros((ring, ring))  # of the devices of one head group: [step, device]
    for step, device in np.ndindex(ring, ring):
        born = (device - step) % ring
        pairs = visible_HBTT[:, :, device * tokens : (device + 1) * tokens, born * tokens : (born + 1) * tokens]
        work[step, device] = pairs.sum() / heads / batch / dealt
    offsets = tuple(step for step in range(ring) if work[step].any()) or (0,)
    place, forward, backward = 0, 0, 0
    for number, offset in enumerate(offsets):
        if offset != place:
            forward += block.nbytes
            backward += block.nbytes + gradients.nbytes * (number > 0)
        place = offset
    backward += gradients.nbytes * (place != 0)
    # An all-to-all keeps one of `dealt` parts of every array at home: q, k, v and out; q, k, v, d_out; their gradients.
    arrays = 2 * q.nbytes + block.nbytes
    float32 = (q.nbytes + block.nbytes) * 2
    forward += arrays * (dealt - 1) // dealt
    backward += (arrays + float32) * (dealt - 1) // dealt
    held = (2 if len(offsets) > 1 or offsets[0] else 1) * (block.nbytes + gradients.nbytes)
    return Walked(work.max(axis=1).sum(), offsets, (forward, backward), held)


def dense(mask, tokens, order) -> np.ndarray:
    """bool (H, B, T, T), tokens in the order given."""
    formulas = [np.asarray(formula.dense(tokens, tokens)) for formula in mask.for_heads(HEADS)]
    return np.stack(formulas)[:, :, order][:, :, :, order]


MASKS = [
    masks.causal(),
    masks.window(5),
    masks.causal() & masks.same("document"),
    masks.window(3) | masks.key("position", 0, 1),
    masks.nothing(),
    masks.after("position") & ~masks.window(12),
    *(random_formula(np.random.default_rng(seed), 2).mask for seed in range(4)),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_predictions_are_what_walking_the_ring_finds(mask):
    tokens = random_tokens(np.random.default_rng(1), 2, LENGTH)
    choice = choose(mask, tokens, SHARDS, tile=1, **SHAPE)
    assert {str(c.strategy) for c in choice.candidates} == {"Ring", "AllGather", "Ulysses", "RingUlysses 2"}
    for candidate in choice.candidates:
        visible = dense(mask, tokens, candidate.layout.order(LENGTH))
        walked, costs = walk(candidate.strategy, visible, KV_HEADS), candidate.costs
        assert (costs.path, costs.offsets) == (pytest.approx(walked.path), walked.offsets), candidate
        assert (costs.sent, costs.held) == (pytest.approx(walked.sent), pytest.approx(walked.held)), candidate
        assert candidate.ideal == pytest.approx(visible.sum() / HEADS / 2 / SHARDS)
        assert costs.hops == len(set(walked.offsets) - {0})


def test_heads_that_differ_are_computed_one_formula_after_the_other():
    tokens = random_tokens(np.random.default_rng(2), 1, LENGTH)
    choice = choose(PER_HEAD, tokens, SHARDS, tile=1, **SHAPE)
    formulas = PER_HEAD.head(0), PER_HEAD.head(3)
    for candidate in choice.candidates:
        if candidate.strategy.kind is Ulysses:
            assert candidate.obstacle == "2 heads over 4" and candidate.costs is None
            continue
        order = candidate.layout.order(LENGTH)
        parts = [walk(candidate.strategy, dense(formula, tokens, order)[:2], kv_heads=1) for formula in formulas]
        assert candidate.costs.path == pytest.approx(sum(part.path for part in parts) / 2)
        assert candidate.costs.offsets == tuple(sorted({*parts[0].offsets, *parts[1].offsets}))
        assert candidate.costs.sent == pytest.approx(tuple(np.sum([part.sent for part in parts], axis=0)))
        assert candidate.costs.held == pytest.approx(max(part.held for part in parts))


def test_a_formula_of_part_of_a_group_repeats_its_keys():
    """One key/value head for four heads: two formulas, each with its own copy of the keys for every head."""
    tokens = Tokens.arange(1, LENGTH)
    whole, split = (
        choose(mask, tokens, SHARDS, tile=1, heads=4, kv_heads=1, head_dim=WIDTH) for mask in (masks.causal(), PER_HEAD)
    )
    ring, rings = (next(c for c in choice.candidates if c.strategy.kind is Ring) for choice in (whole, split))
    assert rings.costs.sent == pytest.approx([4 * x for x in ring.costs.sent])  # twice two heads instead of one


@pytest.mark.parametrize("width", [1, 2, 8, 9, 10, 17])
def test_a_window_hops_no_further_than_it_reaches(width):
    choice = choose(masks.window(width - 1), Tokens.arange(1, 64), 8, tile=1, heads=8)
    ring = next(c for c in choice.candidates if c.order == "contiguous" and c.strategy.kind is Ring)
    assert ring.costs.offsets == tuple(range(1 + -(-(width - 1) // 8)))
    assert ring.costs.hops == -(-(width - 1) // 8)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_ring_finds_the_offsets_that_were_predicted(mask):
    """The shards are so short that the ring too looks at every token."""
    tokens = random_tokens(np.random.default_rng(3), 2, LENGTH)
    for candidate in choose(mask, tokens, SHARDS, tile=1, **SHAPE).candidates:
        if candidate.strategy.kind is Ring:
            permuted = candidate.layout.permute(tokens)
            assert candidate.costs.offsets == (live_offsets(mask, permuted, permuted, SHARDS) or (0,))


FAST = Hardware("links of no cost", 1e12, np.inf, np.inf, latency=0.0)
NEAR = Hardware("compute of no cost", np.inf, 1e9, np.inf, switched=True, latency=0.0)


@pytest.mark.parametrize("backward", [True, False])
def test_time_is_compute_where_links_cost_nothing_and_bytes_where_compute_does(backward):
    tokens = random_tokens(np.random.default_rng(4), 3, LENGTH)
    arguments = {"tile": 2, "backward": backward, **SHAPE}
    for hardware in (FAST, NEAR):
        for candidate in choose(MASKS[2], tokens, SHARDS, hardware=hardware, **arguments).candidates:
            # Two products of a pair, a head and a unit of width are 4 operations; backward there are five.
            operations = candidate.costs.path * 2 * 2 * WIDTH * HEADS * 3 * (14 if backward else 4)
            compute = operations / (hardware.flops * hardware.efficiency)
            assert candidate.costs.seconds == pytest.approx(compute + sum(candidate.costs.sent) / hardware.link)
            assert (candidate.costs.sent[1] > 0) == (backward and candidate.costs.sent[0] > 0)


def test_a_ring_of_links_takes_as_long_as_its_bytes_are_on_the_way():
    """One link a step, jumps over dead offsets by the shorter way, and two ways round for what is gathered."""
    tokens, size = Tokens.arange(1, 64), 64 // 8 * 2 * 2 * WIDTH * 2  # bytes of two heads' keys and values of a shard
    far = masks.difference("position", "position", 16, 16) | masks.difference("position", "position", 40, 40)
    arguments = {"heads": 8, "kv_heads": 2, "head_dim": WIDTH, "tile": 1, "backward": False}
    linked = replace(NEAR, switched=False)
    contiguous = {str(c.strategy): c for c in choose(far, tokens, 8, hardware=linked, **arguments).candidates[:5]}
    # Offsets 2 and 5: two links, then three.
    assert contiguous["Ring"].costs.offsets == (2, 5)
    assert contiguous["Ring"].seconds == pytest.approx((2 + 3) * size / 1e9)
    assert contiguous["AllGather"].seconds == pytest.approx(7 * size / 2 / 1e9)
    # q, out, and k and v, as two heads are repeated, have 8 heads; a byte crosses 8 / 4 links, one of two ways round.
    assert contiguous["Ulysses"].seconds == pytest.approx((4 + 4) * size / 1e9)
    # Backward, gradients in float32 make the way from 2 to 5, and home by 3 links, and keys their way again.
    both = choose(far, tokens, 8, hardware=linked, **{**arguments, "backward": True}).candidates[0]
    assert both.seconds == pytest.approx((2 * 5 + 2 * 3 + 2 * 3) * size / 1e9)


def test_a_hop_hides_behind_the_work_of_its_step():
    tokens, arguments = Tokens.arange(1, 64), {"tile": 1, "backward": False, **SHAPE}

    def ring(hardware):
        candidates = choose(masks.causal(), tokens, 4, hardware=hardware, **arguments).candidates
        return next(c for c in candidates if c.order == "zigzag" and c.strategy.kind is Ring).costs

    operations = 4 * WIDTH * HEADS
    own, step = 16 * 17 / 2 * operations, 16 * 16 / 2 * operations  # of the first step, and of each other one
    size = ring(GENERIC).sent[0] / 3
    for link in (1e-3, size / step, 1e3):
        hardware = Hardware("", 2.0, link, np.inf, latency=0.0)
        hop = size / link
        assert ring(hardware).seconds == pytest.approx(max(own, hop) + 2 * max(step, hop) + step)


def test_the_fastest_is_chosen_and_dealt_orders_have_to_be_worth_it():
    rng, dealt = np.random.default_rng(5), 0
    for mean in (10, 20, 40, 80, 160, 320):
        ends = np.cumsum(rng.geometric(1 / mean, size=512))
        document = np.searchsorted(ends, np.arange(512), side="right")[None].astype(np.int32)
        tokens = Tokens.arange(1, 512).replace(document=document)
        choice = choose(masks.same("document"), tokens, 8, tile=4, heads=5, hardware=FAST)
        plain = min(c.seconds for c in choice.candidates if not isinstance(c.layout, Dealt))
        least = min(c.seconds for c in choice.candidates)
        assert choice.chosen.seconds == (least if least * 1.02 < plain else plain)
        assert isinstance(choice.layout, Dealt) == (least * 1.02 < plain)
        dealt += isinstance(choice.layout, Dealt)
    assert 0 < dealt < 6


def test_known_problems_get_the_layouts_that_they_are_known_for():
    tokens = Tokens.arange(1, 65536)
    causal = choose(masks.causal(), tokens, 8, heads=9, hardware=HARDWARE["v5p"])
    assert (causal.layout, causal.chosen.strategy) == (ZigZag(8), Strategy(Ring))
    window = choose(masks.window(1023), tokens, 8, heads=8, kv_heads=1, hardware=HARDWARE["v5p"])
    assert (window.layout, window.chosen.strategy, window.offsets) == (Contiguous(8), Strategy(Ring), (0, 1))
    # A sink makes a ring wait for the device that has it; whoever gathers keys does not.
    sink = choose(masks.causal() & (masks.window(1023) | masks.sink(4)), tokens, 8, heads=9)
    assert sink.chosen.strategy.kind is AllGather
    # Without memory for all keys, a ring after all.
    least = min(c.costs.held for c in sink.candidates if c.costs)
    small = replace(GENERIC, memory=1.5 * least)
    ring = choose(masks.causal() & (masks.window(1023) | masks.sink(4)), tokens, 8, heads=9, hardware=small)
    assert ring.chosen.strategy.kind is Ring
    assert "AllGather cannot run: holds over" in " ".join(ring.reasons)


def test_dilation_is_nothing_to_stripes_of_one_token():
    """Tokens of the same residue are on the same device: the ring has one step."""
    mask = masks.window(8 * 64 - 1) & masks.modulo("position", "position", 8)
    choice = choose(mask, Tokens.arange(1, 8192), 8, heads=8)
    assert (choice.chosen.order, choice.offsets, choice.chosen.costs.sent) == ("striped 1", (0,), (0, 0))


def test_reasons_have_the_numbers_and_the_table_has_all():
    tokens = random_tokens(np.random.default_rng(6), 1, 4096)
    choice = choose(masks.causal() & masks.same("document"), tokens, 8, heads=12, kv_heads=4, hardware=HARDWARE["v5e"])
    reasons, costs = " ".join(choice.reasons), choice.chosen.costs
    for said in (f"{costs.path:.0f} tiles of 128 x 128", f"balance {choice.chosen.balance:.3f}", "TPU v5e"):
        assert said in reasons
    assert f"{costs.seconds * 1e3:.3g} ms" in reasons and str(choice.chosen) in reasons
    assert "Ulysses cannot run: 12 heads over 8." in reasons
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(choice.table())
    lines = [line.split() for line in console.export_text().splitlines()[2:]]
    assert len(lines) == len(choice.candidates)
    chosen = [line for line in lines if line[0] == "*"]
    assert len(chosen) == 1 and f"{costs.path:.0f}" in chosen[0] and f"{choice.chosen.balance:.3f}" in chosen[0]
    assert sum("over" in line for line in lines) == sum(c.obstacle != "" for c in choice.candidates) > 0


def test_layouts_that_do_not_fit_stay_with_their_reason():
    choice = choose(masks.causal(), Tokens.arange(1, 8 * 129), 8, heads=8)
    obstacles = {c.order: c.obstacle for c in choice.candidates if c.layout is None}
    assert obstacles == {
        "zigzag": "length % 16 > 0",
        "striped 128": "length % 1024 > 0",
        "dealt": "length % 1024 > 0",
    }
    fitting = {c.order: c for c in choice.candidates if c.layout and c.strategy.kind is Ring}
    for name, candidate in fitting.items():
        work = candidate.layout.work(masks.causal(), Tokens.arange(1, 8 * 129), (128, 128))
        assert (candidate.costs.path, candidate.balance) == (work.critical_path, pytest.approx(work.balance)), name
    assert set(fitting) == {"contiguous", "striped 1"}


@pytest.mark.parametrize(
    ("length", "tile"), [(16, 16), (128, 128), (1000, 128), (16384, 128), (32768, 256), (65536, 512), (1 << 20, 512)]
)
def test_tiles_of_a_shard(length, tile):
    assert kernel_tile(length) == tile


def test_mesh_axes_take_their_part_of_the_problem():
    row = random_tokens(np.random.default_rng(7), 1, LENGTH)
    tokens = jax.tree.map(lambda x: np.concatenate([x, x]), row)
    small = choose(MASKS[2], row, 2, tile=1, heads=4, kv_heads=2)
    large = choose(MASKS[2], tokens, mesh(data=2, sequence=2, tensor=2), tile=1, heads=8, kv_heads=4)
    assert [c.costs for c in large.candidates] == [c.costs for c in small.candidates]
    assert large.parallel.axis == "sequence" and large.parallel.mesh.shape["tensor"] == 2


@pytest.mark.parametrize(
    ("grid", "kinds"),
    [({"sequence": 4}, (Ring, AllGather, Ulysses)), ({"ring": 2, "sequence": 2}, (RingUlysses,))],
)
def test_what_was_compared_runs_and_is_the_same_function(grid, kinds):
    rng, grid = np.random.default_rng(8), mesh(**grid)
    tokens = random_tokens(rng, 1, LENGTH)
    q, k, v = (jnp.asarray(rng.normal(size=(1, LENGTH, n, WIDTH)), jnp.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    choice = choose(MASKS[2], tokens, grid, tile=1, **SHAPE)
    assert type(choice.parallel) is choice.chosen.strategy.kind
    wanted = striate.attention(q, k, v, mask=MASKS[2], q_tokens=tokens, implementation="reference")

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def spread(layout, parallel, *arrays):
        permuted, known = layout.permute(arrays), layout.permute(tokens)
        return layout.restore(striate.attention(*permuted, mask=MASKS[2], q_tokens=known, parallel=parallel))

    best = {c.strategy: c for c in sorted(choice.candidates, key=lambda c: -c.seconds)}
    assert {strategy.kind for strategy in best} == set(kinds)
    for strategy, candidate in best.items():
        parallel = choice.parallel if candidate is choice.chosen else strategy.on(grid)
        np.testing.assert_allclose(spread(candidate.layout, parallel, q, k, v), wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"mesh": 3}, "No layout cuts 32 tokens into 3 equal shards: use 30 or 33 tokens, or another number"),
        ({"mesh": 0}, "over 0 shards cannot be"),
        ({"kv_heads": 3}, "4 heads with 3 key/value heads over 4 shards cannot be"),
        ({"mask": masks.same("chapter")}, "reads the query field 'chapter'"),
        ({"mask": masks.switch([True, False])}, "has switches for 2 heads, and here are 4"),
        (
            {"hardware": replace(GENERIC, memory=1.0)},
            r"Nothing runs attention over 32 tokens .*Ring: holds over 1 B",
        ),
    ],
)
def test_what_cannot_be_is_answered(change, answer):
    arguments = {"mask": masks.causal(), "tokens": Tokens.arange(1, LENGTH), "mesh": 4, **SHAPE, **change}
    with pytest.raises(UserError, match=answer):
        choose(**arguments)


def test_meshes_and_tokens_that_cannot_be_are_answered():
    tokens = Tokens.arange(1, LENGTH)
    with pytest.raises(UserError, match=r"over the mesh axis 'sequence', and the mesh has \{'data': 2\}: name one"):
        choose(masks.causal(), tokens, mesh(data=2), **SHAPE)
    with pytest.raises(UserError, match="2 key/value heads do not divide over the 4 devices of mesh axis 'tensor'"):
        choose(masks.causal(), tokens, mesh(sequence=2, tensor=4), **SHAPE)
    with pytest.raises(UserError, match=r"2 heads, with 1 key/value heads, have the mask .* axis of 2 devices"):
        choose(PER_HEAD, tokens, mesh(sequence=2, tensor=2), **SHAPE)
    with pytest.raises(UserError, match=r"on 6 devices \(RingUlysses 3: 4 heads over 3\)"):
        choose(masks.causal(), Tokens.arange(1, 36), mesh(ring=2, sequence=3), tile=1, **SHAPE)
    with pytest.raises(UserError, match="these Tokens are traced"):
        jax.jit(lambda tokens: choose(masks.causal(), tokens, 4, **SHAPE).chosen.seconds)(tokens)


MILLION = """
import json, resource, time
import numpy as np
from striate import Tokens, masks
from striate.lib.parallel.choose import choose

length = 1 << 20
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
ends = np.cumsum(np.random.default_rng(0).lognormal(9.2, 1.0, size=1024).astype(int) + 64)
document = np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)
position = (np.arange(length) - np.append(0, ends)[document]).astype(np.int32)
tokens = Tokens(position=position[None], document=document[None])
inside = masks.causal() & masks.same("document")
for mask in (inside, inside & (masks.window(4095) | masks.sink(4))):
    choice = choose(mask, tokens, 8, heads=32, kv_heads=8)
    costs = choice.chosen.costs
    figures = {"balance": choice.chosen.balance, "seconds": time.process_time() - started}
    figures["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps(figures))
"""


@pytest.mark.long
def test_a_million_tokens_take_seconds_and_megabytes():
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        figures = json.loads(line)
        assert figures["balance"] >= 1 / 1.10 and figures["seconds"] <= 30 and figures["megabytes"] <= 1000
    assert len(done.stdout.splitlines()) == 2
