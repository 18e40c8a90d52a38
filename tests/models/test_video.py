"""TRecViT: frame by frame as all at once, clips apart, and nothing goes back in time."""

import functools

import jax
import numpy as np

from striate import Tokens
from striate.lib.parallel import Across, Ring, StateScan
from striate.models.decoder import DecoderConfig
from striate.models.video import OVER_SPACE, OVER_TIME, TRecViT
from suites.attention import mesh

FRAMES, PLACES = 12, 3
MODEL = TRecViT(
    DecoderConfig(width=6, heads=2, kv_heads=1, head_dim=4, hidden=8, layers=4, pattern=(OVER_TIME, OVER_SPACE))
)
CLIP = np.random.default_rng(0).normal(size=(2, FRAMES, PLACES, 2)).astype(np.float32)
TOKENS = Tokens.arange(2, FRAMES)


@functools.cache
def parameters():
    """Random, so that the token of a whole frame, which begins as 0, has an effect."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), CLIP, TOKENS)
    return jax.tree.map(lambda x: np.random.default_rng(x.size).normal(0.1, 0.5, x.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def run(model, clip, tokens, past=None):
    return model.apply(parameters(), clip, tokens, past)


def test_frame_by_frame_is_the_whole_clip():
    (whole, last), past, found = run(MODEL, CLIP, TOKENS), None, []
    for frame in range(FRAMES):
        now = slice(frame, frame + 1)
        out, past = run(MODEL, CLIP[:, now], TOKENS.map(lambda x, now=now: x[:, now]), past)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, 1), whole, rtol=1e-5, atol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (past, last)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_frame_changes_no_bit_of_the_frames_before_and_all_of_those_after():
    changed = CLIP.copy()
    changed[:, 5, 1] += 1
    before, after = (np.asarray(run(MODEL, clip, TOKENS)[0]) for clip in (CLIP, changed))
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert (after[:, 5:] != before[:, 5:]).any(-1).all()


def test_clips_packed_are_clips_by_themselves():
    position = np.tile(np.concatenate([np.arange(3), np.arange(9)]).astype(np.int32), (2, 1))
    document = np.repeat(np.int32([[0, 1], [4, 2]]), (3, 9), axis=1)
    packed = run(MODEL, CLIP, Tokens(position=position, document=document))[0]
    for start, stop in ((0, 3), (3, 12)):
        alone = run(MODEL, CLIP[:, start:stop], Tokens.arange(2, stop - start))[0]
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-6, atol=2e-6)


def test_gradients_reach_the_frames_that_are_read():
    def read(clip):
        return (MODEL.apply(parameters(), clip, TOKENS)[0][:, 4, -1] ** 2).sum()

    gradient = np.asarray(jax.jit(jax.grad(read))(CLIP))
    assert np.isfinite(gradient).all() and (gradient[:, :5] != 0).all()
    np.testing.assert_array_equal(gradient[:, 5:], 0)


def test_frames_over_several_devices_are_those_of_one():
    there = mesh(sequence=4)
    across = MODEL.clone(parallel=Across(Ring(there), StateScan(there)))
    np.testing.assert_allclose(run(across, CLIP, TOKENS)[0], run(MODEL, CLIP, TOKENS)[0], rtol=1e-5, atol=1e-5)
