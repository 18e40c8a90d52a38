"""Exact attention on a GPU of the Hopper generation: both passes as kernels over lists of live blocks.

The algebra is that of lib/blockwise.py, in powers of two. Products take 16-bit numbers and give float32; widths are
filled up to whole rows of shared memory, lengths to whole blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from striate.lib import masks
from striate.lib.tiles import INSIDE, Partial, Tiled, zeros
from striate.pallas_kernels.common import LN2, LOG2E, flatten, is_plain, stacked
from striate.pallas_kernels.gpu import backward, forward
from striate.pallas_kernels.gpu.parts import TILE, Language
from striate.pallas_kernels.gpu.rows import live_rows

LANES = 64  # numbers of 16 bits in a row of shared memory
MULTIPROCESSORS = 132  # of H100 and H200: as many rows of blocks have work at once
WIDEST = 256  # of a product of matrices; and of head_dim and value width together, where one kernel gathers dk and dv


@dataclass(frozen=True)
class Kernel(Tiled):
    """Attention by the kernels of forward.py and backward.py.

    Attributes:
      parts: how many rows of blocks there are of the same queries, each with a part of the keys.
    """

    interpret: ClassVar[Any] = False
    unit: ClassVar[float] = LN2

    parts: int = 1

    @classmethod
    def choose_tile(cls, mask, q_BTHD, k_BSKD):
        return TILE, TILE

    @classmethod
    def plan_attend(cls, mask, scale, q_BTHD, k_BSKD):
        if q_BTHD.shape[1] * q_BTHD.shape[2] // k_BSKD.shape[2] > TILE:
            return super().plan_attend(mask, scale, q_BTHD, k_BSKD)
        return dataclasses.replace(Few.plan(mask, scale, q_BTHD, k_BSKD), kernel=cls)

    def forward(self, score, q, k, v, query_fields, key_fields, partial):
        maximum, total, weighted = map(flatten, partial)
        arrays = _wide(flatten(q)), _wide(k), _wide(v)
        scratch, k_tile = forward.Scratch.of(arrays[0], arrays[2], self.tile)
        language = self._language((self.tile[0], k_tile), score, arrays[0].shape[1], query_fields, key_fields)
        carry = maximum, total, _wide(weighted)
        *row, weighted = forward.forward(language, scratch, self.interpret, *arrays, carry)
        done = *row, weighted[..., : v.shape[-1]]
        return Partial(*(x.reshape(like.shape) for x, like in zip(done, partial, strict=True)))

    def attend(self, score, q, k, v, query_fields, key_fields):
        if not score.normalised:
            return super().attend(score, q, k, v, query_fields, key_fields)
        arrays = _wide(flatten(q)), _wide(k), _wide(v)
        scratch, k_tile = forward.Scratch.of(arrays[0], arrays[2], self.tile)
        language = self._language((self.tile[0], k_tile), score, arrays[0].shape[1], query_fields, key_fields)
        out, lse = forward.attend(language, scratch, self.interpret, *arrays)
        return out[..., : v.shape[-1]].reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])

    def empty_sums(self, score, q):
        return zeros(q.shape, q), jax.tree.map(lambda x: zeros(x.shape, q), score)

    def finish_dq(self, sum_of_dq, q):
        return sum_of_dq

    def backward(self, score, q, k, v, d_out, lse, delta, query_fields, key_fields, sums):
        arrays = score, q, k, v, d_out, lse, delta, query_fields, key_fields
        d_score, dq, dk, dv = self.gradients(*arrays, jnp.float32)
        return jax.tree.map(jnp.add, sums, (dq, d_score)), dk, dv

    def gradients(self, score, q, k, v, d_out, lse, delta, query_fields, key_fields, dtype):
        # A row that sees nothing has lse = -inf; its logits are all -inf, and exp(-inf - 0) = 0 is what is meant.
        lse = LOG2E * jnp.where(jnp.isfinite(lse), lse, 0.0)
        rows = _wide(flatten(d_out.astype(q.dtype))), flatten(lse), flatten(delta)
        given = backward.Given(_wide(flatten(q)), _wide(k), _wide(v), *rows)
        heads, (q_tile, k_tile) = given.q.shape[1], self.tile
        scratch, columns = backward.Scratch.of(given.q, given.v, q_tile, k_tile)
        language = self._language((q_tile, columns), score, heads, query_fields, key_fields)
        dq, *shares = backward.of_queries(language, scratch, self.interpret, given, dtype)
        scratch, columns = backward.Scratch.of(given.q, given.v, k_tile, q_tile)
        language = self._language((columns, k_tile), score, heads, query_fields, key_fields, transposed=True)
        both = [("dk", "dv")] if given.k.shape[-1] + given.v.shape[-1] <= WIDEST else [("dk",), ("dv",)]
        parts = (backward.of_keys(language, scratch, self.interpret, given, wanted, dtype) for wanted in both)
        dk, dv = (x for part in parts for x in part)
        leaves, tree = jax.tree.flatten(score)
        if shares:
            d_leaves = [x.sum((0, 2)) if leaf.ndim else x.sum() for x, leaf in zip(shares, leaves, strict=True)]
        else:
            d_leaves = [jnp.zeros_like(leaf) for leaf in leaves]
        dq = dq[..., : q.shape[-1]].reshape(q.shape)
        return tree.unflatten(d_leaves), dq, dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]

    def _language(self, tile, score, heads: int, query_fields, key_fields, transposed: bool = False) -> Language:
        leaves, tree = jax.tree.flatten(score)
        if tables := [leaf.shape for leaf in leaves if leaf.ndim > 1]:
            raise NotImplementedError(
                f"'pallas_gpu' takes scores whose parameters are numbers, for all heads or for each, and this one has "
                f"tables {tables}: use implementation='xla'."
            )
        verdict = dataclasses.replace(self, tile=tile).verdicts(query_fields, key_fields)
        if self.parts > 1:
            row, column = (jax.lax.broadcasted_iota(jnp.int32, verdict.shape, axis) for axis in (1, 2))
            own = row % self.parts == column * self.parts // verdict.shape[2]
            verdict = jnp.where(own, verdict, masks.NONE)
        table = live_rows(verdict.swapaxes(1, 2) if transposed else verdict)
        names, *fields = stacked(self.mask, score, query_fields, key_fields)
        parameters = [] if is_plain(score) else [jnp.broadcast_to(leaf, (heads,)) for leaf in leaves]
        return Language(self.mask, self.scale, names, tree, is_plain(score), score.reads, (table, *fields, *parameters))


@dataclass(frozen=True)
class Few(Tiled):
    """`attend` for so few queries that those of all heads of a group make one row: its keys are read once for all.

    Where that makes fewer rows than there are multiprocessors, keys are dealt to several rows, and what these find is
    merged in float32.
    """

    kernel: type[Kernel] = Kernel

    @classmethod
    def choose_tile(cls, mask, q_BTHD, k_BSKD):
        return q_BTHD.shape[1], TILE

    def attend(self, score, q, k, v, query_fields, key_fields):
        batch, heads, group, length, width = q.shape
        # Heads that have parameters of their own have rows of their own.
        together = 1 if any(leaf.ndim for leaf in jax.tree.leaves(score)) and not is_plain(score) else group
        rows, apart = together * length, group // together
        parts = max(1, min(k.shape[2] // TILE, MULTIPROCESSORS // (batch * heads * apart)))

        def copies(x, axis):
            x = jnp.pad(x, [(0, TILE - rows if i == axis else 0) for i in range(x.ndim)])
            return jnp.concatenate([x] * parts, axis)

        fields = {name: copies(jnp.tile(x, (1, together)), 1) for name, x in query_fields.items()}
        q = copies(q.reshape(batch, heads, apart, rows, width), 3)
        kernel = self.kernel(self.mask & masks.query(INSIDE, 1, 1), self.scale, (TILE, TILE), parts)
        partial = kernel.forward(score, q, k, v, fields, key_fields, Partial.empty(q, v.shape[-1]))
        partial = [x.reshape(batch, heads, apart, parts, TILE, *x.shape[4:])[:, :, :, :, :rows] for x in partial]
        out, lse = _merged(*partial).finish(kernel.unit, score.normalised)
        return out.reshape(batch, heads, group, length, -1), lse.reshape(batch, heads, group, length)


def _merged(maximum, total, weighted) -> Partial:
    """That of all keys, from (B, K, G, parts, T) and (B, K, G, parts, T, V) of some each."""
    greatest = maximum.max(3, keepdims=True)
    factor = jnp.exp2(maximum - greatest)
    return Partial(greatest[:, :, :, 0], (factor * total).sum(3), (factor[..., None] * weighted).sum(3))


class Interpreted(Kernel):
    """The same, step by step on any device."""

    @property
    def interpret(self):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams()


def _wide(x):
    """The last axis filled up to whole rows of shared memory."""
    if x.shape[-1] > WIDEST:
        raise NotImplementedError(
            f"'pallas_gpu' takes a head_dim and a width of values up to {WIDEST}, and here is {x.shape[-1]}: use "
            "implementation='xla'."
        )
    missing = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
