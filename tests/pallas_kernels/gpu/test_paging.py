"""Keys in pages, read by the GPU kernel where they lie: step by step on this machine, and lowered for CUDA."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import striate
from emulator import COMPILER, emulated
from oracles import attention as oracle
from oracles import scores as score_oracle
from striate import Tokens, masks, scores
from striate.lib.decoding.paging import paged_attention
from striate.pallas_kernels.gpu import attention as gpu
from striate.pallas_kernels.gpu import forward
from suites import attention as suite

interpreted = pytest.mark.skipif(jax.version.__version_info__ < (0, 12), reason="the interpreter came with jax 0.12")
INTERPRETED = "pallas_gpu_interpret"
MASK = masks.causal() & masks.same("document")
FOUND = "RACE|no threads observed"  # what the interpreter says of a barrier that counts too few arrivals
LENGTHS, QUERIES = np.int32([[300], [130]]), 2  # tokens of two rows of a batch


def problem(page: int, dtype="float32", width=64, heads=4, seed=0):
    """(a Problem of whole pages, 4 heads for one of keys; pages of keys, of values; table): the documents are two.

    Pages lie anywhere, with NaN in those that nobody has; the table of the shorter row ends early.
    """
    rng, pages = np.random.default_rng(seed), -(-LENGTHS.max() // page)
    place = np.broadcast_to(np.arange(pages * page, dtype=np.int32), (2, pages * page))
    own = np.where(place < LENGTHS, place // 200, -1)
    at = LENGTHS - QUERIES + np.arange(QUERIES, dtype=np.int32)
    tokens = Tokens(at, document=at // 200), Tokens(place, document=own.astype(np.int32))
    shape = {"heads": heads, "kv_heads": heads // 4, "width": width, "value_width": width, "dtype": dtype}
    whole = suite.random_problem(rng, *tokens, **shape)
    table = rng.permutation(2 * pages + 3)[: 2 * pages].reshape(2, pages)
    table = np.where(np.arange(pages) * page < LENGTHS, table, -1).astype(np.int32)

    def in_pages(x):
        laid = np.full((2 * pages + 3, page, *x.shape[2:]), np.nan, x.dtype)
        laid[table[table >= 0]] = x.reshape(2, pages, page, *x.shape[2:])[table >= 0]
        return laid

    return whole, in_pages(whole.k), in_pages(whole.v), table


def paged(whole, k, v, table, mask=MASK, score=None, implementation=INTERPRETED):
    how = {"q_tokens": whole.q_tokens, "k_tokens": whole.k_tokens, "implementation": implementation}
    return paged_attention(whole.q, k, v, table, mask=mask, score=score, return_lse=True, **how)


@interpreted
@pytest.mark.parametrize(
    ("page", "dtype", "name"),
    [(16, "bfloat16", "plain"), (64, "float32", "softcap"), (128, "bfloat16", "sigmoid"), (256, "float32", "plain")],
)
def test_pages_are_the_keys_that_they_hold(monkeypatch, page, dtype, name):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 4)
    whole, *pages = problem(page, dtype)
    case = next(case for case in score_oracle.all_cases(np.random.default_rng(0), 4) if case.name == name)
    out, lse = paged(whole, *pages, score=case.score)
    how = {"q_tokens": whole.q_tokens, "k_tokens": whole.k_tokens, "mask": MASK, "score": case.score}
    together = striate.attention(*whole[:3], **how, implementation=INTERPRETED, return_lse=True)
    for x, y in zip((out, lse), together, strict=True):
        np.testing.assert_array_equal(x, y)
    shown, scale = oracle.by_head(suite.visible(MASK, whole)), whole.q.shape[3] ** -0.5
    true, sizes = (f(case, whole, shown, scale) for f in (score_oracle.attention, score_oracle.magnitudes))
    got = true._replace(out=np.asarray(out), lse=np.asarray(lse))
    suite.check_errors(got, true, sizes, whole, suite.reference_errors(MASK, whole, true, case.score))


@pytest.mark.gpu
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler in PATH")
@pytest.mark.parametrize("page", [8, 64, 256])
def test_pages_are_the_keys_that_they_hold_as_compiled(monkeypatch, page):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 4)
    whole, *pages = problem(page, "bfloat16")
    with emulated():
        out, lse = (np.asarray(x) for x in paged(whole, *pages, implementation="pallas_gpu"))
    shown = suite.visible(MASK, whole)
    true, sizes = suite.truth(shown, whole), suite.truth(shown, whole, oracle.magnitudes)
    got = true._replace(out=out, lse=lse)
    suite.check_errors(got, true, sizes, whole, suite.reference_errors(MASK, whole, true))


@interpreted
@pytest.mark.parametrize("careless", [False, True])
def test_a_block_is_read_when_all_its_pages_are_there(monkeypatch, careless):
    """Where one arrival is waited for, and not one for each page, that is found; else nothing is."""
    scratch_of, races = forward.Scratch.of, plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(gpu.Interpreted, "interpret", races)
    whole, *pages = problem(64, "bfloat16", width=128)
    if careless:
        monkeypatch.setattr(forward.Scratch, "of", lambda q, v, tile, page: scratch_of(q, v, tile))
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match=FOUND) if careless else contextlib.nullcontext():
            assert not any(jnp.isnan(x).any() for x in paged(whole, *pages, mask=masks.causal()))
    finally:
        # The interpreter keeps what a kernel that failed left behind.
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        interpret_pallas_call.reset_gpu_interpret_mode_state()


@interpreted
def test_heads_of_different_formulas_and_a_table_that_is_shared(monkeypatch):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 4)
    whole, k, v, table = problem(128)
    table[1, 0] = table[0, 0]  # a prefix that both rows have
    mask = masks.causal() & (masks.window(150) | masks.switch([True, False, False, True]))
    got = paged(whole, k, v, table, mask)
    want = paged(whole, *map(np.nan_to_num, (k, v)), table, mask, implementation="reference")
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@interpreted
def test_other_pages_are_put_together(monkeypatch):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 4)
    whole, *pages, table = problem(100)
    pages = [np.nan_to_num(x) for x in pages]
    with mock.patch.object(gpu.Few, "attend_pages", side_effect=AssertionError):
        got, want = (paged(whole, *pages, table, implementation=name) for name in (INTERPRETED, "reference"))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "page", "width", "value_width", "taken"),
    [
        (1, 64, 128, 128, True),
        (32, 8, 64, 256, True),
        (33, 64, 128, 128, False),
        (1, 100, 128, 128, False),
        (1, 64, 80, 128, False),
        (1, 64, 128, 320, False),
    ],
)
def test_pages_that_are_read_where_they_lie(queries, page, width, value_width, taken):
    shapes = (2, queries, 8, width), (9, page, 2, width), (9, page, 2, value_width)
    assert gpu.Few.takes_pages(*(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes)) == taken


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="these kernels are for jax 0.11 and later")
@pytest.mark.parametrize("page", [8, 48, 64, 128, 1024])
@pytest.mark.parametrize(("kv_heads", "width"), [(1, 64), (8, 128), (2, 256)])
def test_lowered_for_cuda_without_a_copy_of_the_keys(page, kv_heads, width):
    q, *k_and_v = ((2, 1, 4 * kv_heads, width), *[(70, page, kv_heads, width)] * 2)
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (q, *k_and_v)]
    table, names = jnp.zeros((2, 9), jnp.int32), ("position", "document")
    q_fields, k_fields = (dict.fromkeys(names, jnp.zeros((2, length), jnp.int32)) for length in (1, 9 * page))
    few = gpu.Few.over_pages(MASK, 0.1, *arrays[:2], table.shape[1], interpret=False)

    def attend(q, k, v):
        return few.attend_pages(scores.plain(), q, k, v, table, q_fields, k_fields)

    text = jax.jit(attend).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    pages = f"tensor<{'x'.join(map(str, k_and_v[0]))}xbf16>"
    users = [line for line in text.splitlines() if pages in line and "stablehlo." in line]
    assert len(users) == 1 and "custom_call @mosaic_gpu" in users[0]
