"""Exact attention on a GPU of the Hopper generation: both passes as kernels over lists of live blocks.

The algebra is that of lib/blockwise.py, in powers of two. Products take 16-bit numbers and give float32; widths are
filled up to whole rows of shared memory, lengths to whole blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from striate.lib import masks
from striate.lib.tiles import Partial, Tiled, natural, zeros
from striate.pallas_kernels.common import LN2, LOG2E, flatten, is_plain, stacked
from striate.pallas_kernels.gpu import backward, backward_adding, forward
from striate.pallas_kernels.gpu.parts import TILE, WIDEST, Language
from striate.pallas_kernels.gpu.rows import live_rows

LANES = 64  # numbers of 16 bits in a row of shared memory
PIECE = 8  # tokens: no fewer are copied at a time
PART = "_part"  # of the keys
MULTIPROCESSORS = 132  # of H100 and H200: as many rows of blocks have work at once


class _Table(NamedTuple):
    """A parameter of a score with several numbers for each head, which `scores.lookup` reads one by one."""

    numbers: tuple

    @property
    def shape(self):
        return (len(self.numbers),)

    def __getitem__(self, index):
        return self.numbers[index[-1]]


def _by_number(score):
    """A score whose tables (heads, n) are n parameters (heads,): the kernels know no others."""
    return jax.tree.map(lambda leaf: _Table(tuple(leaf.T)) if leaf.ndim > 1 else leaf, score)


def _of_tables(gradients):
    """Gives `gradients`, which knows no tables, and what comes back of the numbers of each as one array."""

    @functools.wraps(gradients)
    def of_tables(self, score, *arrays):
        def is_table(x):
            return isinstance(x, _Table)

        d_score, *others = gradients(self, _by_number(score), *arrays)
        together = jax.tree.map(lambda x: jnp.stack(x.numbers, 1) if is_table(x) else x, d_score, is_leaf=is_table)
        return together, *others

    return of_tables


@dataclass(frozen=True)
class Kernel(Tiled):
    """Attention by the kernels of forward.py and backward.py."""

    interpret: ClassVar[Any] = False
    unit: ClassVar[float] = LN2

    @classmethod
    def choose_tile(cls, mask, q_BTHD, k_BSKD):
        return TILE, TILE

    @classmethod
    def plan_attend(cls, mask, scale, q_BTHD, k_BSKD):
        if not Few.suits(q_BTHD, k_BSKD):
            return super().plan_attend(mask, scale, q_BTHD, k_BSKD)
        return dataclasses.replace(Few.plan(mask, scale, q_BTHD, k_BSKD), kernel=cls)

    def forward(self, score, q, k, v, query_fields, key_fields, partial, pages=None):
        """As for every Tiled; with `pages`, int32 (B, n), k and v are pages, (P, L, K, D) and (P, L, K, V)."""
        maximum, total, weighted = map(flatten, partial)
        given = self._given(score, q, k, v, query_fields, key_fields, 0 if pages is None else k.shape[1])
        *row, weighted = forward.forward(*given, (maximum, total, _wide(weighted)), pages)
        done = *row, weighted[..., : v.shape[-1]]
        return Partial(*(x.reshape(like.shape) for x, like in zip(done, partial, strict=True)))

    def attend(self, score, q, k, v, query_fields, key_fields):
        if not score.normalised:
            return super().attend(score, q, k, v, query_fields, key_fields)
        out, lse = forward.attend(*self._given(score, q, k, v, query_fields, key_fields))
        return out[..., : v.shape[-1]].reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])

    def _given(self, score, q, k, v, query_fields, key_fields, page: int = 0) -> tuple:
        """What the functions of forward.py take first; `page` is the tokens of a page."""
        arrays = _wide(flatten(q)), _wide(k), _wide(v)
        # Registers hold where in a table each pair looks, beside all else: half a block leaves room for that.
        longest = TILE // 2 if any(leaf.ndim > 1 for leaf in jax.tree.leaves(score)) else TILE
        tile = self.tile[0], min(self.tile[1], longest)
        scratch, k_tile = forward.Scratch.of(arrays[0], arrays[2], tile, page)
        language = self._language((tile[0], k_tile), score, arrays[0].shape[1], query_fields, key_fields)
        return language, scratch, self.interpret, *arrays

    def empty_sums(self, score, q):
        return zeros(q.shape, q), jax.tree.map(lambda x: zeros(x.shape, q), score)

    def finish_dq(self, sum_of_dq, q):
        return sum_of_dq

    def backward(self, score, q, k, v, d_out, lse, delta, query_fields, key_fields, sums):
        arrays = score, q, k, v, d_out, lse, delta, query_fields, key_fields
        d_score, dq, dk, dv = self.gradients(*arrays, jnp.float32)
        return jax.tree.map(jnp.add, sums, (dq, d_score)), dk, dv

    @_of_tables
    def gradients(self, score, q, k, v, d_out, lse, delta, query_fields, key_fields, dtype):
        # A row that sees nothing has lse = -inf; its logits are all -inf, and exp(-inf - 0) = 0 is what is meant.
        lse = LOG2E * jnp.where(jnp.isfinite(lse), lse, 0.0)
        rows = _wide(flatten(d_out.astype(q.dtype))), flatten(lse), flatten(delta)
        given = backward.Given(_wide(flatten(q)), _wide(k), _wide(v), *rows)
        fields, (leaves, tree) = (score, given.q.shape[1], query_fields, key_fields), jax.tree.flatten(score)
        adding = backward_adding.fits(given, self.tile, len(leaves)) and not _same_bits()
        dq, dk, dv, *shares = (self._adding if adding else self._apart)(given, fields, dtype)
        if shares:
            d_leaves = [x.sum((0, 2)) if leaf.ndim else x.sum() for x, leaf in zip(shares, leaves, strict=True)]
        else:
            d_leaves = [jnp.zeros_like(leaf) for leaf in leaves]
        dq = dq[..., : q.shape[-1]].reshape(q.shape).astype(dtype)
        return tree.unflatten(d_leaves), dq, dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]

    def _adding(self, given: backward.Given, fields: tuple, dtype):
        """(dq, dk, dv, what is given to the parameters ...) by one kernel."""
        q_tile, k_tile = self.tile
        scratch, columns = backward_adding.Scratch.of(given.q, given.v, k_tile, q_tile)
        language = self._language((columns, k_tile), *fields, transposed=True)
        return backward_adding.gradients(language, scratch, self.interpret, given, dtype)

    def _apart(self, given: backward.Given, fields: tuple, dtype):
        """The same by a kernel for queries and one for keys, or two for keys where both sums have no place in one."""
        q_tile, k_tile = self.tile
        scratch, columns = backward.Scratch.of(given.q, given.v, q_tile, k_tile, queries_pass=False)
        language = self._language((q_tile, columns), *fields)
        dq, *shares = backward.of_queries(language, scratch, self.interpret, given, dtype)
        scratch, columns = backward.Scratch.of(given.q, given.v, k_tile, q_tile, queries_pass=True)
        language = self._language((columns, k_tile), *fields, transposed=True)
        both = [("dk", "dv")] if given.k.shape[-1] + given.v.shape[-1] <= WIDEST else [("dk",), ("dv",)]
        parts = (backward.of_keys(language, scratch, self.interpret, given, wanted, dtype) for wanted in both)
        return dq, *(x for part in parts for x in part), *shares

    def _language(self, tile, score, heads: int, query_fields, key_fields, transposed: bool = False) -> Language:
        leaves, tree = jax.tree.flatten(_by_number(score))
        verdict = dataclasses.replace(self, tile=tile).verdicts(query_fields, key_fields)
        table = live_rows(verdict.swapaxes(1, 2) if transposed else verdict)
        names, *fields = stacked(self.mask, score, query_fields, key_fields)
        parameters = [] if is_plain(score) else [jnp.broadcast_to(leaf, (heads,)) for leaf in leaves]
        return Language(self.mask, self.scale, names, tree, is_plain(score), score.reads, (table, *fields, *parameters))


@dataclass(frozen=True)
class Few(Tiled):
    """`attend` for so few queries that those of all heads of a group make one row: its keys are read once for all.

    Where that makes fewer rows than there are multiprocessors, keys are dealt to several rows, and what these find is
    merged in float32. Keys and values are read where they lie, in pages or as they came, (B, S, K, D), which is a page
    for each row of the batch: to put them heads-major would take as long as to attend to them.
    """

    kernel: type[Kernel] = Kernel

    @staticmethod
    def suits(q_BTHD, k_BSKD) -> bool:
        """Whether the queries of a group are few enough."""
        return q_BTHD.shape[1] * q_BTHD.shape[2] // k_BSKD.shape[2] <= TILE

    @classmethod
    def takes_pages(cls, q_BTHD, k_pages, v_pages) -> bool:
        """Whether pages can be read where they lie: in whole tiles of shared memory."""
        widths = k_pages.shape[3], v_pages.shape[3]
        fits = max(widths) <= WIDEST and not any(width % LANES for width in widths) and k_pages.shape[1] % PIECE == 0
        return fits and cls.suits(q_BTHD, k_pages)

    @classmethod
    def choose_tile(cls, mask, q_BTHD, k_BSKD):
        return q_BTHD.shape[1], TILE

    @classmethod
    def over_pages(cls, mask, scale: float, q_BTHD, k_pages, pages: int, interpret: bool) -> Few:
        """For these shapes and a table of so many pages for each row of the batch."""
        whole = jax.ShapeDtypeStruct((len(q_BTHD), pages * k_pages.shape[1], *k_pages.shape[2:]), k_pages.dtype)
        return dataclasses.replace(cls.plan(mask, scale, q_BTHD, whole), kernel=Interpreted if interpret else Kernel)

    def keys_or_values(self, x_BSKD):
        return super().keys_or_values(x_BSKD).swapaxes(1, 2)

    def attend_pages(self, score, q_BTHD, k_pages, v_pages, table, q_tokens, k_tokens):
        """(out (B, T, H, V), lse (B, T, H)), float32, where keys lie in pages.

        Args:
          k_pages, v_pages: (P, L, K, D) and (P, L, K, V).
          table: int32 (B, n), the pages of a row; negative where there is none.
          q_tokens, k_tokens: fields (B, T) and (B, n L).
        """
        q, length = self.queries(score, q_BTHD, k_pages.shape[2]), q_BTHD.shape[1]
        sides = self.sides(score, q_tokens, k_tokens)
        # A block may have pages that are not there beside others: what stands for them is hidden, but has to be finite.
        table = jnp.clip(jnp.where(table < 0, table.max(1, keepdims=True), table), 0, len(k_pages) - 1)
        missing = -(-sides[1]["position"].shape[1] // k_pages.shape[1]) - table.shape[1]
        table = jnp.pad(table.astype(jnp.int32), ((0, 0), (0, missing)), mode="edge")
        return tuple(natural(x, length) for x in self._attend(score, q, k_pages, v_pages, *sides, table))

    def attend(self, score, q, k, v, query_fields, key_fields):
        return self._attend(score, q, k, v, query_fields, key_fields, jnp.arange(len(k), dtype=jnp.int32)[:, None])

    def _attend(self, score, q, k, v, query_fields, key_fields, pages):
        batch, heads, group, length, width = q.shape
        # Heads that have parameters of their own have rows of their own.
        together = 1 if any(leaf.ndim for leaf in jax.tree.leaves(score)) and not is_plain(score) else group
        rows, apart = together * length, group // together
        blocks = key_fields["position"].shape[1] // TILE
        parts = max(1, min(blocks, MULTIPROCESSORS // (batch * heads * apart)))

        def copies(x, axis):
            # What fills up a row sees what its last query sees, so that it needs no mask where that needs none.
            x = jnp.pad(x, [(0, TILE - rows if i == axis else 0) for i in range(x.ndim)], mode="edge")
            return jnp.concatenate([x] * parts, axis)

        def dealt(number, of):
            return jnp.broadcast_to(jnp.repeat(number, TILE), of["position"].shape)

        query_fields = {name: copies(jnp.tile(x, (1, together)), 1) for name, x in query_fields.items()}
        query_fields[PART] = dealt(jnp.arange(parts), query_fields)
        key_fields = {**key_fields, PART: dealt(jnp.arange(blocks) * parts // blocks, key_fields)}
        q = copies(q.reshape(batch, heads, apart, rows, width), 3)
        kernel = self.kernel(self.mask & masks.same(PART) if parts > 1 else self.mask, self.scale, (TILE, TILE))
        partial = kernel.forward(score, q, k, v, query_fields, key_fields, Partial.empty(q, v.shape[-1]), pages)
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


def _same_bits() -> bool:
    """Whether XLA is asked for programs whose reruns are equal to the bit."""
    flags = re.findall(
        r"--xla_gpu_(?:deterministic|exclude_nondeterministic)_ops(?:=(\w+))?", os.environ.get("XLA_FLAGS", "")
    )
    return any(value in ("", "true", "1") for value in flags)


def _wide(x):
    """The last axis filled up to whole rows of shared memory."""
    if x.shape[-1] > WIDEST:
        raise NotImplementedError(
            f"'pallas_gpu' takes a head_dim and a width of values up to {WIDEST}, and here is {x.shape[-1]}: use "
            "implementation='xla'."
        )
    missing = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
