"""The forward pass of exact attention on a TPU.

One step of the grid is a live block of keys, rows on sublanes and keys on lanes:

    S = Q' K^T     m' = max(m, rowmax S)     P = 2^(S - m')     l' = l 2^(m - m') + P     acc' = acc 2^(m - m') + P V

m is kept once per lane, so that it meets S without a broadcast; l is kept as one sum for every lane, and the lanes are
added up when a row is done. `forward` takes carries (m, l, acc) and gives them back, in float32 and in place; `attend`
starts from nothing and gives out and lse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.lib.tiles import LOWEST, Tiled
from striate.pallas_kernels.common import LN2, is_plain, like, scored
from striate.pallas_kernels.tpu.blocks import blocks
from striate.pallas_kernels.tpu.chips import LANES
from striate.pallas_kernels.tpu.parts import NN, NT, column, compiler_params, in_parts, parameters, product, spread
from striate.pallas_kernels.tpu.steps import COLUMN, FIRST, LAST, bodies


def forward(kernel: Tiled, names, score, row, code, count, q, k, v, query_fields, key_fields, carry):
    """One call: (m (B, H, 1, T), l (B, H, 1, T), acc (B, H, T, V)) with what the steps listed add to them."""
    arrays = score, row, code, count, q, k, v, query_fields, key_fields
    return _call(kernel, names, *arrays, carry, resume=True)


def attend(kernel: Tiled, names, score, row, code, count, q, k, v, query_fields, key_fields, results):
    """One call: (out (B, H, T, V), lse (B, H, 1, T)), those of the rows listed put into the ones given."""
    arrays = score, row, code, count, q, k, v, query_fields, key_fields
    return _call(kernel, names, *arrays, results, resume=False)


def _call(kernel, names, score, row, code, count, q, k, v, query_fields, key_fields, results, resume: bool):
    steps = Steps.of(kernel, names, score, q, k, v, resume)
    given = (q, k, v, query_fields, key_fields, *steps.leaves)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(q.shape[1], count),
        in_specs=[*steps.of_given, *(steps.of_results if resume else [pl.BlockSpec(memory_space=pl.ANY)] * 2)],
        out_specs=steps.of_results,
        scratch_shapes=steps.scratch_shapes,
    )
    return pl.pallas_call(
        steps.body,
        grid_spec=spec,
        out_shape=[like(x) for x in results],
        input_output_aliases={2 + len(given) + i: i for i in range(len(results))},
        interpret=kernel.interpret,
        compiler_params=compiler_params("parallel", "arbitrary"),
        name="striate_forward",
    )(row, code, *given, *results)


class Steps(NamedTuple):
    """A grid of (heads, steps listed): what a step does, and which blocks it reads and writes."""

    body: Callable  # (row, code, blocks of what is given, of the results before and after, scratch)
    leaves: list  # parameters of the score: given beside q, k, v, query_fields and key_fields
    of_given: list[pl.BlockSpec]
    of_results: list[pl.BlockSpec]
    scratch_shapes: list

    @classmethod
    def of(cls, kernel: Tiled, names, score, q, k, v, resume: bool) -> Steps:
        (_, heads, length, width), (q_tile, k_tile) = q.shape, kernel.tile
        parts = blocks(k).forward
        lanes, group, per_row = min(LANES, k_tile), heads // k.shape[1], length // q_tile

        def of_row(shape, index):
            return pl.BlockSpec(
                (None, None, *shape), lambda h, i, row, code: (row[i] // per_row, h, *index(row[i] % per_row))
            )

        def of_keys(width):
            return pl.BlockSpec(
                (None, None, k_tile, width),
                lambda h, i, row, code: (row[i] // per_row, h // group, code[i] // COLUMN, 0),
            )

        leaves, specs, rebuild = parameters(score, heads, lambda h, i, row, code: (h, 0, 0))
        number, array = of_row((1, q_tile), lambda q: (0, q)), of_row((q_tile, v.shape[3]), lambda q: (q, 0))
        of_given = [
            of_row((q_tile, width), lambda q: (q, 0)),
            of_keys(width),
            of_keys(v.shape[3]),
            pl.BlockSpec((None, len(names), q_tile), lambda h, i, row, code: (row[i] // per_row, 0, row[i] % per_row)),
            pl.BlockSpec((None, len(names), k_tile), lambda h, i, row, code: (row[i] // per_row, 0, code[i] // COLUMN)),
            *specs,
        ]
        scratch_shapes = [
            pltpu.VMEM((len(names), q_tile, lanes), jnp.int32),
            *[pltpu.VMEM((q_tile, lanes), jnp.float32)] * 2,
            pltpu.VMEM((q_tile, v.shape[3]), jnp.float32),
        ]
        scale = None if is_plain(score) else kernel.scale
        ends = (_resume, _pause) if resume else (_begin, _finish)
        body = functools.partial(_step, kernel.mask, scale, rebuild, len(leaves), names, parts, *ends)
        return cls(body, leaves, of_given, [number, number, array] if resume else [array, number], scratch_shapes)


class Sums(NamedTuple):
    """What is gathered while a row lasts, in VMEM."""

    maximum: Any  # (rows, lanes), in powers of two, the same in every lane
    total: Any  # (rows, lanes), a sum for every lane
    weighted: Any  # (rows, V)


def _begin(sums: Sums, *_):
    sums.maximum[...] = jnp.full_like(sums.maximum, LOWEST)
    sums.total[...], sums.weighted[...] = jnp.zeros_like(sums.total), jnp.zeros_like(sums.weighted)


def _finish(sums: Sums, out, lse):
    total = jnp.broadcast_to(sums.total[...].sum(1, keepdims=True), sums.total.shape)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out[...] = (sums.weighted[...] / spread(total, out.shape[1])).astype(out.dtype)
    lse[...] = jnp.where(seen, LN2 * sums.maximum[...] + jnp.log(total), -jnp.inf).T[:1]


def _resume(sums: Sums, maximum, total, weighted):
    shape = sums.maximum.shape
    # In one lane alone: a sum over lanes that are all alike rounds the same way again and again.
    first = jax.lax.broadcasted_iota(jnp.int32, shape, 1) == 0
    sums.maximum[...] = column(maximum[...], shape[1])
    sums.total[...] = jnp.where(first, column(total[...], shape[1]), 0.0)
    sums.weighted[...] = weighted[...]


def _pause(sums: Sums, maximum, total, weighted):
    maximum[...], total[...] = sums.maximum[...].T[:1], sums.total[...].T.sum(0, keepdims=True)
    weighted[...] = sums.weighted[...]


def _step(mask, scale, rebuild, leaf_count, names, parts, begin, end, row_ref, code_ref, q_ref, k_ref, v_ref, *refs):
    query_ref, key_ref, *refs = refs
    leaf_refs, (*results, column_ref, m_ref, l_ref, acc_ref) = refs[:leaf_count], refs[leaf_count:]
    before, after = results[: len(results) // 2], results[len(results) // 2 :]
    sums, flags, lanes = Sums(m_ref, l_ref, acc_ref), code_ref[pl.program_id(1)] % COLUMN, m_ref.shape[1]

    @pl.when(flags & FIRST != 0)
    def _():
        for number in range(len(names)):
            column_ref[number] = column(query_ref[number : number + 1], lanes)
        begin(sums, *before)

    def compute(whole_rows, whole_keys, masked: bool):
        score = rebuild([ref[...] for ref in leaf_refs])

        def logits(rows, keys):
            return product(q_ref[rows], k_ref[keys], NT)

        def softmax(rows, keys, s):
            query = {n: spread(column_ref[i, rows], s.shape[1]) for i, n in enumerate(names)}
            key = {n: key_ref[i : i + 1, keys] for i, n in enumerate(names)}
            s, weight = (s, None) if scale is None else scored(score, scale * s, query, key)
            if masked:
                # Comparisons have the shape of a part then: booleans cannot be spread as integers can.
                query[None], key[None] = jnp.zeros(s.shape, jnp.int32), jnp.zeros((1, s.shape[1]), jnp.int32)
                s = mask.select(query, key, s, -jnp.inf)
            maximum = jnp.maximum(m_ref[rows], s.max(1, keepdims=True))
            decay = jnp.exp2(m_ref[rows] - maximum)
            p = jnp.exp2(s - spread(maximum, s.shape[1]))
            l_ref[rows] = l_ref[rows] * decay + sum(p[:, i : i + lanes] for i in range(0, s.shape[1], lanes))
            m_ref[rows] = maximum
            return (p if weight is None else p * weight).astype(v_ref.dtype), decay

        def gather(rows, keys, p, decay):
            acc_ref[rows] = acc_ref[rows] * spread(decay, acc_ref.shape[1]) + product(p, v_ref[keys], NN)

        in_parts(parts.of(whole_rows, whole_keys), whole_rows, whole_keys, logits, softmax, gather)

    for wanted, rows, keys, masked in bodies(flags, q_ref.shape[0], k_ref.shape[0]):
        pl.when(wanted)(functools.partial(compute, rows, keys, masked))

    pl.when(flags & LAST != 0)(lambda: end(sums, *after))
