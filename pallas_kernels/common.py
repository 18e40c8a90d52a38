"""What the kernels of every device share: scores in a tile, in powers of two, and the shapes of their arrays."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from striate.lib.scores import Composed, Score

LOG2E, LN2 = math.log2(math.e), math.log(2.0)


def scored(score: Score, s, query, key):
    """(t in powers of two, w) for logits."""
    t, weight = score.tile(s, query, key)
    return LOG2E * t, weight


def is_plain(score: Score) -> bool:
    """Whether a score leaves the logits of a tile as they are."""
    return (type(score).tile is Score.tile and type(score).logit is Score.logit) or (
        isinstance(score, Composed) and all(map(is_plain, score.parts))
    )


def stacked(mask, score: Score, query_fields, key_fields):
    """(names of the fields that a kernel reads, those of queries (B, names, T), of keys (B, names, S))."""
    names = sorted(mask.fields | score.reads) or ["position"]

    def stack(fields):
        # A field that only the other side reads is there as zeros.
        position = fields["position"]
        return jnp.stack([fields.get(name, jnp.zeros_like(position)) for name in names], axis=1)

    return names, stack(query_fields), stack(key_fields)


def flatten(x_BKG):
    """(B, K, G, ...) as (B, H, ...)."""
    return x_BKG.reshape(x_BKG.shape[0], -1, *x_BKG.shape[3:])


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of the shape of an input, which varies over the mesh axes over which that does."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
