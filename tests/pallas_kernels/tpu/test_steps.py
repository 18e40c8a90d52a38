"""The lists that the grids walk: every block that has work, once, in order, and no other."""

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from striate import Tokens, masks, scores
from striate.lib.attention import Local
from striate.lib.tiles import Task
from striate.pallas_kernels.tpu import steps
from striate.pallas_kernels.tpu.attention import Interpreted, Kernel

MASKS = (
    "causal()",
    "everything()",
    "nothing()",
    "window(63)",
    "window(63) | sink(4)",
    "window(20, right=20)",
    "causal() & same('document')",
    "(causal() | prefix()) & same('document')",
    "~causal()",
    "key('position', 100, 120)",
)


def tokens_of(lengths: list[int]) -> Tokens:
    document = np.repeat(np.arange(len(lengths)), lengths)[None].astype(np.int32)
    position = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    return Tokens(position, document=document, prefix=(position < 16).astype(np.int32))


def walked(mask, tokens: Tokens, tile: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(row, column, flags) of every step of the forward grid."""
    kernel = Kernel(mask, 1.0, tile)
    fields = kernel.sides(scores.plain(), tokens.as_queries(), tokens)
    lists = jax.tree.map(np.asarray, jax.jit(lambda f: steps.live_steps(steps.quarters(kernel, *f)))(fields))
    return [
        (row, code // steps.COLUMN, code % steps.COLUMN)
        for rows, codes, count in zip(*lists, strict=True)
        for row, code in zip(rows[:count], codes[:count], strict=True)
    ]


@pytest.mark.parametrize("longest", [2**15, 64, 5])
@pytest.mark.parametrize("text", MASKS)
def test_steps_are_the_live_blocks(monkeypatch, text, longest):
    monkeypatch.setattr(steps, "LONGEST", longest)
    mask, tokens, (q, k) = masks.parse(text), tokens_of([96, 64, 96]), (16, 32)
    shown = np.asarray(mask.dense(tokens, tokens))[0].reshape(16, q, 8, k)
    some, every = shown.any((1, 3)), shown.all((1, 3))
    got = walked(mask, tokens, (q, k))
    work = [(row, column) for row, column, flags in got if flags & steps.LIVE]
    # Documents of whole blocks: in a block that two of them share, positions would range over both.
    assert work == [(int(r), int(c)) for r, c in np.argwhere(some)]
    assert all(bool(flags & steps.MASKED) == (not every[r, c]) for r, c, flags in got if flags & steps.LIVE)
    for row in {row for row, *_ in got}:
        flags = [flags for r, _, flags in got if r == row]
        assert [bool(f & steps.FIRST) for f in flags] == [i == 0 for i in range(len(flags))]
        assert [bool(f & steps.LAST) for f in flags] == [i == len(flags) - 1 for i in range(len(flags))]
    # Beyond them only the one step that a segment without work has.
    assert len(got) - len(work) <= -(-16 // max(longest // 8, 1))


@pytest.mark.long
@pytest.mark.parametrize("text", MASKS)
def test_a_grid_has_a_step_for_every_live_block_and_no_other(text):
    points = []

    def record(token, *point):
        points.append(point)
        return token

    class Counted(Interpreted):
        interpret = pltpu.InterpretParams(grid_point_recorder=record)

        @classmethod
        def choose_tile(cls, mask, q, k):
            return 32, 32

    mask, tokens, heads = masks.parse(text), tokens_of([96, 64, 96]), 1
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.normal(size=(1, 256, heads, 8)).astype(np.float32) for _ in range(4))
    task, arrays = Task(mask, 1.0, Counted), (scores.plain(), q, k, v, tokens.as_queries(), tokens)

    def steps_of(function, *args):
        points.clear()
        results = jax.block_until_ready(jax.jit(function)(*args))
        return len(points), results

    live = np.asarray(mask.dense(tokens, tokens))[0].reshape(8, 32, 8, 32).any((1, 3)).sum()
    forward, (out, lse) = steps_of(lambda *x: Local().forward(task, *x), *arrays)
    backward, _ = steps_of(lambda *x: Local().backward(task, *x), *arrays, d_out, lse, (d_out * out).sum(-1))
    # Where nothing is live one step says so.
    assert forward == backward == heads * max(live, 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("text", MASKS)
def test_a_block_that_is_cut_is_done_by_quarters(text, transposed):
    """What `bodies` has a step do is every visible pair, and what it does without a mask is visible."""
    mask, tokens = masks.parse(text), tokens_of([256, 512, 256])
    kernel = Kernel(mask, 1.0, (256, 512))
    fields = kernel.sides(scores.plain(), tokens.as_queries(), tokens)
    lists = steps.live_steps(steps.quarters(kernel, *fields, transposed=transposed))
    shown = np.asarray(mask.dense(tokens, tokens))[0]
    shown, tile = (shown.T, (512, 256)) if transposed else (shown, (256, 512))
    done = np.zeros_like(shown)
    for rows, codes, count in zip(*map(np.asarray, lists), strict=True):
        for row, code in zip(rows[:count], codes[:count], strict=True):
            block = shown[row * tile[0] :, code // steps.COLUMN * tile[1] :]
            into = done[row * tile[0] :, code // steps.COLUMN * tile[1] :]
            for wanted, r, c, masked in steps.bodies(code % steps.COLUMN, *tile):
                if wanted:
                    assert not into[r, c].any() and (masked or block[r, c].all())
                    into[r, c] = True
    assert not (shown & ~done).any()
    quarters = [x.reshape(8, 128, 4, 256) if not transposed else x.reshape(4, 256, 8, 128) for x in (done, shown)]
    np.testing.assert_array_equal(*(x.any((1, 3)) for x in quarters))


def test_rows_of_a_batch_follow_each_other():
    tokens = jax.tree.map(lambda x: np.concatenate([x, x[:, ::-1]]), tokens_of([64, 64]))
    rows = [row for row, *_ in walked(masks.causal(), tokens, (32, 32))]
    assert rows == sorted(rows) and set(rows) == set(range(8))


def test_packed_documents_take_a_tenth_of_the_steps_of_the_causal_list():
    length = 2**17
    lengths = np.random.default_rng(0).lognormal(np.log(4096) - 0.5, 1.0, size=200).astype(int)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), length)]
    tokens = tokens_of([*lengths, length - lengths.sum()])
    packed = walked(masks.causal() & masks.same("document"), tokens, (1024, 1024))
    causal = walked(masks.causal(), Tokens.arange(1, length), (1024, 1024))
    assert len(causal) == 128 * 129 // 2 and len(causal) >= 10 * len(packed)
