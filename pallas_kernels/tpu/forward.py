"""The forward pass of exact attention on a TPU.

One step of the grid is a live block of keys, rows on sublanes and keys on lanes:

    S = Q' K^T     m' = max(m, rowmax S)     P = 2^(S - m')     l' = l 2^(m - m') + P     acc' = acc 2^(m - m') + P V

m is kept once per lane, so that it meets S without a broadcast; l is kept as one sum for every lane, and the lanes are
added up when a row is done. Carries (m, l, acc) come in and go out in float32, in place.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.lib.tiles import Tiled
from striate.pallas_kernels.tpu.parts import (
    LANES,
    LN2,
    LOG2E,
    NN,
    NT,
    blocks,
    column,
    compiler_params,
    in_parts,
    is_plain,
    like,
    parameters,
    product,
    scored,
    spread,
)
from striate.pallas_kernels.tpu.steps import COLUMN, FIRST, LAST, LIVE, MASKED


def forward(kernel: Tiled, names, score, row, code, count, q, k, v, query_fields, key_fields, carry):
    """One call: (m (B, H, 1, T), l (B, H, 1, T), acc (B, H, T, V)) with what the steps listed add to them."""
    (_, heads, length, width), (q_tile, k_tile) = q.shape, kernel.tile
    parts = blocks().forward.of(q_tile, k_tile)
    lanes, group, per_row = min(LANES, parts.keys), heads // k.shape[1], length // q_tile

    def of_row(shape, index):
        return pl.BlockSpec(
            (None, None, *shape), lambda h, i, row, code: (row[i] // per_row, h, *index(row[i] % per_row))
        )

    def of_keys(width):
        return pl.BlockSpec(
            (None, None, k_tile, width), lambda h, i, row, code: (row[i] // per_row, h // group, code[i] // COLUMN, 0)
        )

    leaves, specs, rebuild = parameters(score, heads, lambda h, i, row, code: (h, 0, 0))
    carries = [of_row((1, q_tile), lambda q: (0, q))] * 2 + [of_row((q_tile, v.shape[3]), lambda q: (q, 0))]
    given = (q, k, v, query_fields, key_fields, *leaves)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(heads, count),
        in_specs=[
            of_row((q_tile, width), lambda q: (q, 0)),
            of_keys(width),
            of_keys(v.shape[3]),
            pl.BlockSpec((None, len(names), q_tile), lambda h, i, row, code: (row[i] // per_row, 0, row[i] % per_row)),
            pl.BlockSpec((None, len(names), k_tile), lambda h, i, row, code: (row[i] // per_row, 0, code[i] // COLUMN)),
            *specs,
            *carries,
        ],
        out_specs=carries,
        scratch_shapes=[
            pltpu.VMEM((len(names), q_tile, lanes), jnp.int32),
            *[pltpu.VMEM((q_tile, lanes), jnp.float32)] * 2,
        ],
    )
    body = functools.partial(_step, kernel.mask, is_plain(score), rebuild, len(leaves), names, parts)
    return pl.pallas_call(
        body,
        grid_spec=spec,
        out_shape=[like(x) for x in carry],
        input_output_aliases={2 + len(given) + i: i for i in range(3)},
        interpret=kernel.interpret,
        compiler_params=compiler_params("parallel", "arbitrary"),
        name="striate_forward",
    )(row, code, *given, *carry)


def _step(mask, plain, rebuild, leaf_count, names, parts, row_ref, code_ref, q_ref, k_ref, v_ref, *refs):
    query_ref, key_ref, *refs = refs
    leaf_refs, (m_in, l_in, acc_in, m_out, l_out, acc_ref, column_ref, m_ref, l_ref) = (
        refs[:leaf_count],
        refs[leaf_count:],
    )
    flags, lanes = code_ref[pl.program_id(1)] % COLUMN, m_ref.shape[1]

    @pl.when(flags & FIRST != 0)
    def _():
        for number in range(len(names)):
            column_ref[number] = column(query_ref[number : number + 1], lanes)
        m_ref[...] = LOG2E * column(m_in[...], lanes)
        l_ref[...] = column(l_in[...], lanes) / lanes
        acc_ref[...] = acc_in[...]

    def compute(masked: bool):
        score = rebuild([ref[...] for ref in leaf_refs])

        def logits(rows, keys):
            return product(q_ref[rows], k_ref[keys], NT)

        def softmax(rows, keys, s):
            query = {n: spread(column_ref[i, rows], s.shape[1]) for i, n in enumerate(names)}
            key = {n: key_ref[i : i + 1, keys] for i, n in enumerate(names)}
            s, weight = (s, None) if plain else scored(score, s, query, key)
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

        in_parts(parts, q_ref.shape[0], k_ref.shape[0], logits, softmax, gather)

    pl.when(flags & (LIVE | MASKED) == LIVE)(lambda: compute(masked=False))
    pl.when(flags & (LIVE | MASKED) == LIVE | MASKED)(lambda: compute(masked=True))

    @pl.when(flags & LAST != 0)
    def _():
        m_out[...] = LN2 * m_ref[...].T[:1]
        l_out[...] = l_ref[...].T.sum(0, keepdims=True)
