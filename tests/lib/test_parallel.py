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
from striate import Tokens, UserError, masks
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.parallel import AllGather, Ring
from suites import attention as suite
from suites.attention import RULE, System, check_bound, random_problem, solve
from suites.jaxprs import equations, jaxprs

STRATEGIES = (Ring, AllGather)


def mesh(kind=AxisType.Auto, **axes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes), devices=devices)


def systems(strategy, shards: int) -> list[System]:
    layouts = Contiguous(shards), Striped(shards, 1), Striped(shards, 13), ZigZag(shards)
    return [System(parallel=strategy(mesh(sequence=shards)), layout=layout) for layout in layouts]


SYSTEMS = [system for how in itertools.product(STRATEGIES, (1, 2, 4, 8)) for system in systems(*how)]


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
class TestEveryStrategyAndLayout(suite.AttentionSuite):
    pass


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_system_of_each_strategy(strategy):
    system = System(parallel=strategy(mesh(sequence=4)), layout=Striped(4, 13))
    check_bound(system, RULE, suite.AttentionSuite().problem(system, heads=2, kv_heads=2))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "heads", "kv_heads"), [("float32", 8, 1), ("float32", 2, 2), ("bfloat16", 4, 2)])
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_every_ratio_of_heads(system, dtype, heads, kv_heads):
    check_bound(system, RULE, suite.AttentionSuite().problem(system, dtype=dtype, heads=heads, kv_heads=kv_heads))


def check_random_masks(seed: int, count: int) -> None:
    """Random masks, strategies, shards and layouts; twice as many keys as queries."""
    rng = np.random.default_rng(seed)
    while count:
        formula, q_tokens, k_tokens = random_formula(rng), random_tokens(rng, 4, 208), random_tokens(rng, 4, 416)
        shown = np.broadcast_to(formula.visible(as_columns(q_tokens), as_rows(k_tokens)), (4, 208, 416))
        if 0 < shown.mean() < 1:
            # Mostly rings: what AllGather computes is what one device computes.
            options = systems(rng.choice(STRATEGIES, p=[0.75, 0.25]), int(rng.choice([2, 4, 8])))
            system = options[rng.integers(len(options))]
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
        for x, y in zip(spread, solve(System("xla"), RULE, problem), strict=True):
            np.testing.assert_array_equal(suite.bits(x), suite.bits(y))


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
        parallel, mask = strategy(mesh(sequence=self.SHARDS)), masks.causal() & masks.same("document")
        arrays = self.arrays()
        out = jnp.zeros((*arrays[0].shape[:3], self.VALUE_WIDTH), jnp.bfloat16)
        row = jnp.zeros(arrays[0].shape[:3], jnp.float32)
        forward = jax.make_jaxpr(lambda *x: parallel.forward(mask, 1.0, *x))(*arrays)
        backward = jax.make_jaxpr(lambda *x: parallel.backward(mask, 1.0, *x))(*arrays, out, row, row)
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
        single = Ring(mesh(sequence=1))
        jaxpr = jax.make_jaxpr(lambda *x: single.forward(masks.causal(), 1.0, *x))(*self.arrays()).jaxpr
        assert not travelled(jaxpr, "ppermute")


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
