"""The forward pass of exact attention on a GPU of the Hopper generation.

A thread block has a row of blocks: 128 queries, 64 for each of two warpgroups that compute, and goes through the blocks
of keys that the mask leaves it. A third warpgroup copies these to shared memory, some blocks ahead. For each of them

    S = Q K^T     m' = max(m, c rowmax S)     P = 2^(c S - m')
    l' = l 2^(m - m') + rowsum P              acc' = acc 2^(m - m') + P V

with c = scale log2(e). The two that compute take turns, so that the exponentials of one are computed while the matrix
unit has the products of the other. And each has its own exponentials while the unit has the P V of the block before:
step i asks for S of block i and P V of block i - 1 together, and goes on when it has S. The first block, which has none
before it, is always masked, so that it need not be there twice. `forward` takes carries (m, l, acc) and gives them
back, in float32; `attend` starts from nothing and gives out and lse.

Keys and values are heads-major, (B, K, S, D), or lie in pages of L tokens, (pages, L, K, D), that a table finds for the
tokens i L .. (i + 1) L - 1 of a row of the batch. A block is then copied in runs, each of one page.

Source: Shah et al. 2024 (FlashAttention-3), section 3.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from striate.lib.tiles import LOWEST
from striate.pallas_kernels.common import LN2
from striate.pallas_kernels.gpu.parts import (
    ACROSS,
    CONSUMERS,
    FEWEST_REGISTERS,
    MOST_REGISTERS,
    Language,
    Products,
    filled,
    keep,
    launch,
    load,
    over_columns,
    passing_length,
    stages,
    store,
    tiled,
    transposed,
)
from striate.pallas_kernels.gpu.rows import COLUMNS, LIVE, ROW, WHOLE


class Scratch(NamedTuple):
    """Shared memory of a thread block."""

    q: plgpu.SMEM  # (CONSUMERS, share, D)
    out: plgpu.SMEM | None  # (CONSUMERS, share, V); None where it has the place of q
    k: plgpu.SMEM  # (stages, k_tile, D)
    v: plgpu.SMEM  # (stages, k_tile, V)
    lse: plgpu.SMEM  # (CONSUMERS, share)
    q_there: plgpu.Barrier
    k_there: plgpu.Barrier
    v_there: plgpu.Barrier
    k_free: plgpu.Barrier
    v_free: plgpu.Barrier
    turn: plgpu.Barrier

    @classmethod
    def of(cls, q, v, tile: tuple[int, int], page: int = 0) -> tuple[Scratch, int]:
        """And the keys of a block, k_tile. `page` is the tokens of a page, where keys lie in pages."""
        width, value_width, dtype = q.shape[3], v.shape[3], q.dtype
        a_key, apart = (width + value_width) * dtype.itemsize, width != value_width
        share, staying = tile[0] // CONSUMERS, tile[0] * (4 + (a_key if apart else width * dtype.itemsize))
        k_tile = passing_length(tile[1], 128, staying, a_key)
        ahead = stages(staying, k_tile * a_key)
        there = plgpu.Barrier(num_arrivals=k_tile // math.gcd(page, k_tile), num_barriers=ahead)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=ahead)
        scratch = cls(
            tiled(CONSUMERS, share, width, dtype=dtype),
            tiled(CONSUMERS, share, value_width, dtype=dtype) if apart else None,
            tiled(ahead, k_tile, width, dtype=dtype),
            tiled(ahead, k_tile, value_width, dtype=dtype),
            plgpu.SMEM((CONSUMERS, share), jnp.float32),
            plgpu.Barrier(num_barriers=CONSUMERS),
            there,
            there,
            free,
            free,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        )
        return scratch, k_tile


def forward(language: Language, scratch: Scratch, interpret, q, k, v, carry, pages=None):
    """(m (B, H, T), l (B, H, T), acc (B, H, T, V)) with what the rows listed add to them.

    `pages`, int32 (B, n), is the table of pages, for all blocks of keys, where k and v are such.
    """
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in carry]
    return _call(language, scratch, interpret, (q, k, v, *([] if pages is None else [pages])), carry, results)


def attend(language: Language, scratch: Scratch, interpret, q, k, v):
    """(out (B, H, T, V), lse (B, H, T))."""
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype)
    return _call(language, scratch, interpret, (q, k, v), (), [out, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)])


def _call(language, scratch, interpret, arrays, carry, results):
    body = functools.partial(_row_of_blocks, language, Products(bool(interpret)), len(arrays), bool(carry))
    kernel = launch("attention_forward", body, results, language.table.shape[0], arrays[0].shape[1], scratch, interpret)
    return kernel(*language.arrays, *arrays, *carry)


def _row_of_blocks(language: Language, products: Products, arrays: int, resume: bool, *refs):
    count, scratch = len(language.arrays), refs[-1]
    language = language._replace(arrays=refs[:count])
    (q, k, v, *pages), others = refs[count : count + arrays], refs[count + arrays : -1]
    carry, results = (others[:3], others[3:]) if resume else ((), others)
    place, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    row, share = language.table[place, ROW], scratch.q.shape[1]
    per_row = q.shape[2] // (CONSUMERS * share)
    batch, first = lax.div(row, per_row), lax.rem(row, per_row) * CONSUMERS * share

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(FEWEST_REGISTERS, action="decrease")
        kv_head = lax.div(head, q.shape[1] // k.shape[2 if pages else 1])
        _copy_blocks(language.table, place, *_run(k.shape, pages, batch, kv_head, scratch.k.shape[1]), k, v, scratch)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(MOST_REGISTERS, action="increase")
        mine = batch, head, pl.ds(first + warpgroup * share, share)
        sums = _gather(language, products, place, mine, warpgroup, q, carry, scratch)
        if resume:
            for ref, x in zip(results, sums, strict=True):
                store(x, ref.at[mine])
        else:
            _finish(sums, mine, warpgroup, scratch, *results)


def _copy_blocks(table, place, length, where, k, v, scratch: Scratch):
    ahead, k_tile = scratch.k.shape[:2]

    @pl.loop(0, jnp.maximum(table[place, LIVE], 1))
    def _(i):
        slot = lax.rem(i, ahead)
        block = table[place, COLUMNS + i]
        for ref, into, there, free in (
            (k, scratch.k, scratch.k_there, scratch.k_free),
            (v, scratch.v, scratch.v_there, scratch.v_free),
        ):
            pl.when(i >= ahead)(functools.partial(plgpu.barrier_wait, free.at[slot]))

            @pl.loop(0, k_tile // length)
            def _(number, ref=ref, into=into, there=there):
                own = pl.ds(number * length, length)
                plgpu.copy_gmem_to_smem(ref.at[where(block, number)], into.at[slot, own], there.at[slot])


def _run(shape, pages, batch, kv_head, k_tile: int):
    """(How many keys of a block lie in one piece, where in k and in v a block has its first, second, ... of these)."""
    if not pages:
        return k_tile, lambda block, _: (batch, kv_head, pl.ds(block * k_tile, k_tile))
    (table,), page = pages, shape[1]
    length = math.gcd(page, k_tile)

    def where(block, number):
        run = block * (k_tile // length) + number
        within = pl.ds(lax.rem(run, page // length) * length, length)
        return table[batch, lax.div(run, page // length)], within, kv_head

    return length, where


def _gather(language: Language, products: Products, place, mine, warpgroup, q, carry, scratch: Scratch):
    """(m, l, acc) of the rows of one warpgroup after all blocks."""
    table, (batch, _, rows), parameters = language.table, mine, language.parameters(mine[1])
    (ahead, k_tile, value_width), factor = scratch.v.shape, language.factor
    q_block = scratch.q.at[warpgroup]
    plgpu.copy_gmem_to_smem(q.at[mine], q_block, scratch.q_there.at[warpgroup])
    plgpu.barrier_wait(scratch.q_there.at[warpgroup])

    def meet():
        # Where one block has place, what a warpgroup waits for comes only after the other has gone on: no turns.
        if ahead > 1:
            plgpu.barrier_arrive(scratch.turn)
            plgpu.barrier_wait(scratch.turn)

    def weigh(masked, i, s, maximum, total):
        """(m, l, P) after block i, and the factor of what was gathered before it."""
        slot, starts = lax.rem(i, ahead), (rows.start, table[place, COLUMNS + i] * k_tile)
        plgpu.barrier_arrive(scratch.k_free.at[slot])
        s, weight = language.logits(s, parameters, *language.beside(batch, starts, s.shape, masked), masked)
        greatest = jnp.maximum(maximum, factor * s.max(axis=1))
        decay = jnp.exp2(maximum - greatest)
        p = jnp.exp2(factor * s - over_columns(greatest, k_tile))
        total = total * decay + p.sum(axis=1)
        meet()
        return greatest, total, p if weight is None else p * weight, decay

    def first(maximum, total, weighted):
        plgpu.barrier_wait(scratch.k_there.at[0])
        s = products.fresh(q_block, transposed(scratch.k.at[0]), meet)
        maximum, total, p, decay = weigh(True, 0, s, maximum, total)
        return maximum, total, p.astype(scratch.v.dtype), weighted * over_columns(decay, value_width)

    def step(masked, i, sums):
        maximum, total, p, weighted = sums
        slot, before = lax.rem(i, ahead), lax.rem(i - 1, ahead)
        plgpu.barrier_wait(scratch.k_there.at[slot])
        plgpu.barrier_wait(scratch.v_there.at[before])

        def use(s, then):
            *row, p, decay = weigh(masked, i, s, maximum, total)
            weighted = then()
            plgpu.barrier_arrive(scratch.v_free.at[before])
            # Not before `then`: its product reads the registers of the P that this one takes the place of.
            return *row, p.astype(scratch.v.dtype), weighted * over_columns(decay, value_width)

        factors = (q_block, transposed(scratch.k.at[slot])), (p, scratch.v.at[before])
        return products.both(*factors, use, weighted, meet)

    def last(i, sums):
        maximum, total, p, weighted = sums
        plgpu.barrier_wait(scratch.v_there.at[lax.rem(i, ahead)])
        return maximum, total, products.added(weighted, p, scratch.v.at[lax.rem(i, ahead)])

    layouts = ACROSS, ACROSS, plgpu.Layout.WGMMA
    if carry:
        sums = tuple(load(ref.at[mine], layout) for ref, layout in zip(carry, layouts, strict=True))
    else:
        shapes, values = [(rows.size,), (rows.size,), (rows.size, value_width)], (LOWEST, 0.0, 0.0)
        sums = tuple(map(filled, shapes, values, layouts))
    # One warpgroup meets once before, the other once after: each multiplies while the other has its exponentials.
    pl.when(warpgroup == 1)(meet)
    whole, live = jnp.maximum(table[place, WHOLE], 1), jnp.maximum(table[place, LIVE], 1)
    sums = first(*sums)
    sums = lax.fori_loop(1, whole, functools.partial(step, False), sums)
    sums = lax.fori_loop(whole, live, functools.partial(step, True), sums)
    sums = last(live - 1, sums)
    pl.when(warpgroup == 0)(meet)
    return sums


def _finish(sums, mine, warpgroup, scratch: Scratch, out, lse):
    maximum, total, weighted = sums
    seen, width = total > 0, weighted.shape[1]
    total = jnp.where(seen, total, 1.0)
    out_block = (scratch.q if scratch.out is None else scratch.out).at[warpgroup]
    keep(weighted / over_columns(total, width), out.at[mine], out_block)
    keep(jnp.where(seen, LN2 * maximum + jnp.log(total), -jnp.inf), lse.at[mine], scratch.lse.at[warpgroup])
    plgpu.wait_smem_to_gmem(0)
