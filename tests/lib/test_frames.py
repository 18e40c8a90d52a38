"""Frames: softmax inside, a state across, in parts, and over a sharded sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import blocks as oracle
from oracles.derivatives import gradients
from oracles.linear_variants import over_documents
from striate import Tokens, UserError, attention, masks
from striate.lib.frames import frame_attention
from striate.lib.layouts import Striped, ZigZag
from striate.lib.parallel import AllGather, ReorderedScan, Ring, StateScan, ValueColumns
from suites.attention import mesh

FRAME = 4
DOCUMENT = np.repeat([[0, 0, 1, 1, 1, 2, -1, -1], [3, -1, 3, 3, 5, 5, 5, 5]], FRAME, axis=1).astype(np.int32)
POSITION = np.repeat([[0, 1, 0, 1, 2, 0, 0, 0], [0, 0, 1, 2, 0, 1, 2, 3]], FRAME, axis=1) * FRAME
TOKENS = Tokens(position=np.int32(POSITION + np.tile(np.arange(FRAME), 8)[None]), document=DOCUMENT)


def problem(seed=0, heads=4, kv_heads=2, width=3, value_width=4) -> list[np.ndarray]:
    """q, k, v and log-gates."""
    rng = np.random.default_rng(seed)
    shapes = (heads, width), (kv_heads, width), (kv_heads, value_width), (kv_heads,)
    *qkv, gate = (rng.normal(size=(*DOCUMENT.shape, *shape)).astype(np.float32) for shape in shapes)
    return [*qkv, -np.exp(gate - 1)]


@functools.partial(jax.jit, static_argnames=("parallel", "recurrence", "return_state"))
def attend(q, k, v, g, tokens=TOKENS, **how):
    return frame_attention(q, k, v, g, frame=FRAME, tokens=tokens, **how)


def seen(out):
    return np.where((DOCUMENT >= 0)[..., None, None], out, 0)


def true(q, k, v, g):
    return over_documents(functools.partial(oracle.frames, frame=FRAME), DOCUMENT, q, k, v, g[..., None])


def test_it_is_its_definition():
    given = problem()
    np.testing.assert_allclose(seen(attend(*given)), true(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_gradients_are_those_of_the_definition():
    given = problem(heads=2, kv_heads=1, width=2, value_width=1)
    d_out = seen(np.random.default_rng(9).normal(size=(*DOCUMENT.shape, 2, 1)))
    got = jax.grad(lambda given: (attend(*given) * d_out.astype(np.float32)).sum())(given)
    for x, y in zip(got, gradients(true, given, d_out), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5 * abs(y).max())


def test_a_first_frame_reads_no_state():
    given, first = problem(), POSITION[..., None, None] < FRAME
    frames = TOKENS.replace(document=np.where(DOCUMENT < 0, -1, 8 * DOCUMENT + POSITION // FRAME))
    alone = attention(*map(jnp.asarray, given[:3]), mask=masks.same("document"), q_tokens=frames, scale=1.0)
    np.testing.assert_array_equal(seen(np.where(first, attend(*given), 0)), seen(np.where(first, alone, 0)))


def test_the_order_of_the_tokens_of_a_first_frame_does_not_matter():
    given, order = problem(), np.array([2, 0, 3, 1])
    one = [x[:, :FRAME] for x in given], TOKENS.map(lambda x: x[:, :FRAME])
    out = attend(*one[0], one[1])
    mixed = attend(*(x[:, order] for x in one[0]), one[1])
    np.testing.assert_allclose(mixed, out[:, order], rtol=1e-6, atol=1e-6)


def test_no_later_frame_and_no_other_document_changes_a_bit():
    given, other = problem(), problem(seed=1)
    before = seen(attend(*given))
    for edited in ((DOCUMENT == 1) & (POSITION >= 2 * FRAME), DOCUMENT == 3, DOCUMENT == -1):
        assert edited.any()
        places = np.where(edited)
        mixed = [x.copy() for x in given]
        for x, y in zip(mixed, other, strict=True):
            x[places] = y[places]
        after = seen(attend(*mixed))
        np.testing.assert_array_equal(before[~edited], after[~edited])
    edited = (DOCUMENT == 5) & (POSITION == 0)
    changed = attend(given[0], np.where(edited[..., None, None], 1, given[1]), *given[2:])
    assert (seen(changed) != before)[DOCUMENT == 5].any((1, 2)).all()


def test_it_goes_on_frame_by_frame():
    given, state, parts = problem(), None, []
    for start in range(0, 8 * FRAME, FRAME):
        *of_frame, tokens = jax.tree.map(lambda x, at=slice(start, start + FRAME): x[:, at], [*given, TOKENS])
        out, state = attend(*of_frame, tokens, initial_state=state, return_state=True)
        parts.append(out)
    np.testing.assert_allclose(seen(np.concatenate(parts, 1)), seen(attend(*given)), rtol=1e-5, atol=1e-5)


SYSTEMS = {
    "contiguous": lambda m: (Ring(m), StateScan(m), Striped(4, 8)),
    "zigzag": lambda m: (Ring(m), StateScan(m, layout=ZigZag(4)), ZigZag(4)),
    "columns": lambda m: (AllGather(m), ValueColumns(m, layout=Striped(4, FRAME)), Striped(4, FRAME)),
}


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS)
def test_it_runs_over_a_sharded_sequence(system):
    given = problem()
    parallel, recurrence, layout = SYSTEMS[system](mesh(sequence=4))
    *arrays, tokens = layout.permute([*given, TOKENS])
    out = attend(*arrays, tokens, parallel=parallel, recurrence=recurrence)
    np.testing.assert_allclose(seen(layout.restore(out)), true(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_stripes_of_frames_become_runs():
    layout = Striped(2, 2 * FRAME)
    over = mesh(sequence=2)
    *arrays, tokens = layout.permute([*problem(), TOKENS])
    out = attend(*arrays, tokens, parallel=Ring(over), recurrence=ReorderedScan(over, layout=layout))
    np.testing.assert_allclose(seen(layout.restore(out)), true(*problem()), rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_at_the_ends_alone():
    *qkv, gate = problem()
    qkv = [jnp.bfloat16(x) for x in qkv]
    out, exact = attend(*qkv, gate), true(*(np.float64(x) for x in qkv), gate)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(seen(np.float64(out)), exact, rtol=2**-6, atol=2**-7 * abs(exact).max())


def test_cut_frames_are_answered():
    given, over = problem(), mesh(sequence=4)
    for recurrence, words in (
        (None, "30 tokens"),
        (ValueColumns(over, layout=Striped(4, 2)), r"Striped\(shards=4, stripe=2\) are not of whole frames of 4"),
        (StateScan(mesh(sequence=8), layout=ZigZag(8)), r"ZigZag\(shards=8\) are not of whole frames"),
    ):
        cut = [x[:, :30] if recurrence is None else x for x in given]
        with pytest.raises(UserError, match=words):
            frame_attention(*cut, frame=FRAME, recurrence=recurrence)
    with pytest.raises(UserError, match=r"needs one number a key: \(2, 32, 2\)"):
        frame_attention(*given[:3], given[3][..., :1], frame=FRAME)
