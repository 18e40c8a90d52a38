"""The backward pass of one kernel, whose dQ many thread blocks add to: in blocks of full size, step by step."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import striate
from oracles import scores as score_oracle
from striate import Tokens, masks, scores
from striate.lib.attention import Local
from striate.lib.tiles import Task
from striate.pallas_kernels.gpu import backward_adding
from striate.pallas_kernels.gpu.attention import Interpreted
from striate.pallas_kernels.gpu.parts import TILE
from suites import attention as suite
from suites.attention import System, check_bound, check_score, random_problem, visible

pytestmark = pytest.mark.skipif(jax.version.__version_info__ < (0, 12), reason="the interpreter came with jax 0.12")

KERNEL = System("pallas_gpu_interpret")
RULE = masks.causal() & (masks.window(150) | masks.sink(3)) & masks.same("document")


@pytest.fixture
def called(monkeypatch):
    """How often the kernel of this file was asked for."""
    calls, gradients = [], backward_adding.gradients
    monkeypatch.setattr(backward_adding, "gradients", lambda *given: calls.append(1) or gradients(*given))
    jax.clear_caches()
    return calls


@pytest.mark.parametrize(
    ("dtype", "width", "value_width"),
    [("float32", 64, 64), ("bfloat16", 64, 64), ("bfloat16", 128, 128), ("bfloat16", 192, 64)],
)
def test_results_and_gradients_obey_the_bound(called, dtype, width, value_width):
    rng = np.random.default_rng(width)
    tokens = suite.formulas.random_tokens(rng, batch=1, length=256)
    shape = {"heads": 2, "kv_heads": 1, "width": width, "value_width": value_width, "dtype": dtype}
    check_bound(KERNEL, RULE, random_problem(rng, tokens, **shape), tile=TILE)
    assert called


@pytest.mark.parametrize("name", ["softcap", "sigmoid"])
def test_scores_get_their_gradients(called, name):
    rng = np.random.default_rng(3)
    case = next(case for case in score_oracle.all_cases(np.random.default_rng(0), 2) if case.name == name)
    problem = random_problem(rng, Tokens.arange(1, 256), heads=2, kv_heads=1)
    check_score(KERNEL, RULE, case, problem, visible(RULE, problem), tile=TILE)
    assert called


def test_mapped_by_vmap(called):
    rng = np.random.default_rng(9)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 128, 1, 8)), jnp.float32) for _ in range(3))

    def loss(implementation):
        def of(*arrays):
            return (striate.attention(*arrays, mask=masks.causal(), implementation=implementation) ** 2).sum()

        return jax.vmap(jax.grad(of, (0, 1, 2)))(q, k, v)

    for x, y in zip(loss("pallas_gpu_interpret"), loss("xla"), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert called


def test_a_row_of_keys_that_nobody_sees_gets_nothing(called):
    """No block of queries has work, and what memory begins as must not come through."""
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, 1, 64)), jnp.bfloat16) for _ in range(3))
    how = {"mask": masks.causal() & masks.key("position", None, 127), "implementation": "pallas_gpu_interpret"}
    dk = jax.grad(lambda k: striate.attention(q, k, v, **how).astype(jnp.float32).sum())(k)
    assert called and not dk[:, 128:].any() and dk[:, :128].any()


def watched() -> type[Interpreted]:
    """The interpreter that looks for races; memory begins as NaN."""

    class Watched(Interpreted):
        interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")

    return Watched


@pytest.mark.parametrize("careless", [False, True])
def test_what_the_other_warpgroup_reads_is_not_written_to(monkeypatch, called, careless):
    """One row of keys: what several add to dQ is no race on a GPU, and the interpreter would call it one."""
    if careless:
        monkeypatch.setattr(backward_adding, "_until_both_are_done", lambda scratch: None)
    rng, tokens, task = np.random.default_rng(8), Tokens.arange(1, 128), Task(masks.everything(), 0.1, watched())
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, 1, 64)), jnp.bfloat16) for _ in range(3))
    row = jnp.zeros((1, 128, 1))
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RACE") if careless else contextlib.nullcontext():
            results = Local().backward(task, scores.plain(), q, k, v, tokens.as_queries(), tokens, q, row, row)
            assert not any(jnp.isnan(x).any() for x in jax.tree.leaves(results))
    finally:
        # The interpreter keeps what a kernel that failed left behind.
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert called
