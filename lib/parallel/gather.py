"""AllGather: every device collects all keys and values, then attends alone. Simple; memory O(key length)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from striate.lib.attention import Local
from striate.lib.parallel.sharding import SequenceParallel


@dataclass(frozen=True)
class AllGather(SequenceParallel):
    """Queries stay, keys and values are gathered along the sequence axis in their storage dtype.

    The gradients of keys and values are summed and scattered back in float32.
    """

    def shard_forward(self, task, score, q, k, v, query_fields, key_fields):
        k, v, key_fields = self._gather((k, v, key_fields))
        return Local().forward(task, score, q, k, v, query_fields, key_fields)

    def shard_backward(self, task, score, q, k, v, query_fields, key_fields, d_out, lse, delta):
        k, v, key_fields = self._gather((k, v, key_fields))
        arrays = q, k, v, query_fields, key_fields, d_out, lse, delta
        d_score, dq, dk, dv = Local().backward(task._replace(gradients=jnp.float32), score, *arrays)
        dk, dv = (jax.lax.psum_scatter(x, self.axis, scatter_dimension=1, tiled=True) for x in (dk, dv))
        return d_score, dq, dk, dv

    def _gather(self, tree):
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, axis=1, tiled=True), tree)
