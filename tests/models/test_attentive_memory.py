"""The layer of frames: what a token reads, frame by frame, and several devices. That of windows is a recurrent one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from striate.lib.layouts import ZigZag
from striate.lib.masks import parse
from striate.lib.parallel import Ring, StateScan
from striate.lib.positions import Rope
from striate.lib.tokens import Tokens
from striate.models.attentive_memory import FrameAttention
from suites.attention import mesh

FRAME, LENGTH, WIDTH = 2, 16, 12
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 4, "out_deviation": 0.3, "dtype": "float32", "frame": FRAME}
LANGUAGE = {"mask": parse("causal()"), "position": Rope(), "score": "alibi()"}
DOCUMENT = np.repeat([[0, 1], [0, 0]], LENGTH // 2, axis=1).astype(np.int32)
TOKENS = Tokens(position=np.int32(np.arange(LENGTH)[None] - DOCUMENT * LENGTH // 2), document=DOCUMENT)
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)


@functools.cache
def variables():
    return nn.unbox(jax.jit(FrameAttention(**SIZES, **LANGUAGE).init)(jax.random.key(0), X, TOKENS, TOKENS))


@functools.partial(jax.jit, static_argnames=("parallel", "recurrence"))
def layer(variables, x, tokens, past=None, **across):
    return FrameAttention(**SIZES, **LANGUAGE, **across).apply(variables, x, tokens, tokens, past)


@pytest.mark.long
def test_a_token_reads_its_frame_and_those_before_it():
    row, given = TOKENS.map(lambda x: x[:1]), variables()
    slopes = jax.jit(jax.jacrev(lambda x: layer(given, x, row)[0].sum((0, 2))))(X[:1])
    frame = np.asarray(TOKENS.position[0]) // FRAME
    read = (DOCUMENT[0][:, None] == DOCUMENT[0][None]) & (frame[:, None] >= frame[None])
    np.testing.assert_array_equal((np.asarray(slopes)[:, 0] != 0).any(-1), read)


def test_frame_by_frame_is_all_at_once():
    past, parts = None, []
    for start in range(0, LENGTH, FRAME):
        at = slice(start, start + FRAME)
        out, past = layer(variables(), X[:, at], TOKENS.map(lambda x, at=at: x[:, at]), past)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), layer(variables(), X, TOKENS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_several_devices_give_the_same_loss_and_gradients():
    layout, over = ZigZag(4), mesh(sequence=4)
    across = {"parallel": Ring(over), "recurrence": StateScan(over, layout=layout)}

    def gradients(x, tokens, order, **across):
        def loss(variables, x):
            return (order(layer(variables, x, tokens, **across)[0]) ** 3).sum()

        return jax.value_and_grad(loss, (0, 1))(variables(), x)

    want, (of_variables, of_x) = gradients(X, TOKENS, lambda x: x)
    got = gradients(*layout.permute((X, TOKENS)), layout.restore, **across)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves((want, (of_variables, layout.permute(of_x)))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * max(abs(jnp.asarray(y)).max(), 1e-3))
