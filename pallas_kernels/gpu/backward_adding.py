"""The backward pass in one kernel, five products, whose sums of dQ are made in memory by many thread blocks.

A row of blocks is 128 keys, 64 for each of the two warpgroups that compute, and the blocks of queries that see them:

    P^T = 2^(c K Q^T - lse')     dS^T = P^T (V dO^T - delta)
    dV += P^T dO     dK += scale dS^T Q     dQ += scale dS K

The last product needs dS of all 128 keys: each warpgroup leaves its half in shared memory, and the columns of dQ are
dealt to the two, 64 at a time, in turns where there are no more than 64. They are added in float32 to what is in
memory, by the unit that copies, in whatever order thread blocks come: reruns differ in the last bits of dQ. What does
not fit, or shall not differ, has the two kernels of backward.py.

Source: Shah et al. 2024 (FlashAttention-3), section 3.4 and its appendix on the backward pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from striate.pallas_kernels.gpu import backward
from striate.pallas_kernels.gpu.backward import Given, Row
from striate.pallas_kernels.gpu.parts import (
    ACROSS,
    CONSUMERS,
    DOWN,
    MOST_REGISTERS,
    WIDEST,
    Language,
    Products,
    filled,
    keep,
    load,
    over_rows,
    store,
    tiled,
    transposed,
)

DQ_COLUMNS = 64  # of dQ that a warpgroup computes at a time
QUERIES = 64  # of a block; and as many keys has a warpgroup
MOST_PARAMETERS = 8  # of a score: fewer than the numbers of a table


class Scratch(NamedTuple):
    """Shared memory of a thread block: that of backward.Scratch, and what the sums of dQ take."""

    stay: plgpu.SMEM
    stay_values: plgpu.SMEM
    passing: plgpu.SMEM
    passing_values: plgpu.SMEM
    staying: plgpu.Barrier
    there: plgpu.Barrier
    values_there: plgpu.Barrier
    free: plgpu.Barrier
    lse: plgpu.SMEM
    delta: plgpu.SMEM
    ds: plgpu.SMEM  # (2, CONSUMERS, share, QUERIES), of two blocks in turn
    dq: plgpu.SMEM  # (CONSUMERS, QUERIES, DQ_COLUMNS) in float32
    ds_there: plgpu.Barrier
    done: plgpu.Barrier

    @classmethod
    def of(cls, q, v, rows: int, tile: int) -> tuple[Scratch, int]:
        """And the columns of a block."""
        beside = 2 * rows * QUERIES * q.dtype.itemsize + 4 * CONSUMERS * QUERIES * DQ_COLUMNS
        scratch, length = backward.Scratch.of(q, v, rows, tile, True, beside)
        ds = tiled(2, CONSUMERS, rows // CONSUMERS, length, dtype=q.dtype)
        dq = tiled(CONSUMERS, length, DQ_COLUMNS, dtype=jnp.float32)
        there, done = (plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=n) for n in (2, 1))
        return cls(*scratch, ds, dq, there, done), length


def fits(given: Given, tile: tuple[int, int], parameters: int) -> bool:
    """Whether registers hold all sums together, and blocks are of the size that dQ is made of."""
    together = given.k.shape[3] + given.v.shape[3] <= WIDEST and parameters <= MOST_PARAMETERS
    return together and tile[0] % QUERIES == 0 and tile[1] == CONSUMERS * QUERIES


def gradients(language: Language, scratch: Scratch, interpret, given: Given, dtype):
    """(dq (B, H, T, D) in float32, dk and dv in `dtype`, what every key gives to each parameter (B, H, S) ...)."""
    batch, heads = given.q.shape[:2]
    share = jax.ShapeDtypeStruct((batch, heads, given.k.shape[2]), jnp.float32)
    results = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (given.k, given.v)]
    dq = jax.new_ref(jnp.zeros(given.q.shape, jnp.float32))
    results += [share] * len(language.arrays[3:])
    dk, dv, *shares = backward.call(
        "attention_backward", _keys, given.k, language, scratch, interpret, given, results, dq
    )
    return language.scale * dq[...], dk, dv, *shares


def _keys(language: Language, products: Products, given: Given, results, scratch: Scratch, row: Row):
    @pl.when(row.warpgroup == CONSUMERS)
    def _():
        backward.copy_queries(language, given, scratch, row)

    @pl.when(row.warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(MOST_REGISTERS, action="increase")
        dq, dk, dv, *shares = results
        mine = row.batch, row.head, pl.ds(row.start, row.share)
        blocks = backward.fetch(scratch, row.warpgroup, given.k.at[mine], given.v.at[mine])
        step = functools.partial(_step, language, products, given, dq, scratch, row, *blocks)

        def of_member(member, sums):
            nothing = (filled((row.share,), 0.0, ACROSS),) * len(shares)
            *sums, given_to = backward.over_blocks(row, functools.partial(step, member), (*sums, nothing))
            keys = row.batch, row.head * given.group + member, pl.ds(row.start, row.share)
            for ref, x in zip(shares, given_to, strict=True):
                store(x, ref.at[keys])
            return tuple(sums)

        nothing = tuple(filled((row.share, ref.shape[3]), 0.0, plgpu.Layout.WGMMA) for ref in (dk, dv))
        of_k, of_v = lax.fori_loop(0, given.group, of_member, nothing)
        _until_both_are_done(scratch)  # dK takes the place of K, of which the other warpgroup reads this half
        keep(language.scale * of_k, dk.at[mine], blocks[0])
        keep(of_v, dv.at[mine], blocks[1])
        plgpu.wait_smem_to_gmem(0)


def _step(language, products, given: Given, dq, scratch: Scratch, row: Row, k_block, v_block, member, masked, i, sums):
    (ahead, length, width), turn = scratch.passing.shape, member * row.live + i
    slot, side, rows = lax.rem(turn, ahead), lax.rem(turn, 2), row.queries(language, given, length, member, i)
    passing, values, (dk, dv, shares) = scratch.passing.at[slot], scratch.passing_values.at[slot], sums
    beside = language.beside(row.batch, (rows[2].start, row.start), (row.share, length), masked, keys_are_rows=True)
    plgpu.barrier_wait(scratch.there.at[slot])
    plgpu.barrier_wait(scratch.values_there.at[slot])

    def use(s, then):
        lse, delta = (over_rows(load(ref.at[slot], DOWN), row.share) for ref in (scratch.lse, scratch.delta))
        parameters = language.parameters(rows[1])
        return backward.gradients(language, s, lse, lambda: (then(), delta), parameters, *beside, masked)

    p, ds, given_to = products.both((k_block, transposed(passing)), (v_block, transposed(values)), use)
    p, ds = p.astype(passing.dtype), ds.astype(passing.dtype)
    # Both have read what was here two blocks ago: dS of the last one, for which both waited, came after that.
    scratch.ds[side, row.warpgroup] = ds
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.ds_there.at[side])
    dk, dv = products.all_added([dk, dv], [(ds, passing), (p, values)])
    plgpu.barrier_arrive(scratch.free.at[slot])
    plgpu.barrier_wait(scratch.ds_there.at[side])
    parts = width // DQ_COLUMNS
    for n in range(0, parts, CONSUMERS):
        part = n + lax.rem(turn + row.warpgroup, CONSUMERS)
        add = functools.partial(_add_queries, products, scratch, row, side, part * DQ_COLUMNS, dq.at[rows])
        add() if n + CONSUMERS <= parts else pl.when(part < parts)(add)
    return dk, dv, tuple(share + x.sum(axis=1) for share, x in zip(shares, given_to, strict=True))


def _until_both_are_done(scratch: Scratch):
    plgpu.barrier_arrive(scratch.done)
    plgpu.barrier_wait(scratch.done)


def _add_queries(products: Products, scratch: Scratch, row: Row, side, first, dq):
    """Adds the columns of dQ from `first` on to what is in memory."""
    columns, block = pl.ds(first, DQ_COLUMNS), scratch.dq.at[row.warpgroup]
    keys = ((transposed(scratch.ds.at[side, n]), scratch.stay.at[n, :, columns]) for n in range(CONSUMERS))
    x = products.summed(*keys)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    block[...] = x
    plgpu.commit_smem()
    products.add_to(dq.at[:, columns], block)
