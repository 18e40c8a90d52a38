"""Exact attention on a TPU: both passes as kernels over lists of live blocks.

The algebra is that of lib/blockwise.py, in powers of two: queries come scaled by scale log2(e), so that
exp(s - m) = 2^(s' - m'); under a score they come as they are, and the logits are scaled. A tile is cut into parts, so
that what one part waits for (the matrix unit's latency, the greatest logit of a row) passes while another is computed:
the products of the next part are issued before the softmax of this one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from striate.lib.tiles import Partial, Tiled, block_length, zeros
from striate.pallas_kernels.common import LN2, LOG2E, flatten, stacked
from striate.pallas_kernels.tpu import backward, forward
from striate.pallas_kernels.tpu.blocks import blocks
from striate.pallas_kernels.tpu.chips import LANES
from striate.pallas_kernels.tpu.decode import Decode
from striate.pallas_kernels.tpu.parts import scaled
from striate.pallas_kernels.tpu.steps import live_steps, over_segments, quarters


@dataclass(frozen=True)
class Kernel(Tiled):
    """Attention by the kernels of forward.py and backward.py."""

    interpret: ClassVar[Any] = False
    unit: ClassVar[float] = LN2

    @classmethod
    def choose_tile(cls, mask, q_BTHD, k_BSKD):
        lengths = q_BTHD.shape[1], k_BSKD.shape[1]
        return tuple(block_length(n, most, LANES) for n, most in zip(lengths, blocks(k_BSKD).tile, strict=True))

    @classmethod
    def plan_attend(cls, mask, scale, q_BTHD, k_BSKD):
        if Decode.suits(q_BTHD):
            return Decode.over(mask, scale, q_BTHD, k_BSKD, cls.interpret)
        return super().plan_attend(mask, scale, q_BTHD, k_BSKD)

    def queries(self, score, q_BTHD, kv_heads):
        return self.rows(scaled(score, self.scale, q_BTHD), kv_heads)

    def forward(self, score, q, k, v, query_fields, key_fields, partial):
        maximum, total, weighted = map(flatten, partial)
        carry = maximum[:, :, None], total[:, :, None], weighted
        done = self._over_rows(forward.forward, score, q, k, v, query_fields, key_fields, carry)
        return Partial(*(x.reshape(like.shape) for x, like in zip(done, partial, strict=True)))

    def attend(self, score, q, k, v, query_fields, key_fields):
        if not score.normalised:
            return super().attend(score, q, k, v, query_fields, key_fields)
        (batch, heads, group, length, _), width = q.shape, v.shape[-1]
        nothing = zeros((batch, heads * group, length, width), q).astype(v.dtype)
        unseen = zeros((batch, heads * group, 1, length), q) - jnp.inf
        arrays = score, q, k, v, query_fields, key_fields
        out, lse = self._over_rows(forward.attend, *arrays, (nothing, unseen))
        return out.reshape(*q.shape[:-1], width), lse.reshape(q.shape[:-1])

    def _over_rows(self, function, score, q, k, v, query_fields, key_fields, results):
        steps = live_steps(quarters(self, query_fields, key_fields))
        names, query_fields, key_fields = stacked(self.mask, score, query_fields, key_fields)
        flat, kernel = flatten(q), one_at_a_time(function, self, names)

        def call(row, code, count, results):
            return kernel(score, row, code, count, flat, k, v, query_fields, key_fields, results)

        return over_segments(steps, call, results)

    def empty_sums(self, score, q):
        return zeros(q.shape, q), jax.tree.map(lambda x: zeros(x.shape, q), score)

    def finish_dq(self, sum_of_dq, q):
        return self.scale * sum_of_dq

    def backward(self, score, q, k, v, d_out, lse, delta, query_fields, key_fields, sums):
        return self._backward(score, q, k, v, d_out, lse, delta, query_fields, key_fields, sums, jnp.float32)

    def gradients(self, score, q, k, v, d_out, lse, delta, query_fields, key_fields, dtype):
        arrays = score, q, k, v, d_out, lse, delta, query_fields, key_fields
        (dq, d_score), dk, dv = self._backward(*arrays, self.empty_sums(score, q), dtype)
        return d_score, self.finish_dq(dq, q).astype(dtype), dk, dv

    def _backward(self, score, q, k, v, d_out, lse, delta, query_fields, key_fields, sums, dtype):
        steps = live_steps(quarters(self, query_fields, key_fields, transposed=True))
        names, query_fields, key_fields = stacked(self.mask, score, query_fields, key_fields)
        (dq, d_score), rows = sums, self._rows(q, d_out, lse, delta)
        carry = flatten(dq), zeros(k.shape, q).astype(dtype), zeros(v.shape, q).astype(dtype), d_score

        kernel = one_at_a_time(backward.backward, self, names)

        def call(row, code, count, carry):
            return kernel(score, row, code, count, *rows, k, v, query_fields, key_fields, carry)

        dq_flat, dk, dv, d_score = over_segments(steps, call, carry)
        return (dq_flat.reshape(dq.shape), d_score), dk, dv

    def _rows(self, q, d_out, lse, delta):
        # A row that sees nothing has lse = -inf; its logits are all -inf, and exp(-inf - 0) = 0 is what is meant.
        lse = LOG2E * jnp.where(jnp.isfinite(lse), lse, 0.0)
        return flatten(q), flatten(d_out), flatten(lse)[:, :, None], flatten(delta)[:, :, None]


class Interpreted(Kernel):
    """The same, step by step on any device."""

    interpret = True


def one_at_a_time(function, *static):
    """The function of the arrays, for jax.vmap as well."""
    # Pallas would add an axis to the grid, and leave what a kernel reads from HBM by itself as it was.
    return sequential_vmap(functools.partial(function, *static))
