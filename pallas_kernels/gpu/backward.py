"""The backward pass of exact attention on a GPU of the Hopper generation, in two kernels and always in the same order.

`of_queries` has the row of blocks of the forward pass:

    P = 2^(c S - lse')     dS = P (dO V^T - delta)     dQ += scale dS K

and `of_keys` its transpose, 128 keys, through the blocks of queries that see them, of every head of their group:

    P^T = 2^(c K Q^T - lse')     dV += P^T dO     dS^T = P^T (V dO^T - delta)     dK += scale dS^T Q

S and dP are computed twice, seven products for five, and in return nothing is added to by two thread blocks: no atomic
sums, whose order differs from run to run. The two warpgroups that compute have 64 rows each and do not take turns; a
third one copies. P is made before dP is, so that registers need not hold log-sum-exp and delta at once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from striate.pallas_kernels.common import LN2
from striate.pallas_kernels.gpu.parts import (
    ACROSS,
    CONSUMERS,
    DOWN,
    FEWEST_REGISTERS,
    MOST_REGISTERS,
    Language,
    Products,
    filled,
    keep,
    launch,
    load,
    over_columns,
    over_rows,
    passing_length,
    stages,
    store,
    tiled,
    transposed,
)
from striate.pallas_kernels.gpu.rows import COLUMNS, LIVE, ROW, WHOLE


class Scratch(NamedTuple):
    """Shared memory of a thread block. Two arrays stay, those of its rows, and two pass by."""

    stay: plgpu.SMEM  # q or k (CONSUMERS, share, D)
    stay_values: plgpu.SMEM  # dO or v (CONSUMERS, share, V)
    passing: plgpu.SMEM  # k or q (stages, columns, D)
    passing_values: plgpu.SMEM  # v or dO (stages, columns, V)
    staying: plgpu.Barrier
    there: plgpu.Barrier
    values_there: plgpu.Barrier
    free: plgpu.Barrier
    lse: plgpu.SMEM | None  # (stages, columns), where queries pass by; and so is delta
    delta: plgpu.SMEM | None

    @classmethod
    def of(cls, q, v, rows: int, tile: int, queries_pass: bool, beside: int = 0) -> tuple[Scratch, int]:
        """And the columns of a block, of a tile of so many; `beside` bytes are for others."""
        width, value_width, dtype = q.shape[3], v.shape[3], q.dtype
        share, a_token = rows // CONSUMERS, (width + value_width) * dtype.itemsize
        length = passing_length(tile, 64, rows * a_token + beside, a_token)
        ahead = stages(rows * a_token + beside, length * a_token)
        a_row = plgpu.SMEM((ahead, length), jnp.float32) if queries_pass else None
        there = plgpu.Barrier(num_arrivals=2 if queries_pass else 1, num_barriers=ahead)
        scratch = cls(
            tiled(CONSUMERS, share, width, dtype=dtype),
            tiled(CONSUMERS, share, value_width, dtype=dtype),
            tiled(ahead, length, width, dtype=dtype),
            tiled(ahead, length, value_width, dtype=dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            there,
            there,
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=ahead),
            a_row,
            a_row,
        )
        return scratch, length


class Given(NamedTuple):
    """What both kernels are given."""

    q: jax.Array  # (B, H, T, D)
    k: jax.Array  # (B, K, S, D)
    v: jax.Array  # (B, K, S, V)
    d_out: jax.Array  # (B, H, T, V)
    lse: jax.Array  # (B, H, T), in powers of two
    delta: jax.Array  # (B, H, T)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def of_queries(language: Language, scratch: Scratch, interpret, given: Given, dtype):
    """(dq (B, H, T, D) in `dtype`, what every row gives to the gradient of each parameter (B, H, T) ...)."""
    shares = [jax.ShapeDtypeStruct(given.lse.shape, jnp.float32)] * len(language.arrays[3:])
    results = [jax.ShapeDtypeStruct(given.q.shape, dtype), *shares]
    return call("attention_dq", _queries, given.q, language, scratch, interpret, given, results)


def of_keys(language: Language, scratch: Scratch, interpret, given: Given, wanted: tuple[str, ...], dtype):
    """Those wanted of "dk" (B, K, S, D) and "dv" (B, K, S, V), in `dtype`; the table has keys for rows."""
    shapes = {"dk": given.k.shape, "dv": given.v.shape}
    results = [jax.ShapeDtypeStruct(shapes[name], dtype) for name in wanted]
    return call(
        "attention_" + "_".join(wanted),
        functools.partial(_keys, wanted),
        given.k,
        language,
        scratch,
        interpret,
        given,
        results,
    )


def call(name: str, body, rows, language: Language, scratch, interpret, given: Given, results, *sums):
    """The kernel of a row of blocks of `rows`, the queries or the keys of `given`; `sums` are references it adds to."""
    body = functools.partial(_row_of_blocks, body, rows.shape[2], language, Products(bool(interpret)))
    kernel = launch(name, body, results, language.table.shape[0], rows.shape[1], scratch, interpret)
    return kernel(*language.arrays, *given, *sums)


class Row(NamedTuple):
    """The row of blocks of one thread block, as one of its warpgroups has it."""

    place: Any  # in the table
    batch: Any
    first: Any  # its first token
    head: Any
    whole: Any  # how many of its blocks need no mask
    live: Any  # how many have work
    warpgroup: Any
    share: int  # rows of the warpgroup

    @property
    def start(self):
        """The first token of the warpgroup."""
        return self.first + self.warpgroup * self.share

    def queries(self, language: Language, given: Given, length: int, member, i):
        """Where the i-th block of queries of a row of keys is, of the head that is `member` of the group."""
        start = language.table[self.place, COLUMNS + i] * length
        return self.batch, self.head * given.group + member, pl.ds(start, length)


def _row_of_blocks(body, length: int, language: Language, products: Products, *refs):
    count, place = len(language.arrays), lax.axis_index("row")
    given, (*results, scratch) = Given(*refs[count : count + 6]), refs[count + 6 :]
    language = language._replace(arrays=refs[:count])
    number, whole, live = (language.table[place, n] for n in (ROW, WHOLE, LIVE))
    share, warpgroup = scratch.stay.shape[1], lax.axis_index("warpgroup")
    tile = CONSUMERS * share
    batch, first = lax.div(number, length // tile), lax.rem(number, length // tile) * tile
    row = Row(place, batch, first, lax.axis_index("head"), whole, live, warpgroup, share)
    body(language, products, given, results, scratch, row)


def _copy_blocks(scratch: Scratch, count, block):
    """What the third warpgroup does: block(i) is what passes by the i-th time, in the order of `places`."""
    plgpu.set_max_registers(FEWEST_REGISTERS, action="decrease")
    ahead, barriers = scratch.passing.shape[0], (scratch.there, scratch.values_there) * 2
    places = scratch.passing, scratch.passing_values, scratch.lse, scratch.delta

    @pl.loop(0, count)
    def _(i):
        slot = lax.rem(i, ahead)
        pl.when(i >= ahead)(functools.partial(plgpu.barrier_wait, scratch.free.at[slot]))
        for x, place, barrier in zip(block(i), places, barriers, strict=False):
            plgpu.copy_gmem_to_smem(x, place.at[slot], barrier.at[slot])


def fetch(scratch: Scratch, warpgroup, *arrays):
    """The blocks that stay with one warpgroup, in shared memory."""
    blocks = scratch.stay.at[warpgroup], scratch.stay_values.at[warpgroup]
    for x, block in zip(arrays, blocks, strict=True):
        plgpu.copy_gmem_to_smem(x, block, scratch.staying.at[warpgroup])
    plgpu.barrier_wait(scratch.staying.at[warpgroup])
    return blocks


def copy_queries(language: Language, given: Given, scratch: Scratch, row: Row):
    """The same for a row of keys: the blocks of queries that see them, head by head."""

    def block(i):
        rows = row.queries(language, given, scratch.passing.shape[1], lax.div(i, row.live), lax.rem(i, row.live))
        return tuple(x.at[rows] for x in (given.q, given.d_out, given.lse, given.delta))

    _copy_blocks(scratch, given.group * row.live, block)


def over_blocks(row: Row, step, sums):
    """sums after step(masked, i, sums) of every block of the row."""
    sums = lax.fori_loop(0, row.whole, functools.partial(step, False), sums)
    return lax.fori_loop(row.whole, row.live, functools.partial(step, True), sums)


def _queries(language: Language, products: Products, given: Given, results, scratch: Scratch, row: Row):
    (ahead, length, width), kv_head = scratch.passing.shape, lax.div(row.head, given.group)

    @pl.when(row.warpgroup == CONSUMERS)
    def _():
        def block(i):
            keys = row.batch, kv_head, pl.ds(language.table[row.place, COLUMNS + i] * length, length)
            return given.k.at[keys], given.v.at[keys]

        _copy_blocks(scratch, row.live, block)

    @pl.when(row.warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(MOST_REGISTERS, action="increase")
        mine = row.batch, row.head, pl.ds(row.start, row.share)
        q_block, d_out_block = fetch(scratch, row.warpgroup, given.q.at[mine], given.d_out.at[mine])
        lse, delta = (load(ref.at[mine], ACROSS) for ref in (given.lse, given.delta))
        parameters = language.parameters(row.head)

        def step(masked, i, sums):
            dq, *shares = sums
            slot, starts = lax.rem(i, ahead), (row.start, language.table[row.place, COLUMNS + i] * length)
            plgpu.barrier_wait(scratch.there.at[slot])
            s = products.fresh(q_block, transposed(scratch.passing.at[slot]))

            def of_values():
                plgpu.barrier_wait(scratch.values_there.at[slot])
                dp = products.fresh(d_out_block, transposed(scratch.passing_values.at[slot]))
                return dp, over_columns(delta, length)

            beside = language.beside(row.batch, starts, s.shape, masked)
            _, ds, given_to = gradients(language, s, over_columns(lse, length), of_values, parameters, *beside, masked)
            dq = products.added(dq, ds.astype(scratch.passing.dtype), scratch.passing.at[slot])
            plgpu.barrier_arrive(scratch.free.at[slot])
            return dq, *(share + x.sum(axis=1) for share, x in zip(shares, given_to, strict=True))

        sums = (
            filled((row.share, width), 0.0, plgpu.Layout.WGMMA),
            *[filled((row.share,), 0.0, ACROSS)] * len(parameters),
        )
        dq, *shares = over_blocks(row, step, sums)
        keep(language.scale * dq, results[0].at[mine], q_block)
        for ref, x in zip(results[1:], shares, strict=True):
            store(x, ref.at[mine])
        plgpu.wait_smem_to_gmem(0)


def _keys(wanted, language: Language, products: Products, given: Given, results, scratch: Scratch, row: Row):
    ahead, length, _ = scratch.passing.shape

    @pl.when(row.warpgroup == CONSUMERS)
    def _():
        copy_queries(language, given, scratch, row)

    @pl.when(row.warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(MOST_REGISTERS, action="increase")
        mine = row.batch, row.head, pl.ds(row.start, row.share)
        k_block, v_block = fetch(scratch, row.warpgroup, given.k.at[mine], given.v.at[mine])

        def step(member, masked, i, sums):
            slot = lax.rem(member * row.live + i, ahead)
            rows = row.queries(language, given, length, member, i)
            passing, values = scratch.passing.at[slot], scratch.passing_values.at[slot]
            plgpu.barrier_wait(scratch.there.at[slot])
            s = products.fresh(k_block, transposed(passing))

            def of_row(ref):
                return over_rows(load(ref.at[slot], DOWN), row.share)

            def of_values():
                plgpu.barrier_wait(scratch.values_there.at[slot])
                if "dk" not in wanted:
                    return jnp.zeros(s.shape, jnp.float32), 0.0
                return products.fresh(v_block, transposed(values)), of_row(scratch.delta)

            beside = language.beside(row.batch, (rows[2].start, row.start), s.shape, masked, keys_are_rows=True)
            p, ds, _ = gradients(
                language, s, of_row(scratch.lse), of_values, language.parameters(rows[1]), *beside, masked
            )
            factors = {"dk": (ds, passing), "dv": (p, values)}
            sums = tuple(
                products.added(x, factors[name][0].astype(passing.dtype), factors[name][1])
                for name, x in zip(wanted, sums, strict=True)
            )
            plgpu.barrier_arrive(scratch.free.at[slot])
            return sums

        sums = tuple(filled((row.share, ref.shape[3]), 0.0, plgpu.Layout.WGMMA) for ref in results)
        sums = lax.fori_loop(
            0, given.group, lambda member, sums: over_blocks(row, functools.partial(step, member), sums), sums
        )
        blocks = {"dk": k_block, "dv": v_block}
        for name, ref, x in zip(wanted, results, sums, strict=True):
            keep(language.scale * x if name == "dk" else x, ref.at[mine], blocks[name])
        plgpu.wait_smem_to_gmem(0)


def gradients(language: Language, s, lse, of_values, parameters, query, key, masked: bool):
    """(p with its weight, dS of the scaled products, what is given to the parameters) of a block.

    of_values() gives dP and delta, when p is there.
    """
    if language.plain:
        s, _ = language.logits(s, parameters, query, key, masked)
        p = jnp.exp2(language.factor * s - lse)
        dp, delta = of_values()
        return p, p * (dp - delta), ()
    (t, weight), pull = language.pulled(s, parameters, query, key)
    p = jnp.exp2((language.shown(t, query, key) if masked else t) - lse)
    dp, delta = of_values()
    dt = p * ((dp if weight is None else dp * weight) - delta)
    # The score gives powers of two.
    ds, shares = pull((LN2 * dt, None if weight is None else p * dp))
    return (p if weight is None else p * weight), ds, shares
