"""The GPU kernels as they are compiled for an H200, run on a CPU by tests/emulator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import striate
from emulator import COMPILER, Found, Kernel, emulated
from oracles import scores as score_oracle
from striate import Tokens, masks
from striate.lib.layouts import Striped
from striate.lib.parallel import Ring
from striate.pallas_kernels.gpu import attention as gpu
from suites import attention as suite
from suites.attention import RULE, System, check_bound, check_score, random_problem, visible

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler in PATH")]

KERNEL = System("pallas_gpu")
PACKED = masks.causal() & masks.same("document")
CASES = {case.name: case for case in score_oracle.all_cases(np.random.default_rng(0), 4)}
WIDTHS = [("bfloat16", 64, 64), ("bfloat16", 128, 128), ("bfloat16", 192, 128)]
OTHERS = [("float16", 128, 128), ("bfloat16", 80, 96), ("bfloat16", 256, 256), ("float16", 64, 128)]
SHAPES = WIDTHS + [pytest.param(*shape, marks=pytest.mark.slow) for shape in OTHERS]
COMMON = "plain", "alibi", "sigmoid"
ALL_CASES = [pytest.param(name, marks=[] if name in COMMON else pytest.mark.slow) for name in CASES]
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def problem(length=300, seed=0, dtype="bfloat16", **shape):
    rng = np.random.default_rng(seed)
    tokens = suite.formulas.random_tokens(rng, batch=1, length=length)
    return random_problem(rng, tokens, dtype=dtype, **({"width": 64, "value_width": 64} | shape))


def both_passes(given: suite.Problem, mask=RULE):
    """(out, dq, dk, dv)"""
    how = {"mask": mask, "q_tokens": given.q_tokens, "k_tokens": given.k_tokens, "implementation": "pallas_gpu"}
    out, pull = jax.vjp(lambda q, k, v: striate.attention(q, k, v, **how), *given[:3])
    return out, *pull(given.d_out)


@pytest.mark.parametrize("system", [KERNEL], ids=str)
class TestKernel(suite.AttentionSuite):
    @pytest.fixture(autouse=True)
    def _emulated(self):
        with emulated():
            yield

    def problem(self, system, seed=0, **shape):
        return super().problem(system, seed, **({"dtype": "bfloat16", "heads": 2, "kv_heads": 1} | shape))

    @pytest.mark.parametrize(("dtype", "heads", "kv_heads"), [("float16", 4, 2), ("bfloat16", 8, 1)])
    def test_results_and_gradients_obey_the_bound(self, system, dtype, heads, kv_heads):
        super().test_results_and_gradients_obey_the_bound(system, dtype, heads, kv_heads)

    def test_a_hidden_block_is_not_computed(self, system):
        """Its blocks have 128 tokens: documents of as many, and NaN in the first of four."""
        tokens = Tokens.arange(2, 512).replace(document=np.tile(np.int32(np.arange(512) // 128), (2, 1)))
        given = random_problem(np.random.default_rng(3), tokens, dtype="bfloat16", heads=2, kv_heads=1)
        k, v = given.k.copy(), given.v.copy()
        k[:, :128], v[:, :128] = np.nan, np.nan
        before, after = (suite.solve(system, PACKED, x) for x in (given, given._replace(k=k, v=v)))
        for name, x in suite.arrays(before).items():
            y = suite.arrays(after)[name]
            np.testing.assert_array_equal(suite.bits(x)[:, 128:], suite.bits(y)[:, 128:], err_msg=name)
        assert np.isnan(after.out[:, :128]).any()


@pytest.mark.parametrize(("dtype", "width", "value_width"), SHAPES)
def test_widths(dtype, width, value_width):
    given = problem(dtype=dtype, seed=width, width=width, value_width=value_width)
    with emulated(seed=width):
        check_bound(KERNEL, RULE, given)


@pytest.mark.parametrize("mask", [masks.everything(), masks.nothing()], ids=str)
def test_masks_that_read_nothing(mask):
    given = problem(200, heads=2, kv_heads=1)
    with emulated():
        check_bound(KERNEL, mask, given)


@pytest.mark.parametrize("name", ALL_CASES)
def test_scores(name):
    given = problem(200, seed=1, heads=4, kv_heads=2)
    with emulated():
        check_score(KERNEL, RULE, CASES[name], given, visible(RULE, given))


@pytest.mark.parametrize(
    ("queries", "multiprocessors", "name"), [(1, 132, "plain"), (3, 8, "alibi"), (1, 1, "sigmoid")]
)
def test_decoding(monkeypatch, queries, multiprocessors, name):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", multiprocessors)
    rng = np.random.default_rng(queries)
    q_tokens = Tokens(position=np.arange(queries, dtype=np.int32) + np.int32([[50], [370]]))
    shape = {"heads": 4, "kv_heads": 1, "width": 128, "value_width": 128, "dtype": "bfloat16"}
    given = random_problem(rng, q_tokens, Tokens.arange(2, 390), **shape)
    with emulated():
        check_score(KERNEL, masks.causal(), CASES[name], given, visible(masks.causal(), given))


def test_a_ring():
    """Carries in and out, on four devices."""
    mesh = suite.mesh(sequence=4)
    given = problem(512, heads=2, kv_heads=1)
    with emulated():
        check_bound(System("pallas_gpu", Ring(mesh, "sequence"), Striped(4, 32)), RULE, given)


def in_many_orders(given: suite.Problem, orders: int):
    """(names of the kernels, results of both passes in each of so many orders of warps and copies)."""
    with emulated() as emulation:
        run, results = jax.jit(functools.partial(both_passes, given)), []
        for emulation.seed in range(orders):
            results.append([np.asarray(x) for x in run()])
        return [kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in emulation.kernels], results


def test_no_order_of_warps_and_copies_changes_a_bit(monkeypatch):
    """Of forward always, and of backward where that is asked for."""
    monkeypatch.setenv("XLA_FLAGS", DETERMINISTIC)
    names, results = in_many_orders(problem(400, heads=2, kv_heads=1), orders=30)
    assert names == ["attention_forward", "attention_dq", "attention_dk_dv"]
    for result in results[1:]:
        for x, y in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(suite.bits(x), suite.bits(y))


@pytest.mark.slow
def test_no_order_of_250_changes_a_bit_of_a_wide_forward_pass():
    names, results = in_many_orders(problem(600, heads=2, kv_heads=1, width=256, value_width=192), orders=250)
    assert names[0] == "attention_forward"
    for result in results[1:]:
        np.testing.assert_array_equal(suite.bits(results[0][0]), suite.bits(result[0]))


def test_sums_that_several_thread_blocks_add_to_differ_by_rounding_only():
    names, results = in_many_orders(problem(400, heads=2, kv_heads=1), orders=10)
    assert names == ["attention_forward", "attention_backward"]
    for result in results[1:]:
        for x, y in zip(results[0], result, strict=True):
            np.testing.assert_allclose(np.float32(x), np.float32(y), atol=2e-2)


# What is left out of a kernel, or stands for what, and what the emulator says of that.
WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, [^;]*"
MISTAKES = {
    "stores are not shown to other units": ("forward", r"fence\.proxy\.async", "", "stored without a fence"),
    "nobody waits for products": ("forward", r"wgmma\.wait_group", "", "sums of a product that may not be done"),
    "sums are set while they are added to": ("backward", r"wgmma\.fence", "", "changed since wgmma.fence"),
    "the last copies are left alone": ("forward", r"cp\.async\.bulk\.wait_group", "", "when its thread block is gone"),
    "what is copied is written over": (
        "backward",
        r"cp\.async\.bulk\.wait_group\.read",
        "",
        "copy may still be reading",
    ),
    "keys are not announced": ("forward", r"mbarrier\.arrive\.expect_tx", "", "waits, for ever"),
    "places are never free": ("backward", r"mbarrier\.arrive\.release", "", "waits, for ever"),
    "nobody waits for copies": ("backward", WAIT, "setp.eq.b32 P1, 0, 0", "copy may still be writing"),
    "a copy goes astray": (
        "forward",
        r"cp\.async\.bulk\.global\.shared::cta\.bulk_group \[(%rd\d+)\]",
        r"cp.async.bulk.global.shared::cta.bulk_group [\1+1073741824]",
        "are in no array",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    which, instruction, by, said = MISTAKES[mistake]

    def change(kernel: Kernel) -> Kernel:
        return kernel.replace(instruction, by) if which in kernel.name else kernel

    with pytest.raises(Exception, match=said) as error, emulated(change=change):
        jax.block_until_ready(both_passes(problem(400, width=128, value_width=128, heads=2, kv_heads=1)))
    assert Found.__name__ in str(error.value)


def test_a_kernel_that_runs_on_gpus_is_right_here_too():
    """One that is not ours, and that JAX's own tests run on H100s: nothing is found, and both passes are right."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(0.3 * rng.normal(size=(1, 256, n, 64)), jnp.float16) for n in (2, 1, 1, 2))
    blocks = {f"block_{side}{which}": 64 for side in ("q", "kv") for which in ("", "_dq", "_dkv")}
    tuned = attention_mgpu.TuningConfig(max_concurrent_steps=2, **blocks)

    def true(q, k, v):
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2))
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), jnp.repeat(v, 2, 2))

    with emulated() as emulation:
        out, pull = jax.vjp(functools.partial(attention_mgpu.attention, config=tuned), q, k, v)
        got = out, *pull(d_out)
    assert len(emulation.kernels) == 3
    wanted, pull = jax.vjp(true, *(x.astype(jnp.float32) for x in (q, k, v)))
    for x, y in zip(got, (wanted, *pull(d_out.astype(jnp.float32))), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3)
