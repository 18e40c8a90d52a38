"""The GPU kernels on their way to a GPU: lowered for CUDA on this machine, which fixes layouts, copies and barriers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from striate import Tokens, masks, scores
from striate.lib.attention import Local
from striate.lib.tiles import Task

pytestmark = pytest.mark.skipif(
    jax.version.__version_info__ < (0, 11), reason="these kernels are for jax 0.11 and later"
)

RULE = masks.parse(
    "causal() & same('document') & (window(400) | sink(3)) | prefix() & modulo('position', 'position', 3)"
)
MASKS = [RULE, masks.everything(), masks.table("document", "prefix", [[True, False], [True, True]]), ~masks.window(30)]
WIDTHS = [(64, 64), (80, 96), (128, 128), (192, 128), (128, 256), (256, 256)]
SCORES = {
    "softcap": scores.softcap(50.0),
    "alibi": scores.alibi(np.float32([0.5, 0.25, 0.1, 0.05])),
    "signed": scores.signed(),
    "sigmoid": scores.sigmoid(-1.0),
    "power": scores.power(0.5, 0.1),
    "t5": scores.t5_bias(np.zeros((4, 32), np.float32), bidirectional=True),
}


def kernels(mask, score=None, width=128, value_width=128, length=512, heads=4, kv_heads=2, dtype=jnp.bfloat16):
    """How many kernels the two passes are, in their programs for a GPU."""
    from striate.pallas_kernels.gpu.attention import Kernel

    task, score = Task(mask, width**-0.5, Kernel), scores.plain() if score is None else score
    zeros = jnp.zeros((1, length), jnp.int32)
    tokens = Tokens.arange(1, length).replace(document=zeros, prefix=zeros)

    def array(heads, *width, dtype=dtype):
        return jax.ShapeDtypeStruct((1, length, heads, *width), dtype)

    q, k, v, d_out = (
        array(h, w)
        for h, w in zip((heads, kv_heads, kv_heads, heads), (width, width, value_width, value_width), strict=True)
    )
    row = array(heads, dtype=jnp.float32)
    sides = tokens.as_queries(), tokens

    def forward(*arrays):
        return Local().forward(task, score, *arrays, *sides)

    def backward(q, k, v, *rest):
        return Local().backward(task, score, q, k, v, *sides, *rest)

    texts = (
        jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        for function, arrays in ((forward, (q, k, v)), (backward, (q, k, v, d_out, row, row)))
    )
    return tuple(len(re.findall(r"custom_call @mosaic_gpu", text)) for text in texts)


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
def test_widths(width, value_width):
    wide = max(width, 64) + value_width > 256
    assert kernels(masks.causal(), width=width, value_width=value_width) == (1, 3 if wide else 1)


def test_where_reruns_shall_be_equal_nothing_is_added_to_by_two_thread_blocks(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert kernels(masks.causal()) == (1, 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false --xla_gpu_exclude_nondeterministic_ops")
    assert kernels(masks.causal()) == (1, 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    assert kernels(masks.causal()) == (1, 1)


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    assert kernels(RULE, SCORES[name]) == (1, 2 if name == "t5" else 1)  # the sums of a table have no place in one


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(mask):
    assert kernels(mask, dtype=jnp.float16) == (1, 1)


def test_a_score_that_reads_what_the_mask_does_not():
    assert kernels(masks.everything(), SCORES["alibi"]) == (1, 1)


def test_blocks_are_kept_in_shared_memory_that_there_is():
    from striate.pallas_kernels.gpu import backward, backward_adding, forward
    from striate.pallas_kernels.gpu.parts import SHARED_MEMORY, TILE, WIDEST

    for width, value_width in WIDTHS:
        q, v = (jnp.zeros((1, 1, 128, -(-x // 64) * 64), jnp.bfloat16) for x in (width, value_width))
        scratches = [forward.Scratch.of(q, v, (TILE, TILE)), backward.Scratch.of(q, v, TILE, TILE, queries_pass=True)]
        if q.shape[3] + v.shape[3] <= WIDEST:
            scratches.append(backward_adding.Scratch.of(q, v, TILE, TILE))
        for scratch, columns in scratches:
            taken = sum(np.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch if hasattr(x, "dtype"))
            assert taken <= SHARED_MEMORY and TILE % columns == 0
