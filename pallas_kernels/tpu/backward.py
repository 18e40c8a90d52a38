"""The backward pass of exact attention on a TPU: five products a tile, one pass over the live blocks.

One step of the grid is a live block of queries for a block of keys, transposed, so that four of the five products are
plain:

    P^T = 2^(K Q'^T - lse')           dV += P^T dO
    dS^T = P^T * (V dO^T - delta)     dK += ln(2) dS^T Q'       dQ += scale (dS^T)^T K

dK and dV stay in VMEM while their block of keys does. dQ is gathered in HBM: each step reads its block, adds to it and
writes it back, copies running beside the products of the steps before and after (`Gathered`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.lib.tiles import Tiled, zeros
from striate.pallas_kernels.common import LN2, is_plain, like, scored
from striate.pallas_kernels.tpu.blocks import blocks
from striate.pallas_kernels.tpu.chips import LANES
from striate.pallas_kernels.tpu.gathered import Gathered
from striate.pallas_kernels.tpu.parts import (
    NN,
    NT,
    TN,
    column,
    compiler_params,
    in_parts,
    of_parameters,
    parameters,
    product,
    spread,
)
from striate.pallas_kernels.tpu.steps import COLUMN, FIRST, LAST, bodies


def backward(kernel: Tiled, names, score, row, code, count, q, d_out, lse, delta, k, v, *rest):
    """One call, `rest` ending in (dq, dk, dv, the gradients of the score): these with what the steps listed give.

    That is added to dq and to those of the score, and put into dk and dv, whose dtype is free: a block of keys has all
    its steps in one call.
    """
    query_fields, key_fields, (*gradients, d_score) = rest
    steps = Steps.of(kernel, names, score, q, k, v)
    shares = [zeros(shape, q) for shape in steps.shares]
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    given = (q, d_out, lse, delta, k, v, query_fields, key_fields, *steps.leaves)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(k.shape[1], count, q.shape[1] // k.shape[1]),
        in_specs=[*steps.of_given, *[in_place] * 3],
        out_specs=[in_place, *steps.of_gradients, *steps.of_shares],
        scratch_shapes=steps.scratch_shapes,
    )
    outputs = (*gradients, *shares)
    dq, dk, dv, *shares = pl.pallas_call(
        functools.partial(steps.body, 0),
        grid_spec=spec,
        out_shape=[like(x) for x in outputs],
        input_output_aliases={2 + len(given) + i: i for i in range(3)},
        interpret=kernel.interpret,
        compiler_params=compiler_params("parallel", "arbitrary", "arbitrary"),
        name="striate_backward",
    )(row, code, *given, *gradients)
    return dq, dk, dv, jax.tree.map(jnp.add, d_score, of_parameters(score, shares))


class Steps(NamedTuple):
    """A grid of (key/value heads, steps listed, heads of a group): what a step does, which blocks it reads and writes.

    The gradients of the score's parameters are gathered for each key/value head, as arrays of the shapes `shares`.
    """

    body: Callable  # (first of the heads, row, code, blocks of what is given, three unused, of the results, scratch)
    leaves: list  # parameters of the score: given beside q, d_out, lse, delta, k, v, query_fields and key_fields
    of_given: list[pl.BlockSpec]
    of_gradients: list[pl.BlockSpec]  # dk and dv; dq is not in blocks
    of_shares: list[pl.BlockSpec]
    shares: list[tuple[int, ...]]
    scratch_shapes: list

    @classmethod
    def of(cls, kernel: Tiled, names, score, q, k, v) -> Steps:
        (_, heads, _, width), (q_tile, k_tile), kv_heads = q.shape, kernel.tile, k.shape[1]
        parts = blocks(k).backward
        lanes, group, per_row = min(LANES, q_tile), heads // kv_heads, k.shape[2] // k_tile

        def of_query(shape, index):
            def place(h, i, g, row, code):
                return row[i] // per_row, h * group + g, *index(code[i] // COLUMN)

            return pl.BlockSpec((None, None, *shape), place)

        def of_field(tile, block):
            return pl.BlockSpec(
                (None, len(names), tile), lambda h, i, g, row, code: (row[i] // per_row, 0, block(row[i], code[i]))
            )

        def of_keys(width):
            def place(h, i, g, row, code):
                return row[i] // per_row, h, row[i] % per_row, 0

            return pl.BlockSpec((None, None, k_tile, width), place)

        leaves, specs, rebuild = parameters(score, heads, lambda h, i, g, row, code: (h * group + g, 0, 0))
        shares = [(kv_heads, group, *x.shape[1:]) for x in leaves]
        of_shares = [pl.BlockSpec((None, *x[1:]), lambda h, i, g, row, code: (h, 0, 0, 0)) for x in shares]
        of_gradients = [of_keys(width), of_keys(v.shape[3])]
        of_given = [
            of_query((q_tile, width), lambda q: (q, 0)),
            of_query((q_tile, v.shape[3]), lambda q: (q, 0)),
            *[of_query((1, q_tile), lambda q: (0, q))] * 2,
            *of_gradients,
            of_field(q_tile, lambda row, code: code // COLUMN),
            of_field(k_tile, lambda row, code: row % per_row),
            *specs,
        ]
        scratch_shapes = [
            pltpu.VMEM((len(names), k_tile, lanes), jnp.int32),
            pltpu.VMEM((k_tile, width), jnp.float32),
            pltpu.VMEM((k_tile, v.shape[3]), jnp.float32),
            *Gathered.scratch_shapes((q_tile, width)),
        ]
        scale = None if is_plain(score) else kernel.scale
        body = functools.partial(_step, kernel.mask, scale, rebuild, len(leaves), names, parts, per_row)
        return cls(body, leaves, of_given, of_gradients, of_shares, shares, scratch_shapes)


def _step(mask, scale, rebuild, leaf_count, names, parts, per_row, first_head, row_ref, code_ref, *refs):
    q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, query_ref, key_ref, *refs = refs
    leaf_refs, (_, _, _, dq_hbm, dk_out, dv_out, *refs) = refs[:leaf_count], refs[leaf_count:]
    share_refs, (column_ref, dk_ref, dv_ref, *gathered) = refs[:leaf_count], refs[leaf_count:]
    step, member = pl.program_id(1), pl.program_id(2)
    steps, group = pl.num_programs(1), pl.num_programs(2)
    flags = code_ref[step] % COLUMN

    def place(ahead: int):
        """(batch, head, query block) of a step `ahead` of this one."""
        at = step * group + member + ahead
        i = jnp.minimum(at // group, steps - 1)
        head = (first_head + pl.program_id(0)) * group + at % group
        return row_ref[i] // per_row, head, code_ref[i] // COLUMN

    begin, end = (step == 0) & (member == 0), (step == steps - 1) & (member == group - 1)
    dq = Gathered(dq_hbm, *gathered)
    slot = dq.enter(place(0), place(1), begin, end)

    @pl.when((flags & FIRST != 0) & (member == 0))
    def _():
        for number in range(len(names)):
            column_ref[number] = column(key_ref[number : number + 1], column_ref.shape[2])
        dk_ref[...], dv_ref[...] = jnp.zeros_like(dk_ref), jnp.zeros_like(dv_ref)

    @pl.when(begin)
    def _():
        for ref in share_refs:
            ref[...] = jnp.zeros_like(ref)

    def compute(whole_rows, whole_keys, masked: bool):
        def products(rows, keys):
            return product(k_ref[keys], q_ref[rows], NT), product(v_ref[keys], d_out_ref[rows], NT)

        def gradients(rows, keys, pair):
            s, dp = pair
            query = {n: query_ref[i : i + 1, rows] for i, n in enumerate(names)}
            key = {n: spread(column_ref[i, keys], s.shape[1]) for i, n in enumerate(names)}
            weight = None
            if scale is not None:
                (s, weight), pull = jax.vjp(
                    lambda s, *blocks: scored(rebuild(blocks), s, query, key),
                    scale * s,
                    *[ref[...] for ref in leaf_refs],
                )
            if masked:
                query[None], key[None] = jnp.zeros((1, s.shape[1]), jnp.int32), jnp.zeros(s.shape, jnp.int32)
                s = mask.select(query, key, s, -jnp.inf)
            p = jnp.exp2(s - lse_ref[:, rows])
            ds = p * ((dp if weight is None else dp * weight) - delta_ref[:, rows])
            if scale is not None:
                # The score gives powers of two.
                ds, *shares = pull((LN2 * ds, None if weight is None else p * dp))
                for ref, share in zip(share_refs, shares, strict=True):
                    ref[member] += share[0]
            return (p if weight is None else p * weight).astype(v_ref.dtype), ds.astype(k_ref.dtype)

        def gather(rows, keys, p, ds):
            dv_ref[keys] += product(p, d_out_ref[rows], NN)
            dk_ref[keys] += product(ds, q_ref[rows], NN)
            dq.slots[slot, rows] += product(ds, k_ref[keys], TN)

        in_parts(parts.of(whole_rows, whole_keys), whole_rows, whole_keys, products, gradients, gather)

    for wanted, keys, rows, masked in bodies(flags, k_ref.shape[0], q_ref.shape[0]):
        pl.when(wanted)(functools.partial(compute, rows, keys, masked))

    @pl.when((flags & LAST != 0) & (member == group - 1))
    def _():
        dk_out[...] = ((LN2 if scale is None else scale) * dk_ref[...]).astype(dk_out.dtype)
        dv_out[...] = dv_ref[...].astype(dv_out.dtype)

    dq.leave(place(0), place(1), end)
