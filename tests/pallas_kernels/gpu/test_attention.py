"""The GPU kernels, step by step on this machine: the suite of every attention, widths of their own, carries."""

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import striate
from oracles import scores as score_oracle
from striate import Tokens, masks, scores
from striate.lib.attention import Local, choose
from striate.lib.blockwise import Blockwise
from striate.lib.tiles import Partial, Task
from striate.pallas_kernels.gpu import attention as gpu
from striate.pallas_kernels.gpu import backward, forward
from striate.pallas_kernels.gpu.attention import Interpreted
from suites import attention as suite
from suites.attention import RULE, System, check_bound, check_score, random_problem, visible

pytestmark = pytest.mark.skipif(jax.version.__version_info__ < (0, 12), reason="the interpreter came with jax 0.12")

INTERPRETED = "pallas_gpu_interpret"
KERNEL = System(INTERPRETED)
CASES = score_oracle.all_cases(np.random.default_rng(0), 2)


# A thread block takes the interpreter a tenth of a second: minutes for all of the suite.
@pytest.mark.slow
@pytest.mark.parametrize("system", [KERNEL], ids=str)
class TestKernel(suite.AttentionSuite):
    def problem(self, system, seed=0, **shape):
        return super().problem(system, seed, **({"heads": 2, "kv_heads": 1} | shape))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_and_gradients_obey_the_bound(dtype):
    problem = TestKernel().problem(KERNEL, dtype=dtype)
    check_bound(KERNEL, RULE, jax.tree.map(lambda x: x[:2], problem))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores(case):
    rng = np.random.default_rng(1)
    tokens = suite.formulas.random_tokens(rng, batch=1, length=60)
    problem = random_problem(rng, tokens, heads=2, kv_heads=1)
    check_score(KERNEL, RULE, case, problem, visible(RULE, problem))


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 96), (192, 128), (128, 256)])
def test_widths(width, value_width):
    rng = np.random.default_rng(width)
    problem = random_problem(
        rng, Tokens.arange(1, 100), heads=2, kv_heads=1, width=width, value_width=value_width, dtype="bfloat16"
    )
    check_bound(KERNEL, masks.causal(), problem, tile=64)


def test_where_one_block_of_keys_has_place_nobody_waits_for_ever():
    rng, widths = np.random.default_rng(2), {"width": 256, "value_width": 192}
    problem = random_problem(rng, Tokens.arange(1, 256), heads=1, kv_heads=1, dtype="bfloat16", **widths)
    scratch, _ = forward.Scratch.of(*(jnp.zeros((1, 1, 128, x), jnp.bfloat16) for x in widths.values()), (128, 128))
    assert scratch.k.shape[0] == 1
    check_bound(KERNEL, masks.causal(), problem, tile=128)


@pytest.mark.parametrize("mask", [masks.everything(), masks.nothing()], ids=str)
def test_masks_that_read_nothing(mask):
    """The first block of a row is masked by any of them, also where none is live."""
    rng = np.random.default_rng(7)
    check_bound(KERNEL, mask, random_problem(rng, Tokens.arange(1, 100), heads=2, kv_heads=1))


def test_queries_and_keys_of_different_lengths():
    rng = np.random.default_rng(5)
    q_tokens, k_tokens = (suite.formulas.random_tokens(rng, batch=2, length=n) for n in (40, 100))
    check_bound(KERNEL, masks.same("document"), random_problem(rng, q_tokens, k_tokens, heads=2, kv_heads=1))


@pytest.mark.parametrize(
    ("queries", "multiprocessors", "name"),
    [(1, 1, "plain"), (1, 8, "plain"), (3, 8, "alibi"), (3, 8, "sigmoid"), (1, 1, "t5 bidirectional=True")],
)
def test_few_queries_of_a_group_share_a_row(monkeypatch, queries, multiprocessors, name):
    """And keys are dealt to several rows, where these are fewer than the multiprocessors."""
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", multiprocessors)
    rng = np.random.default_rng(queries)
    # The first row of the batch sees none of the later keys: whole parts are empty.
    q_tokens = Tokens(position=np.arange(queries, dtype=np.int32) + np.int32([[50], [370]]))
    problem = random_problem(rng, q_tokens, Tokens.arange(2, 390), heads=4, kv_heads=1)
    case = next(case for case in score_oracle.all_cases(np.random.default_rng(0), 4) if case.name == name)
    check_score(KERNEL, masks.causal(), case, problem, visible(masks.causal(), problem))


def test_mapped_by_vmap():
    rng = np.random.default_rng(9)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 32, 2, 8)), jnp.float32) for _ in range(3))

    def loss(implementation, *arrays):
        return (striate.attention(*arrays, mask=masks.causal(), implementation=implementation) ** 2).sum()

    got, wanted = (
        jax.vmap(jax.grad(functools.partial(loss, name), (0, 1, 2)))(q, k, v) for name in (INTERPRETED, "xla")
    )
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_scale_that_is_not_positive():
    rng = np.random.default_rng(6)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 32, 1, 8)), jnp.float32) for _ in range(3))
    for scale in (-0.5, 0.0):
        got, wanted = (
            striate.attention(q, k, v, mask=masks.causal(), scale=scale, implementation=name)
            for name in (INTERPRETED, "reference")
        )
        np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "score", [scores.plain(), scores.softcap(2.0), scores.sigmoid(-1.0)], ids=lambda x: type(x).__name__
)
def test_keys_may_come_one_part_after_the_other(score):
    """What a ring does, on one device: the interpreter knows no others."""
    rng = np.random.default_rng(7)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(1, heads, *shape)), jnp.float32)
        for heads, *shape in ((1, 2, 64, 8), (1, 64, 8), (1, 64, 8), (1, 2, 64, 8))
    )
    row = jnp.asarray(rng.normal(size=(2, 1, 1, 2, 64)), jnp.float32)
    tokens, parts = Tokens.arange(1, 64), [slice(0, 32), slice(32, 64)]

    def in_turn(form):
        kernel = form(masks.causal(), 8**-0.5, (32, 32))
        partial, sums, of_keys = Partial.empty(q, 8), kernel.empty_sums(score, q), []
        for part in parts[::-1]:
            sides = kernel.sides(score, tokens.as_queries(), jax.tree.map(lambda x, part=part: x[:, part], tokens))
            keys = k[:, :, part], v[:, :, part]
            partial = kernel.forward(score, q, *keys, *sides, partial)
            sums, *gradients = kernel.backward(score, q, *keys, d_out, *row, *sides, sums)
            of_keys.append(gradients)
        out, lse = partial.finish(kernel.unit, score.normalised)
        return out, lse, kernel.finish_dq(sums[0], q), sums[1], of_keys

    for x, y in zip(*(jax.tree.leaves(in_turn(form)) for form in (Interpreted, Blockwise)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("careless", [False, True])
@pytest.mark.parametrize("form", [forward, backward], ids=["forward", "backward"])
def test_a_block_is_copied_when_its_place_is_free(monkeypatch, form, careless):
    """Where the warpgroup that copies waits for nobody, what it overwrites is found; else nothing is."""
    copy_blocks = form._copy_blocks

    def without_waiting(*arguments):
        with mock.patch.object(plgpu, "barrier_wait", lambda barrier: None):
            copy_blocks(*arguments)

    if careless:
        monkeypatch.setattr(form, "_copy_blocks", without_waiting)
    rng, tokens, task = np.random.default_rng(8), Tokens.arange(1, 192), Task(masks.causal(), 0.1, watched())
    q, k, v = (jnp.asarray(rng.normal(size=(1, 192, 1, 128)), jnp.bfloat16) for _ in range(3))
    arrays = task, scores.plain(), q, k, v, tokens.as_queries(), tokens
    row = jnp.zeros((1, 192, 1))
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RACE") if careless else contextlib.nullcontext():
            results = Local().forward(*arrays) if form is forward else Local().backward(*arrays, q, row, row)
            assert not any(jnp.isnan(x).any() for x in jax.tree.leaves(results))
    finally:
        # The interpreter keeps what a kernel that failed left behind.
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        interpret_pallas_call.reset_gpu_interpret_mode_state()


def watched() -> type[Interpreted]:
    """The interpreter that looks for races; memory begins as NaN."""

    class Watched(Interpreted):
        interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")

        @classmethod
        def choose_tile(cls, mask, q, k):
            return 32, 32

    return Watched


@pytest.mark.parametrize(
    ("capability", "dtype", "allowed", "answer"),
    [
        (None, jnp.bfloat16, "", "is for GPUs, and this program is not"),
        ("8.0", jnp.bfloat16, "pallas_gpu", "compute capability 9.0 .* and this one has 8.0"),
        ("9.0", jnp.float32, "pallas_gpu", "takes bfloat16 and float16, and not float32"),
        ("9.0", jnp.bfloat16, "", "has run on no GPU yet, and asks to be trusted by STRIATE_EXPERIMENTAL=pallas_gpu"),
    ],
)
def test_what_has_run_on_no_gpu_is_refused(monkeypatch, capability, dtype, allowed, answer):
    device = SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setenv("STRIATE_EXPERIMENTAL", allowed)
    with pytest.raises(NotImplementedError, match=answer):
        choose("pallas_gpu", None, jnp.dtype(dtype))
    if allowed:
        device.compute_capability = "9.0"
        assert choose("pallas_gpu", None, jnp.dtype(jnp.float16)) == "pallas_gpu"
