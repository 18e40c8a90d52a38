"""A pass around a ring as one kernel: the same values and gradients, and no race, on TPUs that are emulated."""

import dataclasses

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where it says what races were found
from jax.experimental.pallas import tpu as pltpu

import striate
from oracles import formulas
from oracles import scores as score_oracle
from striate import Tokens, masks, scores
from striate.lib.attention import Local
from striate.lib.blockwise import Blockwise
from striate.lib.layouts import Striped, ZigZag
from striate.lib.parallel import Ring, RingUlysses
from striate.lib.tiles import Task
from striate.pallas_kernels.tpu import around, traffic
from striate.pallas_kernels.tpu.ring import FusedInterpreted
from striate.pallas_kernels.tpu.traffic import Route, Way
from suites.attention import RULE, System, check_bound, check_score, mesh, random_problem, visible

FUSED = "pallas_tpu_fused_interpret"


def problem_of(length: int, seed=0, **shape):
    rng = np.random.default_rng(seed)
    return random_problem(rng, formulas.random_tokens(rng, batch=2, length=length), width=8, **shape)


@pytest.mark.parametrize(
    ("shards", "layout"), [(2, Striped(2, 16)), pytest.param(4, ZigZag(4), marks=pytest.mark.long)], ids=str
)
def test_results_and_gradients_obey_the_bound(shards, layout):
    system = System(FUSED, Ring(mesh(sequence=shards)), layout)
    check_bound(system, RULE, problem_of(32 * shards, heads=2, kv_heads=1), tile=16)


@pytest.mark.long
def test_padded_blocks_and_bfloat16():
    system = System(FUSED, Ring(mesh(sequence=2)), Striped(2, 4))
    check_bound(system, RULE, problem_of(72, heads=2, kv_heads=2, dtype="bfloat16"), tile=16)


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param("alibi", marks=pytest.mark.slow), "composed"])
def test_scores(name):
    system, problem = System(FUSED, Ring(mesh(sequence=2)), Striped(2, 8)), problem_of(64, heads=2, kv_heads=1)
    case = next(x for x in score_oracle.all_cases(np.random.default_rng(0), 2) if x.name == name)
    check_score(system, RULE, case, problem, visible(RULE, problem), tile=16)


@pytest.mark.long
def test_other_axes_of_the_mesh_stay_apart():
    system = System(FUSED, RingUlysses(mesh(data=2, ring=2, sequence=2)), Striped(4, 8))
    check_bound(system, RULE, problem_of(64, heads=2, kv_heads=2), tile=16)


class TestRoute:
    def test_both_directions_carry_half(self):
        route = Route.of("sequence", 8, farthest=7, keys=96, tile=16)
        assert route.hops == 7 and route.ways == (Way(1, 0, 48), Way(-1, 48, 48))

    def test_a_single_block_and_near_offsets_go_one_way(self):
        assert Route.of("sequence", 8, farthest=7, keys=16, tile=16).ways == (Way(1, 0, 16),)
        near = Route.of("sequence", 8, farthest=2, keys=64, tile=16)
        assert near.hops == 2 and near.ways == (Way(1, 0, 64),)


class Watched(FusedInterpreted):
    """Races are looked for; buffers begin as NaN; what is read lies within its array."""

    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")

    @classmethod
    def choose_tile(cls, mask, q, k):
        return 16, 16


class Eager(Watched):
    interpret = dataclasses.replace(Watched.interpret, dma_execution_mode="eager")


class TwoCores(Watched):
    interpret = dataclasses.replace(Watched.interpret, num_cores_or_threads=2)


class TestRaces:
    MASKS = (masks.causal(), masks.window(20))

    def both_passes(self, tiled, shards: int, mask=MASKS[0], heads=1, parallel=None) -> tuple[np.ndarray, ...]:
        """(out, dq, dk, dv)."""
        rng, length = np.random.default_rng(0), 32 * shards
        q, k, v, d_out = (rng.normal(size=(1, length, heads, 8)).astype(np.float32) for _ in range(4))
        tokens, task = Tokens.arange(1, length), Task(mask, 1.0, tiled)
        parallel = parallel or Ring(mesh(sequence=shards)).for_tokens(mask, tokens, tokens)

        def run(q, k, v, d_out):
            arrays = scores.plain(), q, k, v, tokens, tokens
            out, lse = parallel.forward(task, *arrays)
            return out, *parallel.backward(task, *arrays, d_out, lse, (d_out * out).sum(-1))[1:]

        pltpu.reset_tpu_interpret_mode_state()
        return jax.tree.map(np.asarray, jax.jit(run)(q, k, v, d_out))

    def check(self, tiled, shards: int, mask=MASKS[0]):
        heads = tiled.interpret.num_cores_per_device
        found = self.both_passes(tiled, shards, mask, heads)
        assert not interpret_pallas_call.races.races_found
        for got, want in zip(found, self.both_passes(Blockwise, shards, mask, heads, Local()), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    @pytest.mark.parametrize("tiled", [Watched, *(pytest.param(x, marks=pytest.mark.slow) for x in (Eager, TwoCores))])
    def test_none_on_four_devices(self, tiled, mask):
        self.check(tiled, 4, mask)

    @pytest.mark.slow
    def test_none_on_eight_devices(self):
        self.check(Watched, 8)

    @pytest.mark.parametrize("of", [traffic.Keys, pytest.param(traffic.Followers, marks=pytest.mark.long)])
    def test_without_leave_to_send_there_are(self, monkeypatch, of):
        monkeypatch.setattr(of, "await_leave", lambda self, *_: None)
        monkeypatch.setattr(of, "give_leave", lambda self, *_: None)

        class Warned(Watched):
            interpret = dataclasses.replace(Watched.interpret, on_race="warn")

        self.both_passes(Warned, 4)
        assert interpret_pallas_call.races.races_found


def test_lists_that_do_not_fit_say_so(monkeypatch):
    monkeypatch.setattr(around, "LONGEST", 7)
    system = System(FUSED, Ring(mesh(sequence=2)))
    with pytest.raises(NotImplementedError, match="16 here, and at most 7 fit"):
        check_bound(system, masks.window(29), problem_of(64), tile=16)


def test_it_is_for_rings():
    q = np.zeros((1, 16, 1, 8), np.float32)
    with pytest.raises(NotImplementedError, match="parallel=Ring"):
        striate.attention(q, q, q, implementation=FUSED)
    with pytest.raises(NotImplementedError, match="pallas_tpu_fused_interpret"):
        striate.attention(q, q, q, implementation="pallas_tpu_fused", parallel=Ring(mesh(sequence=2)))
