"""Attention spread over devices: the suite for every strategy, layout and number of shards, and what travels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import striate
from oracles.formulas import as_columns, as_rows, random_formula, random_tokens
from striate import Tokens, UserError, masks, scores
from striate.lib.blockwise import Blockwise
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.parallel import AllGather, Ring, RingUlysses, Ulysses
from striate.lib.parallel.ring import live_offsets
from striate.lib.tiles import Task
from suites import attention as suite
from suites.attention import RULE, System, check_bound, mesh, random_problem, solve
from suites.jaxprs import equations, jaxprs

STRATEGIES = (Ring, AllGather, Ulysses)


def systems(strategy, shards: int) -> list[System]:
    layouts = Contiguous(shards), Striped(shards, 1), Striped(shards, 13), ZigZag(shards)
    grid = mesh(ring=2, sequence=shards // 2) if strategy is RingUlysses else mesh(sequence=shards)
    return [System(parallel=strategy(grid), layout=layout) for layout in layouts]


def heads_divide(system: System, heads: int) -> bool:
    return not isinstance(system.parallel, Ulysses) or heads % system.parallel.mesh.shape["sequence"] == 0


# Heads are dealt before anything depends on the layout, so two layouts are enough for what deals them.
SYSTEMS = [
    *(system for how in itertools.product((Ring, AllGather), (1, 2, 4, 8)) for system in systems(*how)),
    *(system for shards in (2, 4) for system in systems(Ulysses, shards)[2:]),
    *(system for shards in (4, 8) for system in systems(RingUlysses, shards)[2:]),
]
SPREAD = [system for system in SYSTEMS if system.shards > 1]


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
class TestEveryStrategyAndLayout(suite.AttentionSuite):
    pass


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_system_of_each_strategy(strategy):
    system = System(parallel=strategy(mesh(sequence=4)), layout=Striped(4, 13))
    check_bound(system, RULE, suite.AttentionSuite().problem(system, heads=4, kv_heads=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "dtype", "heads", "kv_heads"),
    [
        (system, *shape)
        for system in [*SYSTEMS, *systems(Ulysses, 8)]
        for shape in (("float32", 8, 1), ("float32", 2, 2), ("bfloat16", 4, 2), ("float32", 24, 6))
        if heads_divide(system, shape[1])
    ],
    ids=str,
)
def test_every_ratio_of_heads(system, dtype, heads, kv_heads):
    check_bound(system, RULE, suite.AttentionSuite().problem(system, dtype=dtype, heads=heads, kv_heads=kv_heads))


def check_random_masks(seed: int, count: int) -> None:
    """Random masks, strategies, shards and layouts; twice as many keys as queries."""
    rng = np.random.default_rng(seed)
    while count:
        formula, q_tokens, k_tokens = random_formula(rng), random_tokens(rng, 4, 208), random_tokens(rng, 4, 416)
        shown = np.broadcast_to(formula.visible(as_columns(q_tokens), as_rows(k_tokens)), (4, 208, 416))
        if 0 < shown.mean() < 1:
            system = SPREAD[rng.integers(len(SPREAD))]
            check_bound(system, formula.mask, random_problem(rng, q_tokens, k_tokens), shown)
            count -= 1


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_random_masks(seed):
    check_random_masks(seed, count=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_random_masks(seed):
    check_random_masks(seed, count=4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_and_heads_are_spread_as_well(strategy):
    everywhere = strategy(mesh(data=2, sequence=2, tensor=2))
    system = System(parallel=everywhere, layout=ZigZag(2))
    problem = suite.AttentionSuite().problem(system)
    check_bound(system, RULE, problem)
    placed = jax.jit(lambda q, k, v: striate.attention(q, k, v, parallel=everywhere))(*problem[:3])
    assert placed.sharding.is_equivalent_to(
        jax.NamedSharding(everywhere.mesh, P("data", "sequence", "tensor")), placed.ndim
    )


def test_one_shard_is_one_device_to_the_bit():
    problem = suite.AttentionSuite().problem(System())
    for strategy in STRATEGIES:
        spread = solve(System(parallel=strategy(mesh(sequence=1))), RULE, problem)
        alone = suite.arrays(solve(System("xla"), RULE, problem))
        for name, x in suite.arrays(spread).items():
            np.testing.assert_array_equal(suite.bits(x), suite.bits(alone[name]), err_msg=name)


class TestWhatTravels:
    SHARDS, BATCH, LOCAL, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 32, 4, 2, 16, 8
    # Bytes of the keys and values of one shard, in one byte an entry.
    BLOCK = BATCH * LOCAL * KV_HEADS * (WIDTH + VALUE_WIDTH)

    def arrays(self):
        length = self.SHARDS * self.LOCAL
        q = jnp.zeros((self.BATCH, length, self.HEADS, self.WIDTH), jnp.bfloat16)
        k = jnp.zeros((self.BATCH, length, self.KV_HEADS, self.WIDTH), jnp.bfloat16)
        v = jnp.zeros((self.BATCH, length, self.KV_HEADS, self.VALUE_WIDTH), jnp.bfloat16)
        tokens = Tokens.arange(self.BATCH, length)
        return q, k, v, tokens, tokens

    def passes(self, strategy):
        """The jaxprs of the forward and of the backward pass."""
        parallel = strategy(mesh(sequence=self.SHARDS))
        task = Task(masks.causal() & masks.same("document"), 1.0, Blockwise)
        arrays = self.arrays()
        out = jnp.zeros((*arrays[0].shape[:3], self.VALUE_WIDTH), jnp.bfloat16)
        row = jnp.zeros(arrays[0].shape[:3], jnp.float32)
        forward = jax.make_jaxpr(lambda *x: parallel.forward(task, suite.PLAIN, *x))(*arrays)
        backward = jax.make_jaxpr(lambda *x: parallel.backward(task, suite.PLAIN, *x))(*arrays, out, row, row)
        return forward.jaxpr, backward.jaxpr

    def test_around_the_ring_keys_hop_in_their_dtype_and_gradients_in_float32(self):
        forward, backward = (travelled(jaxpr, "ppermute") for jaxpr in self.passes(Ring))
        # Tokens are one number for every key and field, against KV_HEADS (WIDTH + VALUE_WIDTH) numbers.
        assert 0 < forward.pop("int32") == backward.pop("int32") <= (self.SHARDS - 1) * self.BLOCK
        assert forward == {"bfloat16": 2 * self.BLOCK * (self.SHARDS - 1)}
        assert backward == {"bfloat16": 2 * self.BLOCK * (self.SHARDS - 1), "float32": 4 * self.BLOCK * self.SHARDS}

    def test_all_gather_takes_keys_in_their_dtype_and_sums_gradients_in_float32(self):
        forward, backward = self.passes(AllGather)
        keys, gradients = travelled(backward, "all_gather"), travelled(backward, "reduce_scatter")
        assert keys == travelled(forward, "all_gather") and keys["bfloat16"] == 2 * self.BLOCK
        assert set(keys) == {"bfloat16", "int32"} and gradients == {"float32": 4 * self.BLOCK * self.SHARDS}

    def test_no_hop_waits_for_the_compute_of_its_step(self):
        for jaxpr in self.passes(Ring):
            assert not waiting_hops(jaxpr)

    def test_a_hop_that_waits_is_found(self):
        def step(_, x):
            return jax.lax.ppermute(x @ x, "sequence", [(0, 1), (1, 0)])

        def shard(x):
            return jax.lax.fori_loop(0, 3, step, x)

        spread = jax.shard_map(shard, mesh=mesh(sequence=2), in_specs=P("sequence"), out_specs=P("sequence"))
        assert waiting_hops(jax.make_jaxpr(spread)(jnp.zeros((4, 2))).jaxpr)

    def test_one_device_sends_nothing(self):
        single, task = Ring(mesh(sequence=1)), Task(masks.causal(), 1.0, Blockwise)
        jaxpr = jax.make_jaxpr(lambda *x: single.forward(task, suite.PLAIN, *x))(*self.arrays()).jaxpr
        assert not travelled(jaxpr, "ppermute")


class TestOffsets:
    """A ring visits the offsets at which some device has work, and no others."""

    @pytest.mark.parametrize("left", [0, 1, 63, 64, 99, 128])
    def test_a_window_needs_as_many_as_the_formula_says(self, left):
        tokens = Tokens.arange(1, 512)
        offsets = live_offsets(masks.window(left), tokens, tokens, 8)
        assert offsets == tuple(range(1 + -(-left // 64)))

    @pytest.mark.parametrize("seed", range(6))
    def test_no_offset_with_work_is_left_out(self, seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            q_tokens, k_tokens = random_tokens(rng, 2, 104), random_tokens(rng, 2, 208)
            formula, layout = random_formula(rng), Striped(8, 13) if seed % 2 else Contiguous(8)
            q_tokens, k_tokens = layout.permute((q_tokens, k_tokens))
            shown = np.asarray(formula.visible(as_columns(q_tokens), as_rows(k_tokens)))
            blocks = np.broadcast_to(shown, (2, 104, 208)).reshape(2, 8, 13, 8, 26).any((0, 2, 4))
            needed = {(q - k) % 8 for q, k in np.argwhere(blocks)}
            assert needed <= set(live_offsets(formula.mask, q_tokens, k_tokens, 8)), formula.mask

    @pytest.mark.parametrize("text", ["window(40)", "window(10, right=60)", "same('document')", "nothing()", "sink(3)"])
    def test_it_is_the_same_as_the_whole_ring(self, text):
        mask, rng = masks.parse(text), np.random.default_rng(5)
        position = np.arange(208, dtype=np.int32)[None].repeat(2, 0)
        tokens = Tokens(position=position, document=position // 60)
        problem = random_problem(rng, tokens)
        whole = Ring(mesh(sequence=8))
        ring = whole.for_tokens(mask, tokens, tokens)
        assert len(ring.offsets) < 8 or text == "sink(3)"
        check_bound(System(parallel=ring), mask, problem)
        got, expected = (suite.arrays(solve(System(parallel=x), mask, problem)) for x in (ring, whole))
        for name, x in got.items():
            np.testing.assert_array_equal(suite.bits(x), suite.bits(expected[name]), err_msg=name)

    def test_known_tokens_are_used_without_being_asked_and_hops_are_left_out(self):
        ring, q = Ring(mesh(sequence=8)), jnp.ones((1, 128, 2, 8))

        def loss(q):
            return striate.attention(q, q, q, mask=masks.window(20), parallel=ring).sum()

        sent = travelled(jax.make_jaxpr(jax.grad(loss))(q).jaxpr, "ppermute")
        # Two hops instead of seven of keys and values in each pass, and three of the gradients.
        assert sent["float32"] == (2 + 2 + 3) * 2 * 16 * 2 * 8 * 4

    def test_tokens_that_need_another_offset_are_found(self):
        mask, natural = masks.window(20), Tokens.arange(1, 128)
        ring = Ring(mesh(sequence=8)).for_tokens(mask, natural, natural)
        q = jnp.ones((1, 128, 2, 8))

        @jax.jit
        def attend(tokens):
            return striate.attention(q, q, q, mask=mask, q_tokens=tokens, parallel=ring)

        assert np.isfinite(attend(natural)).all()
        assert np.isnan(attend(natural.replace(position=natural.position[:, ::-1].at[:, 0].set(0)))).any()

    @pytest.mark.parametrize("offsets", [(1, 0), (0, 0), (0, 8), (-1,)])
    def test_offsets_that_cannot_be_are_answered(self, offsets):
        with pytest.raises(UserError, match="whole numbers from 0 to 7, ascending"):
            Ring(mesh(sequence=8), offsets=offsets)


class TestInsideAShardMap:
    """The caller has mapped over the sequence axis: the strategy takes the shards as they are."""

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("strategy", [Ring, AllGather, Ulysses])
    def test_results_and_gradients(self, strategy, check_vma):
        problem = suite.AttentionSuite().problem(System())
        parallel, spec = strategy(mesh(sequence=4)), P(None, "sequence")
        score = scores.compose(scores.alibi(jnp.float32([0.1, 0.2, 0.3, 0.4])), scores.softcap(20.0))

        def attend(q, k, v, tokens, score, parallel):
            return striate.attention(q, k, v, mask=RULE, score=score, q_tokens=tokens, parallel=parallel)

        def inside(q, k, v, score):
            mapped = jax.shard_map(
                lambda *x: attend(*x, parallel),
                mesh=parallel.mesh,
                in_specs=(spec, spec, spec, spec, P()),
                out_specs=spec,
                check_vma=check_vma,
            )
            return mapped(q, k, v, problem.q_tokens, score)

        def outside(q, k, v, score):
            return attend(q, k, v, problem.q_tokens, score, None)

        arrays = problem.q, problem.k, problem.v, score
        (got, pull), (expected, pull_alone) = (jax.vjp(jax.jit(f), *arrays) for f in (inside, outside))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        gradients = (jax.tree.leaves(f(problem.d_out)) for f in (pull, pull_alone))
        for x, y in zip(*gradients, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def travelled(jaxpr, collective: str) -> dict[str, int]:
    """Bytes that each device hands to a collective, by dtype."""
    sent: dict[str, int] = {}
    for equation, times in equations(jaxpr, collective):
        for array in (x.aval for x in equation.invars):
            if times:
                sent[array.dtype.name] = sent.get(array.dtype.name, 0) + times * array.size * array.dtype.itemsize
    return sent


def waiting_hops(jaxpr) -> list:
    """Hops inside a loop that take anything but what the loop carried in."""
    loops = [e.params["jaxpr"].jaxpr for inner, _ in jaxprs(jaxpr) for e in inner.eqns if e.primitive.name == "scan"]
    hops = [(loop, e) for loop in loops for e in loop.eqns if e.primitive.name == "ppermute"]
    assert hops, "no loop holds a hop"
    return [e for loop, e in hops if not set(e.invars) <= set(loop.invars)]


def test_remat_by_the_names_sends_nothing_again():
    ring = Ring(mesh(sequence=4))
    q, policy = jnp.ones((1, 64, 2, 8)), jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def loss(q):
        return striate.attention(jnp.sin(q), q, q, mask=masks.causal(), parallel=ring).sum()

    def sent(function):
        return travelled(jax.make_jaxpr(jax.grad(function))(q).jaxpr, "ppermute")

    assert sent(jax.checkpoint(loss, policy=policy)) == sent(loss)
    assert sent(jax.checkpoint(loss))["float32"] > sent(loss)["float32"]


class TestBadInput:
    RING = Ring(mesh(data=2, sequence=2, tensor=2))

    @pytest.mark.parametrize(
        ("shapes", "answer"),
        [
            (((2, 15, 4, 8), (2, 16, 2, 8)), "length 15 does not divide over the 2 shards of mesh axes sequence: make"),
            (((2, 16, 4, 8), (2, 15, 2, 8)), "key length 15 does not divide over the 2 shards of mesh axes sequence"),
            (((1, 16, 4, 8), (1, 16, 2, 8)), "batch 1 does not divide over the 2 shards of mesh axes data"),
            (((2, 16, 3, 8), (2, 16, 3, 8)), "query heads 3 does not divide over the 2 shards of mesh axes tensor"),
            (((2, 16, 4, 8), (2, 16, 1, 8)), "key/value heads 1 does not divide .* make it a multiple of 2 or change"),
        ],
    )
    def test_what_does_not_divide_is_answered(self, shapes, answer):
        q, k = (jnp.zeros(shape) for shape in shapes)
        tokens = {"q_tokens": Tokens.arange(*q.shape[:2]), "k_tokens": Tokens.arange(*k.shape[:2])}
        for parallel in (self.RING, AllGather(self.RING.mesh)):
            with pytest.raises(UserError, match=answer):
                striate.attention(q, k, k, parallel=parallel, **tokens)

    def test_rounds_that_do_not_divide_the_heads_are_answered(self):
        q = jnp.zeros((2, 16, 6, 8))
        for rounds in (0, 4):
            with pytest.raises(UserError, match=f"{rounds} times with a share .* and 6 key/value heads do not divide"):
                striate.attention(q, q, q, parallel=Ring(mesh(sequence=4), rounds=rounds))

    def test_heads_that_cannot_be_dealt_are_answered(self):
        q = jnp.zeros((2, 16, 6, 8))
        with pytest.raises(
            UserError, match="the 4 devices of mesh axis 'sequence', and 6 heads do not divide: use Ring"
        ):
            striate.attention(q, q, q, parallel=Ulysses(mesh(sequence=4)))

    def test_a_mesh_without_the_axis_is_answered(self):
        with pytest.raises(UserError, match=r"the mesh axis 'seq', but the mesh has \{'data': 2, 'sequence': 2"):
            Ring(self.RING.mesh, axis="seq")

    def test_a_mesh_of_explicit_axes_is_answered(self):
        with pytest.raises(UserError, match=r"needs a mesh of Auto axes, .* axis_types=\(jax.sharding.AxisType.Auto"):
            AllGather(mesh(AxisType.Explicit, sequence=2))

    def test_the_reference_does_not_spread(self):
        q = jnp.zeros((2, 16, 2, 8))
        with pytest.raises(NotImplementedError, match="'reference' is for one device and does not run under Ring"):
            striate.attention(q, q, q, implementation="reference", parallel=self.RING)
