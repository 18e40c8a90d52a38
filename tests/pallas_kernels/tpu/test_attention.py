"""The TPU kernels, step by step on this machine: the suite of every attention, shapes of their own, races."""

import dataclasses

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where it says what races were found
from jax.experimental.pallas import tpu as pltpu

import striate
from oracles import scores as score_oracle
from striate import Tokens, masks, scores
from striate.lib.attention import Local
from striate.lib.layouts import Striped
from striate.lib.parallel import AllGather, Ring
from striate.lib.tiles import Task
from striate.pallas_kernels.tpu import gathered
from striate.pallas_kernels.tpu.attention import Interpreted
from suites import attention as suite
from suites.attention import RULE, System, check_bound, check_score, mesh, random_problem, visible

INTERPRETED = "pallas_tpu_interpret"
KERNEL = System(INTERPRETED)
RING = System(INTERPRETED, Ring(mesh(sequence=4)), Striped(4, 4))
CASES = {case.name: case for case in score_oracle.all_cases(np.random.default_rng(0), 2)}
GATHERED = System(INTERPRETED, AllGather(mesh(sequence=2)), Striped(2, 8))


@pytest.mark.long
@pytest.mark.parametrize("system", [KERNEL, RING], ids=str)
class TestKernel(suite.AttentionSuite):
    pass


@pytest.mark.parametrize("case", score_oracle.all_cases(np.random.default_rng(0), 4), ids=lambda case: case.name)
def test_scores(case):
    rng = np.random.default_rng(1)
    tokens = suite.formulas.random_tokens(rng, batch=2, length=60)
    problem = random_problem(rng, tokens, heads=4, kv_heads=2)
    check_score(KERNEL, RULE, case, problem, visible(RULE, problem))


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 96), (96, 80), (128, 128), (192, 128), (256, 64)])
def test_widths(width, value_width):
    # One tile of whole lanes, cut into parts, and a second one with padding.
    rng = np.random.default_rng(width)
    tokens = Tokens.arange(1, 200)
    problem = random_problem(rng, tokens, heads=2, kv_heads=1, width=width, value_width=value_width)
    check_bound(KERNEL, masks.causal(), problem, tile=128)


@pytest.mark.long
@pytest.mark.parametrize(
    "text", ["causal()", "window(300) & same('document') | sink(9)", "~causal() & key('position', 0, 700)"]
)
def test_blocks_that_the_mask_cuts_are_done_by_quarters(text):
    rng = np.random.default_rng(3)
    position = np.arange(768, dtype=np.int32)[None]
    problem = random_problem(rng, Tokens(position, document=position // 400), heads=2, kv_heads=1)
    check_score(KERNEL, masks.parse(text), CASES["composed"], problem, visible(masks.parse(text), problem), tile=256)
    check_bound(KERNEL, masks.parse(text), problem, tile=256)


def test_queries_and_keys_of_different_lengths():
    rng = np.random.default_rng(5)
    q_tokens, k_tokens = (suite.formulas.random_tokens(rng, batch=2, length=n) for n in (48, 128))
    problem = random_problem(rng, q_tokens, k_tokens, heads=4, kv_heads=2)
    check_bound(GATHERED, masks.everything(), problem)
    check_bound(KERNEL, masks.same("document"), problem)


@pytest.mark.parametrize("longest", [1, 40, 1000])
def test_rows_are_taken_in_segments_that_make_no_difference(monkeypatch, longest):
    monkeypatch.setattr("striate.pallas_kernels.tpu.steps.LONGEST", longest)
    problem = random_problem(np.random.default_rng(6), Tokens.arange(2, 100), heads=2, kv_heads=1)
    # Another mask for each, so that nothing compiled before is found again.
    check_bound(KERNEL, masks.window(30 + longest), problem)


class Late(Interpreted):
    """Copies are done as late as the program allows; buffers begin as NaN; what is read lies within its array."""

    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )

    @classmethod
    def choose_tile(cls, mask, q, k):
        return 16, 16


class Early(Late):
    """Copies are done as soon as they are begun."""

    interpret = dataclasses.replace(Late.interpret, dma_execution_mode="eager")


class TestCopies:
    """The copies that gather dq run beside the work: early or late, they change nothing."""

    # A window goes on with the same block of queries, or comes back to it two steps later.
    MASKS = (masks.window(20), masks.causal(), masks.key("position", 32, 40))

    def gradients(self, tiled, mask, kv_heads: int):
        rng = np.random.default_rng(0)
        q, d_out = (rng.normal(size=(1, 64, 2, 8)).astype(np.float32) for _ in range(2))
        k, v = (rng.normal(size=(1, 64, kv_heads, 8)).astype(np.float32) for _ in range(2))
        tokens = Tokens.arange(1, 64)

        def run(q, k, v, d_out):
            task, arrays = Task(mask, 1.0, tiled), (scores.plain(), q, k, v, tokens, tokens)
            out, lse = Local().forward(task, *arrays)
            return Local().backward(task, *arrays, d_out, lse, (d_out * out).sum(-1))[1:]

        pltpu.reset_tpu_interpret_mode_state()
        return jax.tree.map(np.asarray, jax.jit(run)(q, k, v, d_out))

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_they_may_be_early_or_late(self, mask, kv_heads):
        want = self.gradients(Interpreted, mask, kv_heads)
        for tiled in (Early, Late):
            for got, x in zip(self.gradients(tiled, mask, kv_heads), want, strict=True):
                np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)
            assert not interpret_pallas_call.races.races_found

    def test_a_block_that_is_read_before_it_was_written_back_is_noticed(self, monkeypatch):
        want = self.gradients(Interpreted, self.MASKS[0], 2)
        monkeypatch.setattr(gathered.Gathered, "_settle", lambda self, slot, place: None)
        assert abs(self.gradients(Late, self.MASKS[0], 2)[0] - want[0]).max() > 0.1


def test_vmap_maps_over_both_passes():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.normal(size=(3, 1, 40, 2, 8)).astype(np.float32) for _ in range(4))

    def both(implementation, mapped):
        def run(q, k, v, d_out):
            how = {"mask": masks.causal(), "implementation": implementation}
            out, pull = jax.vjp(lambda *x: striate.attention(*x, **how), q, k, v)
            return out, *pull(d_out)

        with suite.small_tiles(implementation, 16):
            return [np.asarray(x) for x in jax.jit(mapped(run))(q, k, v, d_out)]

    def one_by_one(run):
        return lambda *arrays: jax.tree.map(
            lambda *x: jax.numpy.stack(x), *(run(*x) for x in zip(*arrays, strict=True))
        )

    for got, want in zip(both(INTERPRETED, jax.vmap), both("xla", one_by_one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
