"""What both passes of attention share: the order of the parts of a tile, scores in a tile, shapes that TPUs like."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.lib.scores import Score
from striate.pallas_kernels.common import LOG2E, is_plain
from striate.pallas_kernels.tpu.blocks import Parts
from striate.pallas_kernels.tpu.chips import vmem

NT, NN, TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))


def in_parts(parts: Parts, rows: slice, keys: slice, first, second, third) -> None:
    """Three stages for every part of some rows and keys of a tile; `first` is some parts ahead of the others."""
    places = [
        (slice(row, row + parts.queries), slice(key, key + parts.keys))
        for key in range(keys.start, keys.stop, parts.keys)
        for row in range(rows.start, rows.stop, parts.queries)
    ]
    in_turn(places, parts.ahead, first, second, third)


def in_turn(places: list, ahead: int, first, second, third) -> None:
    """Three stages at every place; `first` is some places ahead of the others."""
    begun = {}
    for number in range(len(places) + ahead):
        if number < len(places):
            begun[number] = first(*places[number])
        done = number - ahead
        if done >= 0:
            third(*places[done], *second(*places[done], begun.pop(done)))


def scaled(score: Score, scale: float, q: jax.Array) -> jax.Array:
    """Queries whose products with keys are logits in powers of two, where the score is plain; else as they are.

    To scale them is to round them again, which no score shall see that may be steep somewhere: it scales the products.
    """
    return (scale * LOG2E * q.astype(jnp.float32)).astype(q.dtype) if is_plain(score) else q


def parameters(score: Score, heads: int, index):
    """(a score's parameters as (H, 1, n) arrays, their blocks of one head, what makes the score of such blocks)."""
    leaves, tree = jax.tree.flatten(score)
    per_head = [jnp.broadcast_to(x, (heads,)) if x.ndim == 0 else x for x in leaves]
    arrays = [x.reshape(heads, 1, -1) for x in per_head]
    specs = [pl.BlockSpec((1, 1, x.shape[2]), index) for x in arrays]

    def rebuild(blocks):
        return tree.unflatten([x if leaf.ndim > 1 else x[0] for x, leaf in zip(blocks, leaves, strict=True)])

    return arrays, specs, rebuild


def of_parameters(score: Score, shares):
    """(K, G, 1, n) arrays, one for each parameter, as a score whose parameters they are."""
    leaves, tree = jax.tree.flatten(score)
    summed = [x.reshape(leaf.shape) if leaf.ndim else x.sum() for x, leaf in zip(shares, leaves, strict=True)]
    return tree.unflatten(summed)


def column(row_1N, lanes: int):
    """(1, n) as (n, lanes), every lane the same."""
    return jnp.broadcast_to(row_1N, (lanes, row_1N.shape[1])).T


def spread(x_RL, width: int):
    """(rows, lanes), every lane the same, as (rows, width)."""
    return jnp.tile(x_RL, (1, -(-width // x_RL.shape[1])))[:, :width]


def product(a, b, dimensions):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def compiler_params(*semantics: str):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem())
