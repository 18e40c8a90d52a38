"""Few queries to a long cache on a TPU, step by step on this machine: values, what is read, pages, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import striate
from oracles import scores as score_oracle
from striate import Tokens, masks, scores
from striate.lib.decoding.merging import sharded_attention
from striate.lib.decoding.paging import paged_attention
from striate.lib.tiles import Task
from striate.pallas_kernels.tpu import decode, steps
from striate.pallas_kernels.tpu.attention import Interpreted
from striate.pallas_kernels.tpu.decode import Decode
from suites import attention as suite
from suites.attention import System, check_bound, check_score, mesh, random_problem, visible

INTERPRETED = "pallas_tpu_interpret"
KERNEL = System(INTERPRETED)
BLOCK = 128  # tokens
MASKS = (
    "causal()",
    "causal() & same('document')",
    "causal() & (window(100) | sink(3))",
    "(causal() | prefix()) & same('document')",
    "window(20, right=20) & key('position', 100)",
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 1)  # bytes: as few tokens as there can be, BLOCK


def cache(length=300, queries=1, used=(280, 150), documents=3) -> tuple[Tokens, Tokens]:
    """(queries, the last tokens that are used; keys, used from the front, the rest empty), packed documents."""
    place = np.arange(length, dtype=np.int32)[None]
    used = np.array(used, np.int32)[:, None]
    size = length // documents
    document, position = np.where(place < used, place // size, -1), np.broadcast_to(place % size, (len(used), length))
    keys = Tokens(
        position if documents > 1 else np.broadcast_to(place, position.shape),
        document=document.astype(np.int32),
        prefix=(position < 5).astype(np.int32),
    )
    last = used - queries + np.arange(queries)
    return jax.tree.map(lambda x: np.take_along_axis(x, last, axis=1), keys), keys


def problem_of(q_tokens, k_tokens, seed=0, **shape):
    return random_problem(np.random.default_rng(seed), q_tokens, k_tokens, **shape)


def decoding(problem) -> Decode:
    plan = Task(masks.everything(), 1.0, Interpreted).plan_attend(problem.q, problem.k)
    assert isinstance(plan, Decode)
    return plan


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_results_and_gradients_obey_the_bound(text, queries):
    problem = problem_of(*cache(queries=queries, documents=1 if "window" in text else 3), heads=8)
    assert decoding(problem).tile == (queries, BLOCK)
    check_bound(KERNEL, masks.parse(text), problem)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "width", "value_width", "dtype"),
    [
        pytest.param(4, 2, 2, 64, 64, "float32", marks=pytest.mark.slow),  # tokens on lanes
        (4, 2, 2, 80, 96, "bfloat16"),
        pytest.param(4, 1, 2, 96, 80, "float32", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, 192, 128, "float32", marks=pytest.mark.slow),  # only of the keys
        pytest.param(3, 3, 2, 256, 64, "float32", marks=pytest.mark.slow),
        (6, 3, 2, 128, 128, "bfloat16"),  # heads one by one
        (4, 2, 2, 128, 128, "float32"),  # heads woven
        (8, 8, 1, 128, 256, "bfloat16"),
        pytest.param(24, 24, 1, 128, 128, "float32", marks=pytest.mark.slow),
        (16, 8, 16, 128, 128, "bfloat16"),  # in groups that share a word
        pytest.param(40, 4, 3, 128, 128, "float32", marks=pytest.mark.slow),
        pytest.param(72, 2, 1, 128, 128, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_shapes(heads, kv_heads, queries, width, value_width, dtype):
    tokens = cache(length=200, queries=queries, used=(170,), documents=1)
    shape = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": value_width, "dtype": dtype}
    check_bound(KERNEL, masks.causal() & masks.window(120), problem_of(*tokens, **shape))


CASES = score_oracle.all_cases(np.random.default_rng(0), 4)
SOON = ("plain", "t5 bidirectional=False", "composed")


@pytest.mark.parametrize(
    ("case", "width"),
    [
        pytest.param(case, width, marks=[] if case.name in SOON and width == 16 else pytest.mark.slow)
        for case in CASES
        for width in (16, 128)
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_scores(case, width):
    rng = np.random.default_rng(1)
    q_tokens, k_tokens = (suite.formulas.random_tokens(rng, batch=2, length=n) for n in (3, 150))
    if case.name == "low rank":
        pytest.skip("its factors are as long as the tokens of the suite")
    problem = random_problem(rng, q_tokens, k_tokens, heads=4, kv_heads=2, width=width)
    check_score(KERNEL, masks.causal(), case, problem, visible(masks.causal(), problem))


def test_heads_with_formulas_of_their_own():
    per_head = masks.causal() & (masks.window(63) | masks.switch([True, False, False, True]))
    problem, how = problem_of(*cache(queries=2), width=128, heads=4, kv_heads=2), {"mask": per_head}
    how |= {"q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens}
    got, want = (striate.attention(*problem[:3], implementation=name, **how) for name in (INTERPRETED, "xla"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_row_that_sees_nothing_gives_nothing():
    q_tokens, k_tokens = cache(queries=3)
    lost = q_tokens.document.copy()
    lost[0, 1], lost[1] = 9, 9  # the second row of the batch has no live block
    problem = problem_of(q_tokens.replace(document=lost), k_tokens)
    blind = lost == 9
    got = suite.solve(
        KERNEL, masks.same("document"), problem._replace(d_lse=np.where(blind[..., None], 0, problem.d_lse))
    )
    assert (got.out[blind] == 0).all() and np.isneginf(got.lse[blind]).all() and (got.dq[blind] == 0).all()
    assert np.isfinite(got.lse[~blind]).all() and all(np.isfinite(x).all() for x in (got.dq, got.dk, got.dv))


@pytest.mark.parametrize("width", [16, 128])
def test_a_hidden_block_is_not_read(width):
    problem = problem_of(*cache(length=700, used=(600, 300), documents=1), width=width, value_width=width)
    mask = masks.causal() & masks.same("document") & (masks.window(100) | masks.sink(3))
    shown = visible(mask, problem)[:, 0]
    hidden = (
        np.repeat([[row[i : i + BLOCK].any() for i in range(0, 700, BLOCK)] for row in shown], BLOCK, 1)[:, :700] == 0
    )
    assert hidden.any(1).all()
    k, v = (np.where(hidden[:, :, None, None], np.float32(np.nan), x) for x in problem[1:3])
    how = {"mask": mask, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens, "implementation": INTERPRETED}
    got, want = (striate.attention(problem.q, *x, return_lse=True, **how) for x in ((k, v), problem[1:3]))
    assert all((x == y).all() and np.isfinite(x).all() for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("text", MASKS)
def test_there_are_as_many_steps_as_live_blocks(monkeypatch, text):
    problem = problem_of(*cache(length=900, used=(800, 200), documents=1))
    mask, counts = masks.parse(text) & masks.same("document"), []

    def spy(listed, call, carry):
        counts.append(int(listed.count.sum()))
        return steps.over_segments(listed, call, carry)

    monkeypatch.setattr(decode, "over_segments", spy)
    how = {"mask": mask, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens}
    striate.attention(*problem[:3], implementation=INTERPRETED, **how)
    shown = np.pad(visible(mask, problem)[:, 0], ((0, 0), (0, -900 % BLOCK))).reshape(2, -1, BLOCK).any(2)
    assert 2 <= shown.sum() < shown.size and counts == [shown.sum()]


@pytest.mark.parametrize("longest", [1, 7])
def test_rows_are_taken_in_segments_that_make_no_difference(monkeypatch, longest):
    monkeypatch.setattr(steps, "LONGEST", longest)
    # Another mask for each, so that nothing compiled before is found again.
    check_bound(KERNEL, masks.window(90 + longest), problem_of(*cache(queries=2)))


def test_what_memory_held_before_changes_nothing():
    class Strange(Interpreted):
        interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

    problem, task = problem_of(*cache(queries=2), width=128, value_width=128), Task(masks.causal(), 1.0, Strange)
    pltpu.reset_tpu_interpret_mode_state()
    arrays = scores.plain(), *problem[:3], problem.q_tokens.as_queries(), problem.k_tokens
    got, want = (striate.lib.attention.Local().forward(task._replace(tiled=x), *arrays) for x in (Strange, Interpreted))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_many_queries_are_for_the_ordinary_kernel():
    for length, heads in ((17, 4), (16, 65)):
        shapes = [jax.ShapeDtypeStruct((1, n, heads, 16), jnp.float32) for n in (length, 300)]
        assert isinstance(Task(masks.causal(), 1.0, Interpreted).plan_attend(*shapes), Interpreted)


def test_vmap_maps_over_it():
    problem = problem_of(*cache(queries=2))
    stacked = [np.stack([x, 2 * x]) for x in problem[:3]]
    how = {"mask": masks.causal(), "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens}
    got = jax.vmap(lambda *x: striate.attention(*x, implementation=INTERPRETED, **how))(*stacked)
    for i, x in enumerate(got):
        want = striate.attention(*[y[i] for y in stacked], implementation="xla", **how)
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("score", [scores.plain(), scores.compose(scores.alibi(0.1), scores.off_by_one())], ids=repr)
def test_a_cache_that_is_spread_over_devices(devices, score):
    problem = problem_of(*cache(length=600, queries=2, used=(600, 250)), width=128)
    mask = masks.causal() & masks.same("document")
    how = {"mask": mask, "score": score, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens}
    spread = {"mesh": mesh(keys=devices), "axis": "keys", "implementation": INTERPRETED}
    got = jax.jit(lambda *x: sharded_attention(*x, **how, **spread))(*problem[:3])
    want = striate.attention(*problem[:3], return_lse=True, implementation="reference", **how)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def pages_of(problem, page: int):
    """(table, pages of keys, pages of values): shuffled, with pages of nobody in between, which hold NaN."""
    batch, length = problem.k_tokens.shape
    count = batch * (length // page)
    table = np.random.default_rng(0).permutation(count + 3)[:count].reshape(batch, -1).astype(np.int32)

    def cut(x_BSKD):
        pages = np.full((count + 3, page, *x_BSKD.shape[2:]), np.nan, x_BSKD.dtype)
        pages[table] = x_BSKD.reshape(*table.shape, page, *x_BSKD.shape[2:])
        return pages

    return table, cut(problem.k), cut(problem.v)


class TestPages:
    """The kernel that looks pages up is the one that does not, with other addresses."""

    @pytest.mark.parametrize(
        ("page", "heads", "kv_heads", "queries", "width", "dtype"),
        [
            pytest.param(8, 4, 2, 3, 128, "float32", marks=pytest.mark.slow),
            (16, 16, 8, 1, 128, "bfloat16"),
            pytest.param(16, 16, 8, 16, 128, "float32", marks=pytest.mark.slow),
            (64, 6, 3, 2, 128, "float32"),
            (128, 4, 2, 2, 64, "float32"),
            (128, 4, 2, 2, 80, "bfloat16"),
        ],
    )
    def test_they_are_the_cache_bit_for_bit(self, page, heads, kv_heads, queries, width, dtype):
        shape = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": width, "dtype": dtype}
        problem = problem_of(*cache(length=640, queries=queries, used=(600, 250)), **shape)
        table, k, v = pages_of(problem, page)
        mask = masks.causal() & masks.same("document")
        blank = ~visible(mask, problem).any(1).reshape(*table.shape, page).any(2)
        assert blank.any(1).all()
        k[table[blank]], v[table[blank]] = np.nan, np.nan
        how = {"mask": mask, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens, "return_lse": True}
        how |= {"implementation": INTERPRETED, "score": scores.alibi(0.1)}
        got, want = paged_attention(problem.q, k, v, table, **how), striate.attention(*problem[:3], **how)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(suite.bits(np.asarray(x)), suite.bits(np.asarray(y)))
            assert np.isfinite(x).all()

    @pytest.mark.long
    def test_queries_in_groups_find_their_words_in_pages(self):
        # The products of such a bfloat16 problem are rounded by this machine as it likes, hence no bits.
        shape = {"heads": 16, "kv_heads": 8, "width": 128, "value_width": 128, "dtype": "bfloat16"}
        problem = problem_of(*cache(length=320, queries=16, used=(300, 100)), **shape)
        table, k, v = pages_of(problem, 16)
        how = {"mask": masks.causal(), "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens}
        got = paged_attention(problem.q, k, v, table, implementation=INTERPRETED, **how)
        want = striate.attention(*problem[:3], implementation="reference", **how)
        np.testing.assert_allclose(*(np.float32(x) for x in (got, want)), rtol=2**-6, atol=2**-6)
