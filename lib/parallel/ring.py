"""Ring attention: queries stay, blocks of keys and values travel around the devices (Liu et al. 2023).

At step s = 0 .. N-1 device i holds the keys that were born on device (i - s) mod N. The layout of the tokens decides
how the work is spread (striate.lib.layouts); this file is the same for every layout, because the mask reads Tokens,
which travel with the keys.

Forward: N - 1 hops. The next hop is issued before the compute of the step, which does not depend on it; the partial
results (m, l, acc) stay in float32 on the device of their queries.

Backward: the keys travel as before; the float32 accumulators (dK, dV) of a block travel with it and need N hops, so
that each ends at its owner. They depend on the compute, hence move one step late: step s moves the accumulator of
step s - 1 while it computes its own share, and adds that on arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from striate.lib import blockwise
from striate.lib.parallel.sharding import SequenceParallel


@dataclass(frozen=True)
class Ring(SequenceParallel):
    """Keys and values travel around the devices of the sequence axis; memory O(length / devices)."""

    def shard_forward(self, mask, scale, q, k, v, query_fields, key_fields):
        kv_heads, length = k.shape[2], q.shape[1]
        problem = blockwise.plan(mask, scale, length, k.shape[1])
        out_dtype = v.dtype
        q = blockwise.queries(problem, q, kv_heads)
        query_fields = blockwise.fields(problem, query_fields, 0)
        block = self._key_block(problem, k, v, key_fields)
        partial = blockwise.Partial.empty(q.shape[:-1], v.shape[-1])

        def attend(block, partial):
            k, v, key_fields = block
            return blockwise.forward(problem, q, k, v, query_fields, key_fields, partial)

        def step(_, carry):
            block, partial = carry
            arriving = self._hop(block)
            return arriving, attend(block, partial)

        block, partial = jax.lax.fori_loop(0, self.shards - 1, step, (block, partial))
        out, lse = attend(block, partial).finish()
        return blockwise.natural(out, length).astype(out_dtype), blockwise.natural(lse, length)

    def shard_backward(self, mask, scale, q, k, v, query_fields, key_fields, d_out, lse, delta):
        kv_heads, (length, keys) = k.shape[2], (q.shape[1], k.shape[1])
        problem = blockwise.plan(mask, scale, length, keys)
        rows = tuple(blockwise.queries(problem, x, kv_heads) for x in (d_out, lse, delta))
        q = blockwise.queries(problem, q, kv_heads)
        query_fields = blockwise.fields(problem, query_fields, 0)
        block = self._key_block(problem, k, v, key_fields)

        def gradients(block, dq_T):
            k, v, key_fields = block
            dq_T, dk, dv = blockwise.backward(problem, q, k, v, *rows, query_fields, key_fields, dq_T)
            return dq_T, (dk, dv)

        def step(_, carry):
            block, accumulator, dq_T = carry
            arriving, moved = self._hop((block, accumulator))
            dq_T, share = gradients(block, dq_T)
            return arriving, jax.tree.map(jnp.add, moved, share), dq_T

        dq_T = blockwise.empty_dq(problem, q)
        if self.shards == 1:
            dq_T, accumulator = gradients(block, dq_T)
        else:
            arriving = self._hop(block)
            dq_T, accumulator = gradients(block, dq_T)
            carry = jax.lax.fori_loop(1, self.shards - 1, step, (arriving, accumulator, dq_T))
            block, accumulator, dq_T = carry
            moved = self._hop(accumulator)
            dq_T, share = gradients(block, dq_T)
            accumulator = self._hop(jax.tree.map(jnp.add, moved, share))
        dq = blockwise.natural(blockwise.finish_dq(problem, dq_T, q), length)
        dk, dv = (x[:, :, :keys].swapaxes(1, 2) for x in accumulator)
        return dq, dk, dv

    def _key_block(self, problem, k, v, key_fields):
        k, v = (blockwise.keys_or_values(problem, x) for x in (k, v))
        return k, v, blockwise.fields(problem, key_fields, 1)

    def _hop(self, tree):
        ring = [(i, (i + 1) % self.shards) for i in range(self.shards)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, ring), tree)
